"""Canvases: the class of each pixel of an image, all of its objects on one map."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import MaskPool
from kernels.boxes import take

from ..structures import Targets


@torch.no_grad()
def canvas_targets(targets: Targets, boxes: Tensor, size: int) -> Tensor:
    """The class of each pixel of each RoI, whichever object it belongs to: [B, S, size, size] int64, 0 background.

    Every bin takes the pixel under its centre.

    Args:
        targets: ground truth of B images.
        boxes: [B, S, 4] xyxy.
        size: height and width of a canvas.
    """
    height, width = targets.masks.padded_size
    centre = (torch.arange(size, device=boxes.device) + 0.5) / size
    x = boxes[..., 0, None] + centre * (boxes[..., 2] - boxes[..., 0])[..., None]  # [B, S, size]
    y = boxes[..., 1, None] + centre * (boxes[..., 3] - boxes[..., 1])[..., None]
    x, y = x.long().clamp(0, width - 1), y.long().clamp(0, height - 1)
    pixel = y[..., :, None] * width + x[..., None, :]
    return class_map(targets).flatten(1).gather(1, pixel.flatten(1)).view(pixel.shape)


def class_map(targets: Targets) -> Tensor:
    """The class of each pixel of each image, [B, H, W] int64, 0 background; the smaller extent lies on top."""
    return _paint(*targets.masks.flat(), targets.labels)


# An operator of its own: its loop over objects would be unrolled by torch.compile.
@torch.library.custom_op("mrcnn::paint_classes", mutates_args=())
def _paint(
    bitmaps: Tensor,
    offset: Tensor,
    extent: Tensor,
    sizes: Tensor,
    padded_size: list[int],
    packed: bool,
    labels: Tensor,
) -> Tensor:
    area = (extent[..., 2] - extent[..., 0]).long() * (extent[..., 3] - extent[..., 1])
    order = area.argsort(dim=1, descending=True, stable=True)
    offset, labels, extent = offset.gather(1, order), labels.gather(1, order), take(extent, order)
    pool = MaskPool(bitmaps, offset, extent, sizes, tuple(padded_size), packed)
    canvas = labels.new_zeros(len(labels), *padded_size)
    for slot in range(labels.shape[1]):
        canvas = torch.where(pool.masks(offset[:, slot], extent[:, slot]), labels[:, slot, None, None], canvas)
    return canvas


@_paint.register_fake
def _(
    bitmaps: Tensor, offset: Tensor, extent: Tensor, sizes: Tensor, padded_size: list[int], packed: bool, labels: Tensor
) -> Tensor:
    return labels.new_empty(labels.shape[0], *padded_size)
