"""Mask targets: each RoI's object, cropped and resized from the mask pool."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.boxes import take

from ..structures import Targets

CHUNK_PIXELS = 1 << 26  # memory bound: full-size masks of this many pixels are formed at a time


@torch.no_grad()
def mask_targets(
    targets: Targets,
    boxes: Tensor,
    matched: Tensor,
    size: int,
    sizes: Tensor,
    padded_size: tuple[int, int],
    aligned: bool = False,
) -> Tensor:
    """torchvision's soft mask targets (`project_masks_on_boxes`), read from the mask pool.

    That is RoIAlign of the object's mask with sampling_ratio -1. RoIAlign is separable: with weights
    A_y [size, H] and A_x [size, W] the target is A_y @ mask @ A_x^T.

    Args:
        targets: ground truth of B images.
        boxes: [B, S, 4] xyxy, inside the image.
        matched: [B, S] int64, each box's object in its image.
        size: target height and width.
        sizes: [B, 2] height and width of each image; samples beyond its last cell are clamped to it.
        padded_size: (H, W) of the padded images.
        aligned: RoIAlign's; with it, and a threshold of 0.5 on the result, they are detectron2's binary targets.

    Returns:
        [B, S, size, size] fp32 in [0, 1].
    """
    offset = take(targets.mask_offset[..., None], matched).flatten()
    extent = take(targets.mask_extent, matched).flatten(0, 1)
    lengths = sizes[:, None].expand(-1, boxes.shape[1], -1).flatten(0, 1)
    rows = boxes.flatten(0, 1)
    out = _project(targets.mask_pool, offset, extent, rows, lengths, size, *padded_size, aligned)
    return out.view(*boxes.shape[:2], size, size)


# Operators of their own: they work in chunks whose number depends on the image's size, which torch.compile would unroll
# and compile again for every size.
@torch.library.custom_op("mrcnn::project_masks", mutates_args=())
def _project(
    pool: Tensor,
    offset: Tensor,
    extent: Tensor,
    boxes: Tensor,
    lengths: Tensor,
    size: int,
    height: int,
    width: int,
    aligned: bool,
) -> Tensor:
    """Masks at `offset` [N] and `extent` [N, 4] of the pool, in boxes [N, 4] of images of `lengths` [N, 2]."""
    weights_y = _axis_weights(boxes[:, 1], boxes[:, 3], size, lengths[:, 0], height, aligned)
    weights_x = _axis_weights(boxes[:, 0], boxes[:, 2], size, lengths[:, 1], width, aligned)
    out = boxes.new_empty(len(boxes), size, size)
    chunk = max(1, CHUNK_PIXELS // (height * width))
    for first in range(0, len(boxes), chunk):
        part = slice(first, first + chunk)
        mask = _full_size(pool, offset[part], extent[part].long(), height, width)
        with torch.autocast(boxes.device.type, enabled=False):  # or the products would be rounded to bf16
            out[part] = weights_y[part] @ mask @ weights_x[part].transpose(1, 2)
    return out


@_project.register_fake
def _(pool: Tensor, offset: Tensor, extent: Tensor, boxes: Tensor, lengths: Tensor, size: int, *rest: object) -> Tensor:
    return boxes.new_empty(boxes.shape[0], size, size)


def _axis_weights(low: Tensor, high: Tensor, bins: int, length: Tensor, padded_length: int, aligned: bool) -> Tensor:
    """RoIAlign's interpolation weights along one axis: [K] starts, ends and lengths -> [K, bins, padded_length].

    The number of samples a bin is ceil(extent / bins), so at most ceil(padded_length / bins) for a box in the image.
    """
    extent = high - low
    bin_size = (extent if aligned else extent.clamp(min=1)) / bins
    grid = bin_size.ceil().clamp(min=1)
    low = low - 0.5 if aligned else low
    sample = torch.arange(-(-padded_length // bins), device=low.device)
    starts = low[:, None] + torch.arange(bins, device=low.device) * bin_size[:, None]
    position = starts[:, :, None] + (sample + 0.5) * (bin_size / grid)[:, None, None]
    length = length[:, None, None]
    counts = (sample < grid[:, None])[:, None] & (position >= -1) & (position <= length)
    position = torch.minimum(position.clamp(min=0), length - 1)
    cell = torch.minimum(position.long(), (length - 2).clamp(min=0))
    weight = counts / grid[:, None, None]
    out = low.new_zeros(len(low), bins, padded_length)
    out.scatter_add_(2, cell, weight * (1 - (position - cell)))
    return out.scatter_add_(2, torch.minimum(cell + 1, length - 1), weight * (position - cell))


@torch.no_grad()
def canvas_targets(targets: Targets, boxes: Tensor, size: int, padded_size: tuple[int, int]) -> Tensor:
    """The class of each pixel of each RoI, whichever object it belongs to: [B, S, size, size] int64, 0 background.

    Every bin takes the pixel under its centre.

    Args:
        targets: ground truth of B images.
        boxes: [B, S, 4] xyxy.
        size: height and width of a canvas.
        padded_size: (H, W) of the padded images.
    """
    height, width = padded_size
    centre = (torch.arange(size, device=boxes.device) + 0.5) / size
    x = boxes[..., 0, None] + centre * (boxes[..., 2] - boxes[..., 0])[..., None]  # [B, S, size]
    y = boxes[..., 1, None] + centre * (boxes[..., 3] - boxes[..., 1])[..., None]
    x, y = x.long().clamp(0, width - 1), y.long().clamp(0, height - 1)
    pixel = y[..., :, None] * width + x[..., None, :]
    return class_map(targets, padded_size).flatten(1).gather(1, pixel.flatten(1)).view(pixel.shape)


def class_map(targets: Targets, padded_size: tuple[int, int]) -> Tensor:
    """The class of each pixel of each image, [B, H, W] int64, 0 background; the smaller extent lies on top."""
    return _paint(targets.mask_pool, targets.mask_offset, targets.mask_extent, targets.labels, *padded_size)


@torch.library.custom_op("mrcnn::paint_classes", mutates_args=())
def _paint(pool: Tensor, offset: Tensor, extent: Tensor, labels: Tensor, height: int, width: int) -> Tensor:
    extent = extent.long()
    area = (extent[..., 2] - extent[..., 0]) * (extent[..., 3] - extent[..., 1])
    order = area.argsort(dim=1, descending=True, stable=True)
    offset, labels, extent = offset.gather(1, order), labels.gather(1, order), take(extent, order)
    canvas = labels.new_zeros(len(labels), height, width)
    for slot in range(labels.shape[1]):
        mask = _full_size(pool, offset[:, slot], extent[:, slot], height, width)
        canvas = torch.where(mask > 0, labels[:, slot, None, None], canvas)
    return canvas


@_paint.register_fake
def _(pool: Tensor, offset: Tensor, extent: Tensor, labels: Tensor, height: int, width: int) -> Tensor:
    return labels.new_empty(labels.shape[0], height, width)


def _full_size(pool: Tensor, offset: Tensor, extent: Tensor, height: int, width: int) -> Tensor:
    """Masks [k, height, width] fp32 from their crops in the pool."""
    if len(pool) == 0:
        return offset.new_zeros(len(offset), height, width, dtype=torch.float32)
    x0, y0, x1, y1 = (e[:, None, None] for e in extent.unbind(1))
    y = torch.arange(height, device=pool.device)[None, :, None]
    x = torch.arange(width, device=pool.device)[None, None, :]
    inside = (y >= y0) & (y < y1) & (x >= x0) & (x < x1)
    index = torch.where(inside, offset[:, None, None] + (y - y0) * (x1 - x0) + (x - x0), 0)
    return torch.where(inside, pool[index], 0).float()
