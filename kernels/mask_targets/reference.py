"""Mask targets in plain PyTorch: RoIAlign of each RoI's mask as a product of three matrices."""

import torch
from torch import Tensor

from ..mask_pool import MaskPool

CHUNK_PIXELS = 1 << 24  # masks of this many pixels stand at full size at a time
LONGEST = 4
"""Images that a box may be long. A longer one has targets of 0, as one that is not finite has: loops have to end."""


def mask_targets(pool: MaskPool, boxes: Tensor, matched_idx: Tensor, size: int, aligned: bool) -> Tensor:
    """Boxes [N, 4] of images `matched_idx` [N] // G and objects `matched_idx` % G -> [N, size, size] in boxes' dtype.

    RoIAlign is separable: with interpolation weights A_y [size, H] and A_x [size, W] the target is A_y @ mask @ A_x^T.
    """
    height, width = pool.padded_size
    slots = pool.offset.shape[1]
    lengths = pool.sizes[matched_idx // max(slots, 1)]
    offset, extent = pool.offset.flatten()[matched_idx], pool.extent.flatten(0, 1)[matched_idx]
    weights_y = axis_weights(boxes[:, 1], boxes[:, 3], size, lengths[:, 0], height, aligned)
    weights_x = axis_weights(boxes[:, 0], boxes[:, 2], size, lengths[:, 1], width, aligned)
    out = boxes.new_empty(len(boxes), size, size)
    chunk = max(1, CHUNK_PIXELS // max(height * width, 1))
    for first in range(0, len(boxes), chunk):
        part = slice(first, first + chunk)
        masks = pool.masks(offset[part], extent[part]).to(boxes.dtype)
        out[part] = weights_y[part] @ masks @ weights_x[part].transpose(1, 2)
    return out


def axis_weights(low: Tensor, high: Tensor, bins: int, length: Tensor, padded_length: int, aligned: bool) -> Tensor:
    """RoIAlign's interpolation weights along one axis: [N] starts, ends and lengths -> [N, bins, padded_length].

    A bin has ceil(extent / bins) samples.
    """
    low, high = (low - 0.5, high - 0.5) if aligned else (low, high)
    extent = high - low
    bin_size = (extent if aligned else extent.clamp(min=1)) / bins
    usable = (extent <= LONGEST * length) & (low.abs() <= LONGEST * length + 1)  # NaN is not
    low, bin_size = torch.where(usable, low, 0), torch.where(usable, bin_size, 0)
    grid = bin_size.ceil()  # 0 for a box without extent, aligned: it has no samples
    sample = torch.arange(-(-LONGEST * padded_length // bins) + 1, device=low.device)
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


def torchvision_way(pool: MaskPool, boxes: Tensor, matched_idx: Tensor, size: int, aligned: bool) -> Tensor:
    """torchvision's `project_masks_on_boxes`, an image at a time, from full-size floating masks."""
    from torchvision.ops import roi_align

    images = []
    for b, (height, width) in enumerate(pool.sizes.tolist()):
        masks = pool.dense(b)[:, None, :height, :width].to(boxes.dtype)
        rois = torch.cat([matched_idx[b, :, None].to(boxes.dtype), boxes[b]], dim=1)
        images.append(roi_align(masks, rois, (size, size), 1.0, -1, aligned)[:, 0])
    return torch.stack(images) if images else boxes.new_empty(*boxes.shape[:2], size, size)
