"""Greedy NMS in plain PyTorch: forms the IoU matrix [G, n, n] and waits for the device to see when it is done."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..box_iou.reference import box_iou


def round_down(threshold: float) -> float:
    """The largest fp32 number that is not above `threshold`.

    torchvision compares fp32 IoUs with the threshold as a double on a CPU; this number decides alike in fp32, where
    rounding to nearest would not for 0.1, 0.2, 0.3, 0.4 and 0.6.
    """
    limit = np.float32(threshold)
    return float(limit if float(limit) <= threshold else np.nextafter(limit, np.float32(-np.inf)))


def screen(threshold: float) -> tuple[float, float]:
    """(share, slack): what the kernel compares before it divides, for boxes of areas A, B between 1e-9 and 1e38,
    whose sum does not overflow, and intersection I.

    I / (A + B - I) is above t where I is above t / (1 + t) of A + B. The fp32 IoU, its division included, is off by at
    most 4 roundings, the comparison by 5; a margin of 128 (2^-17 relative in t) is beyond both. So it is above
    `threshold` where I > share * (A + B) in fp32, and is not where I <= slack * share * (A + B); only in between, for
    very few pairs, does the quotient have to be computed.
    """
    if threshold < 0:
        return 1.0, -1.0  # the sign of a quotient decides: the kernel computes them all
    threshold = min(threshold, 2.0)  # no IoU is above 2, nor above more than that
    low = threshold * (1 - 2**-17) if threshold > 2**-89 else 0.0
    high = max(threshold * (1 + 2**-17), 2**-90)  # no product of the comparison may underflow
    share = high / (1 + high)
    return share, low / (1 + low) / share


def nms_mask(boxes: Tensor, valid: Tensor, threshold: float, groups: Tensor | None = None) -> Tensor:
    """See `op.nms_mask`: [G, n, 4] fp32, [G, n] bool, integers [G, n] or None -> [G, n] bool.

    Greedy NMS is the fixed point of "kept unless a kept, better box overlaps me": the first i boxes are settled
    after i rounds, and all should be after a few. Boxes behind the last valid one of all groups are not compared.
    """
    number, (found,) = valid.shape[1], valid.any(dim=0).nonzero(as_tuple=True)
    last = int(found[-1]) + 1 if len(found) else 0
    boxes, valid = boxes[:, :last], valid[:, :last]
    suppresses = (box_iou(boxes, boxes) > round_down(threshold)).triu_(1)  # [G, better, worse]
    if groups is not None:
        groups = groups[:, :last]
        suppresses &= groups[:, :, None] == groups[:, None, :]
    keep = valid
    for _ in range(last):
        settled = valid & ~(suppresses & keep[:, :, None]).any(dim=1)
        if torch.equal(settled, keep):
            break
        keep = settled
    return F.pad(keep, (0, number - last))  # a copy in any case, never the caller's own `valid`
