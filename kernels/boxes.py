"""Box arithmetic in plain PyTorch: deltas between boxes, clipping. The model and the references of the ops share it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_LOG_SCALE = math.log(1000.0 / 16)  # a box grows at most 62.5-fold: exp() of a bad dw or dh must not overflow


def encode(boxes: Tensor, references: Tensor, weights: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Deltas (dx, dy, dw, dh) that move `references` onto `boxes`, both [..., 4] xyxy; torchvision's BoxCoder.

    `weights` multiply (dx, dy) and (dw, dh). A reference without width or height (an empty slot) gives zeros rather
    than NaN.
    """
    center, size = _center_size(boxes)
    reference_center, reference_size = _center_size(references)
    empty = (reference_size <= 0).any(-1, keepdim=True) | (size <= 0).any(-1, keepdim=True)
    reference_size = torch.where(empty, 1.0, reference_size)
    size = torch.where(empty, 1.0, size)
    shift = (center - reference_center) / reference_size * weights[0]
    scale = torch.log(size / reference_size) * weights[1]
    return torch.where(empty, 0.0, torch.cat([shift, scale], dim=-1))


def decode(deltas: Tensor, references: Tensor, weights: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Inverse of `encode`, with dw and dh limited to `MAX_LOG_SCALE`."""
    shift, scale = deltas[..., :2].float() / weights[0], deltas[..., 2:].float() / weights[1]
    center, size = _center_size(references)
    center = shift * size + center
    half = torch.exp(scale.clamp(max=MAX_LOG_SCALE)) * size / 2
    return torch.cat([center - half, center + half], dim=-1)


def _center_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    size = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + 0.5 * size, size


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Clip boxes [B, ..., 4] to their image, sizes [B, 2] of (height, width)."""
    limit = sizes.flip(-1).to(boxes.dtype).view(len(sizes), *[1] * (boxes.ndim - 2), 2)
    return torch.minimum(boxes.clamp(min=0), torch.cat([limit, limit], dim=-1))


def take(values: Tensor, index: Tensor) -> Tensor:
    """Rows of [B, R, d] at index [B, S]: [B, S, d]."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))
