"""Greedy non-maximum suppression of many groups at once, in fixed shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import box_iou


def nms_mask(boxes: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """Which boxes greedy NMS keeps, for G groups of n boxes sorted by falling score.

    Greedy NMS is the fixed point of "kept unless a kept, better box overlaps me": the first i boxes are settled
    after i rounds, and in practice all are after a few. Same result as `torchvision.ops.nms` on every group.

    Args:
        boxes: [G, n, 4] xyxy fp32, best first.
        valid: [G, n] bool; other boxes neither suppress nor are kept.
        threshold: a box is suppressed by a better one with an IoU above it.

    Returns:
        [G, n] bool.
    """
    suppresses = (box_iou(boxes, boxes) > threshold).triu_(1)  # [G, better, worse]
    keep = valid
    for _ in range(boxes.shape[1]):
        settled = valid & ~(suppresses & keep[:, :, None]).any(dim=1)
        if torch.equal(settled, keep):
            break
        keep = settled
    return keep
