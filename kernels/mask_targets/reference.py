"""Mask targets in plain PyTorch: RoIAlign of each RoI's mask as a product of three matrices."""

import torch
from torch import Tensor

from ..mask_pool import MaskPool

CHUNK_PIXELS = 1 << 24  # masks of this many pixels stand at full size at a time
LONGEST = 4
"""Images that a box may be long. A longer one has targets of 0, as one that is not finite has: loops have to end."""


def mask_targets(pool: MaskPool, boxes: Tensor, matched_idx: Tensor, size: int, aligned: bool) -> Tensor:
    """Boxes [B, S, 4] and their objects [B, S] -> [B, S, size, size] in boxes' dtype.

    RoIAlign is separable: with interpolation weights A_y [size, H] and A_x [size, W] the target is A_y @ mask @ A_x^T.
    """
    height, width = pool.padded_size
    image = torch.arange(len(boxes), device=boxes.device)[:, None].expand_as(matched_idx).flatten()
    matched, boxes = matched_idx.flatten(), boxes.flatten(0, 1)
    offset, extent, lengths = pool.offset[image, matched], pool.extent[image, matched], pool.sizes[image]
    weights_y = axis_weights(boxes[:, 1], boxes[:, 3], size, lengths[:, 0], height, aligned)
    weights_x = axis_weights(boxes[:, 0], boxes[:, 2], size, lengths[:, 1], width, aligned)
    out = boxes.new_empty(len(boxes), size, size)
    chunk = max(1, CHUNK_PIXELS // max(height * width, 1))
    for first in range(0, len(boxes), chunk):
        part = slice(first, first + chunk)
        masks = pool.masks(offset[part], extent[part]).to(boxes.dtype)
        out[part] = weights_y[part] @ masks @ weights_x[part].transpose(1, 2)
    return out.view(*matched_idx.shape, size, size)


def axis_weights(low: Tensor, high: Tensor, bins: int, length: Tensor, padded_length: int, aligned: bool) -> Tensor:
    """RoIAlign's interpolation weights along one axis: [N] starts, ends and lengths -> [N, bins, padded_length].

    A bin has ceil(extent / bins) samples.
    """
    low, high = (low - 0.5, high - 0.5) if aligned else (low, high)
    extent = high - low
    bin_size = (extent if aligned else extent.clamp(min=1)) / bins
    sound = usable(low, high, length)
    low, bin_size = torch.where(sound, low, 0), torch.where(sound, bin_size, 0)
    grid = bin_size.ceil()  # 0 for a box without extent, aligned: it has no samples
    sample = torch.arange(int(grid.max()) if len(grid) else 0, device=low.device)
    starts = low[:, None] + torch.arange(bins, device=low.device) * bin_size[:, None]
    position = starts[:, :, None] + ((sample + 0.5) * bin_size[:, None] / grid.clamp(min=1)[:, None])[:, None]
    length = length[:, None, None]
    counts = (sample < grid[:, None])[:, None] & (position >= -1) & (position <= length)
    position = torch.minimum(position.clamp(min=0), length - 1)
    cell = torch.minimum(position.long(), (length - 2).clamp(min=0))
    weight = counts / grid.clamp(min=1)[:, None, None]
    out = low.new_zeros(len(low), bins, padded_length)
    out.scatter_add_(2, cell, weight * (1 - (position - cell)))
    return out.scatter_add_(2, torch.minimum(cell + 1, length - 1), weight * (position - cell))


def usable(low: Tensor, high: Tensor, length: Tensor) -> Tensor:
    """Whether boxes have targets, as far as an axis of images of `length` goes; false for NaN."""
    return (high - low <= LONGEST * length) & (low.abs() <= LONGEST * length + 1)


def torchvision_way(pool: MaskPool, boxes: Tensor, matched_idx: Tensor, size: int, aligned: bool) -> Tensor:
    """torchvision's `project_masks_on_boxes`, an image at a time, from full-size floating masks of the objects matched.

    Its RoIAlign crashes on boxes that are not finite, and does not come back from one of 1e9 pixels: they get zeros.
    """
    from torchvision.ops import roi_align

    out = boxes.new_zeros(*boxes.shape[:2], size, size)
    for b, (height, width) in enumerate(pool.sizes.tolist()):
        sound = usable(boxes[b, :, 0], boxes[b, :, 2], width) & usable(boxes[b, :, 1], boxes[b, :, 3], height)
        used, place = matched_idx[b].unique(return_inverse=True)
        chunk = max(1, CHUNK_PIXELS // (height * width))
        for first in range(0, len(used), chunk):
            part = used[first : first + chunk]
            masks = pool.masks(pool.offset[b, part], pool.extent[b, part])[:, None, :height, :width].to(boxes.dtype)
            rows = (sound & (place >= first) & (place < first + chunk)).nonzero()[:, 0]
            rois = torch.cat([(place[rows, None] - first).to(boxes.dtype), boxes[b, rows]], dim=1)
            out[b, rows] = roi_align(masks, rois, (size, size), 1.0, -1, aligned)[:, 0]
    return out
