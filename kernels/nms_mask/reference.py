"""Greedy NMS in plain PyTorch: forms the IoU matrix [G, n, n] and waits for the device to see when it is done."""

import numpy as np
import torch
from torch import Tensor

from ..box_iou.reference import box_iou


def round_down(threshold: float) -> float:
    """The largest fp32 number that is not above `threshold`.

    torchvision compares fp32 IoUs with the threshold as a double on a CPU; this number decides alike in fp32, where
    rounding to nearest would not for 0.1, 0.2, 0.3, 0.4 and 0.6.
    """
    limit = np.float32(threshold)
    return float(limit if float(limit) <= threshold else np.nextafter(limit, np.float32(-np.inf)))


def nms_mask(boxes: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """See `op.nms_mask`: [G, n, 4] fp32, [G, n] bool -> [G, n] bool.

    Greedy NMS is the fixed point of "kept unless a kept, better box overlaps me": the first i boxes are settled
    after i rounds, and in practice all are after a few.
    """
    suppresses = (box_iou(boxes, boxes) > round_down(threshold)).triu_(1)  # [G, better, worse]
    keep = valid
    for _ in range(boxes.shape[1]):
        settled = valid & ~(suppresses & keep[:, :, None]).any(dim=1)
        if torch.equal(settled, keep):
            break
        keep = settled
    return keep.clone()  # never the caller's own `valid`
