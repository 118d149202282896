"""What the ops of a mask branch must move and compute: the part of `floors` that counts masks.

Each function gives (bytes, instructions) of one call. Of bytes are counted, each once:

| op | read | written |
| --- | --- | --- |
| mask_bce_loss | labels; of each occupied slot its class's channel and its target | the loss |
| its backward | the same, and the loss's gradient | the gradient of all logits |
| mask_predictor_loss | labels; of occupied slots features and targets; weight, bias of classes that occur | the loss |
| its backward | labels, weights of classes that occur, the loss's gradient | gradients of features, weight and bias |
| mask_targets | boxes, matches, sizes; of matched objects offset, extent, bits below one of its boxes | all targets |
| paste_masks | boxes; the cells of a mask that a pixel of the image takes a share of | a byte a pixel and mask |

The backward of mask_predictor_loss is charged nothing for what its forward may leave behind, for the forward could
leave the whole gradient: not the slopes (4 bytes a pixel), not which features were above 0 (a bit each, with the ReLU),
not the sums that make the weight's gradient. Both passes together are the features once and their gradient once.

Of an object with several boxes the largest of the rectangles that they touch is counted, a bound from below on what
they touch together. Instructions count in mask_bce_loss alone: products and sums of features and of interpolation could
be a tensor core's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels import MaskPool
from kernels.paste_masks.reference import _sources, integer_boxes

LANES = 32  # of a warp
# Instructions of one pixel of the mask loss max(z, 0) - z t + log(1 + exp(-|z|)): exp as a product and a power of two;
# log as one multiply-add into a running product, its logarithm taken once in many pixels; max, add, multiply-add.
MASK = 6
MASK_BACKWARD = 4  # sigmoid(z) = (1 + tanh(z / 2)) / 2: a product, tanh, and two multiply-adds with t and the scale
Work = tuple[int, int]


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _mask_bce_loss(backward: bool, dtype: torch.dtype, logits: Tensor, labels: Tensor, targets: Tensor) -> Work:
    pixels = int((labels >= 0).sum()) * logits.shape[2] * logits.shape[3]
    read = _bytes(labels) + pixels * (dtype.itemsize + targets.element_size())
    loss = 8 if dtype == torch.float64 else 4  # read, as its gradient, by the backward
    if backward:
        return read + loss + logits.numel() * dtype.itemsize, pixels * MASK_BACKWARD // LANES
    return read + loss, pixels * MASK // LANES


def _mask_predictor_loss(
    backward: bool, dtype: torch.dtype, features: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, targets: Tensor
) -> Work:
    occupied = labels[labels >= 0]
    channels, pixels = features.shape[1], features.shape[2] * features.shape[3]
    classes = len(occupied.unique())
    loss = 8 if dtype == torch.float64 else 4
    weights = classes * channels * weight.element_size()
    if backward:
        return _bytes(labels, weight, bias) + weights + loss + features.numel() * dtype.itemsize, 0
    of_pixel = channels * dtype.itemsize + targets.element_size()
    read = _bytes(labels) + weights + classes * bias.element_size() + len(occupied) * pixels * of_pixel
    return read + loss, 0


def _mask_targets(
    backward: bool, dtype: torch.dtype, pool: MaskPool, boxes: Tensor, matched: Tensor, size: int, style: str = ""
) -> Work:
    images, slots = pool.offset.shape
    objects = (torch.arange(images, device=boxes.device)[:, None] * slots + matched).flatten()
    touched = _touched_bytes(pool, boxes.flatten(0, 1), objects)
    largest = touched.new_zeros(images * slots).scatter_reduce_(0, objects, touched, "amax")
    of_object = pool.offset.element_size() + 4 * pool.extent.element_size()
    read = _bytes(boxes, matched, pool.sizes) + len(objects.unique()) * of_object + int(largest.sum())
    element = 1 if style == "detectron2" else boxes.element_size()
    return read + objects.numel() * size * size * element, 0


def _touched_bytes(pool: MaskPool, boxes: Tensor, objects: Tensor) -> Tensor:
    """Of each box [N, 4], the bytes of its object's bitmap that hold a pixel between its edges, whole pixels only.

    Samples are at most a pixel apart, the first at most half of one from the edge: each of these pixels weighs.
    """
    extent = pool.extent.flatten(0, 1)[objects].long()
    first = torch.maximum(boxes[:, :2].ceil().long(), extent[:, :2]) - extent[:, :2]
    last = torch.minimum(boxes[:, 2:].floor().long(), extent[:, 2:] - 1) - extent[:, :2]
    low, high = first[:, 0], last[:, 0]
    across = high // 8 - low // 8 + 1 if pool.packed else high - low + 1
    here = (last >= first).all(1)
    return torch.where(here, across * (last[:, 1] - first[:, 1] + 1), 0)


def _paste_masks(
    backward: bool,
    dtype: torch.dtype,
    masks: Tensor,
    boxes: Tensor,
    image_size: tuple[int, int],
    threshold: float = 0.5,
) -> Work:
    rows, columns = masks.shape[1:]
    cells = sum(
        _cells(y1, y2, rows, image_size[0]) * _cells(x1, x2, columns, image_size[1])
        for x1, y1, x2, y2 in integer_boxes(boxes, columns).tolist()
    )
    return _bytes(boxes) + cells * dtype.itemsize + len(masks) * image_size[0] * image_size[1], 0


def _cells(first: int, last: int, cells: int, length: int) -> int:
    """How many of an axis's cells have a weight above 0 in a pixel of the image; `first` to `last` is the whole box."""
    position = torch.arange(max(first, 0), max(min(last + 1, length), first, 0)) - first
    low, weight = _sources(position, last - first + 1, cells)
    touched = torch.cat([low[weight < 1], low[weight > 0] + 1]).unique()
    return int(((touched >= 1) & (touched <= cells)).sum())  # the others are the border of zeros


WORK: dict[str, Callable[..., Work]] = {
    "mask_bce_loss": _mask_bce_loss,
    "mask_predictor_loss": _mask_predictor_loss,
    "mask_targets": _mask_targets,
    "paste_masks": _paste_masks,
}
