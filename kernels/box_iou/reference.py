"""Pairwise IoU in plain PyTorch, differentiable by autograd."""

import torch
from torch import Tensor


def box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """IoU of every pair: [..., N, 4] and [..., M, 4] -> [..., N, M]; half types are computed in fp32."""
    boxes1, boxes2 = (b if b.dtype == torch.float64 else b.float() for b in (boxes1, boxes2))
    a, b = boxes1[..., :, None, :], boxes2[..., None, :, :]
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    width, height = torch.relu(high - low).unbind(-1)  # clamp's derivative at 0 differs between releases
    intersection = width * height
    return intersection / (_area(a) + _area(b) - intersection)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
