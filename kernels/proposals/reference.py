"""The best anchors and their boxes in plain PyTorch."""

import math

import torch
from torch import Tensor

from ..rpn_loss.reference import center_size

MAX_LOG_SCALE = math.log(1000.0 / 16)
"""A box grows at most 62.5-fold: exp() of a bad dw or dh must not overflow."""


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
    deltas = deltas.gather(1, index[..., None].expand(-1, -1, 4))
    boxes = decode(deltas, anchors[index])
    finite = boxes.isfinite().all(-1)
    boxes = clip(boxes, image_sizes)
    valid = full & finite & (scores >= 0) & (boxes[..., 2:] - boxes[..., :2] >= min_size).all(-1)
    return torch.where(valid[..., None], boxes, 0.0), torch.where(valid, scores, -1.0)


def decode(deltas: Tensor, references: Tensor) -> Tensor:
    """Boxes [..., 4] that `deltas` make of `references`, in fp32; dw and dh are at most `MAX_LOG_SCALE`."""
    shift, scale = deltas[..., :2].float(), deltas[..., 2:].float()
    center, size = center_size(references)
    center = shift * size + center
    half = torch.exp(scale.clamp(max=MAX_LOG_SCALE)) * size / 2
    return torch.cat([center - half, center + half], dim=-1)


def clip(boxes: Tensor, image_sizes: Tensor) -> Tensor:
    """Clip boxes [B, n, 4] to their image, sizes [B, 2] of (height, width)."""
    limit = image_sizes.flip(-1).to(boxes.dtype)[:, None]
    return torch.minimum(boxes.clamp(min=0), torch.cat([limit, limit], dim=-1))
