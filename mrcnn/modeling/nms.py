"""Greedy non-maximum suppression of many groups at once, in fixed shapes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kernels import box_iou


def nms_mask(boxes: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """Which boxes greedy NMS keeps, for G groups of n boxes sorted by falling score.

    Greedy NMS is the fixed point of "kept unless a kept, better box overlaps me": the first i boxes are settled
    after i rounds, and in practice all are after a few. Same result as torchvision's nms on a CPU for every group (its
    CUDA op differs from that at IoUs that equal the threshold).

    Args:
        boxes: [G, n, 4] xyxy fp32, best first.
        valid: [G, n] bool; other boxes neither suppress nor are kept.
        threshold: a box is suppressed by a better one with an IoU above it.

    Returns:
        [G, n] bool.
    """
    # torchvision compares fp32 with the double: the fp32 number at or below it decides alike.
    limit = np.float32(threshold)
    limit = limit if float(limit) <= threshold else np.nextafter(limit, np.float32(-1))
    suppresses = (box_iou(boxes, boxes) > float(limit)).triu_(1)  # [G, better, worse]
    keep = valid
    for _ in range(boxes.shape[1]):
        settled = valid & ~(suppresses & keep[:, :, None]).any(dim=1)
        if torch.equal(settled, keep):
            break
        keep = settled
    return keep
