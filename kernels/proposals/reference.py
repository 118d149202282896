"""The best anchors and their boxes in plain PyTorch."""

import math

import torch
from torch import Tensor

from ..boxes import clip, decode, take


def stable_topk(values: Tensor, k: int) -> Tensor:
    """See `op.stable_topk`."""
    values = torch.where(values.isnan(), -math.inf, values)
    # In fp32, since a half type's -0.0 may sort below its 0.0 on a device that sorts by bits.
    values = torch.where(values == 0, 0.0, values.float())
    return values.sort(dim=1, descending=True, stable=True).indices[:, :k]


def decode_proposals(
    logits: Tensor, deltas: Tensor, index: Tensor, anchors: Tensor, image_sizes: Tensor, min_size: float
) -> tuple[Tensor, Tensor]:
    """See `op.decode_proposals`; anchors [A, 4]."""
    full = (index >= 0) & (index < logits.shape[1])
    index = torch.where(full, index, 0)
    scores = logits.gather(1, index).float().sigmoid()
    boxes = decode(take(deltas, index), anchors[index])
    finite = boxes.isfinite().all(-1)
    boxes = clip(boxes, image_sizes)
    valid = full & finite & (scores >= 0) & (boxes[..., 2:] - boxes[..., :2] >= min_size).all(-1)
    return torch.where(valid[..., None], boxes, 0.0), torch.where(valid, scores, -1.0)
