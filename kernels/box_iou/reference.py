"""Pairwise IoU and generalised IoU in plain PyTorch, differentiable by autograd."""

import torch
from torch import Tensor


def box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """IoU of every pair: [..., N, 4] and [..., M, 4] -> [..., N, M]; half types are computed in fp32."""
    a, b = _pairs(boxes1, boxes2)
    intersection, union = _areas(a, b)
    return intersection / union


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Generalised IoU of every pair: [..., N, 4] and [..., M, 4] -> [..., N, M]; half types are computed in fp32."""
    a, b = _pairs(boxes1, boxes2)
    intersection, union = _areas(a, b)
    hull = _positive(torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2]))
    return intersection / union - (hull - union) / hull


def _pairs(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    boxes1, boxes2 = (b if b.dtype == torch.float64 else b.float() for b in (boxes1, boxes2))
    return boxes1[..., :, None, :], boxes2[..., None, :, :]


def _areas(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Of the intersection and of the union."""
    intersection = _positive(torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2]))
    return intersection, _area(a) + _area(b) - intersection


def _positive(sides: Tensor) -> Tensor:
    """Area of boxes by their sides [..., 2]: none where a side is negative."""
    width, height = torch.relu(sides).unbind(-1)  # clamp's derivative at 0 differs between releases
    return width * height


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
