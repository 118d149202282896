"""How often the loops of the mask branch's kernels run on given boxes and labels: what `predict_mask` needs.

The kernels decide from place and size what they go through. The same is followed here in PyTorch, for all at once, so
that nothing has to be interpreted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import MaskPool
from kernels.paste_masks.reference import integer_boxes


@dataclass(frozen=True)
class TargetsWork:
    """Turns of `mask_targets_kernel`'s loops, of each program [N, tiles, tiles]."""

    bands: Tensor  # of rows of cells, as many as a table holds
    samples_y: Tensor  # of all bands
    blocks: Tensor  # of columns of cells, in all bands
    samples_x: Tensor  # of all blocks
    rows: Tensor  # in all blocks
    cells: Tensor


def targets_work(pool: MaskPool, boxes: Tensor, matched: Tensor, size: int, bins: int, cells: int) -> TargetsWork:
    """For boxes [B, S, 4], not aligned, with tables of `cells` for tiles of `bins` bins."""
    images, slots = matched.shape[0], pool.offset.shape[1]
    objects = (torch.arange(images)[:, None] * slots + matched).flatten()
    extent, lengths = pool.extent.flatten(0, 1)[objects], pool.sizes[objects // max(slots, 1)]
    visible = ((extent[:, 2:] > extent[:, :2]).all(1))[:, None]
    edges = boxes.flatten(0, 1)
    samples_y, touched_y = axis_cells(edges[:, 1], edges[:, 3], lengths[:, 0], size, bins)
    samples_x, touched_x = axis_cells(edges[:, 0], edges[:, 2], lengths[:, 1], size, bins)
    touched_y, touched_x = torch.where(visible, touched_y, 0), torch.where(visible, touched_x, 0)
    bands, across = (-(-touched_y // cells))[:, :, None], (-(-touched_x // cells))[:, None, :]
    blocks = bands * across
    return TargetsWork(
        bands=bands.expand_as(blocks),
        samples_y=(bands * samples_y[:, None, None]).expand_as(blocks),
        blocks=blocks,
        samples_x=blocks * samples_x[:, None, None],
        rows=touched_y[:, :, None] * across,
        cells=touched_y[:, :, None] * touched_x[:, None, :],
    )


def axis_cells(low: Tensor, high: Tensor, length: Tensor, size: int, bins: int) -> tuple[Tensor, Tensor]:
    """Of boxes' edges [N]: samples a bin [N], and the most cells that a bin of each tile touches, [N, tiles]."""
    bin_size = (high - low).clamp(min=1) / size
    samples = bin_size.ceil()
    bin = torch.arange(-(-size // bins) * bins).clamp(max=size - 1)
    start = low[:, None] + bin * bin_size[:, None]
    first, last = (start + ((s + 0.5) * bin_size / samples)[:, None] for s in (0, samples - 1))
    top = (length - 1)[:, None].to(low.dtype)
    begin, end = (torch.minimum(edge.clamp(min=0), top).int() for edge in (first, last))
    return samples.long(), (end - begin + 2).view(len(low), -1, bins).amax(2).long()


@dataclass(frozen=True)
class PasteWork:
    """What `paste_masks_kernel` goes through, all masks together."""

    blocks: int
    near: int  # blocks with a pixel of their box
    parts: int  # of these, with a pixel of it


def paste_work(boxes: Tensor, columns: int, image_size: tuple[int, int], block: int, part: int) -> PasteWork:
    """For masks with so many columns; a block is a stretch of memory that begins at a multiple of 16."""
    height, width = image_size
    blocks = near = parts = 0
    for mask, (x1, y1, x2, y2) in enumerate(integer_boxes(boxes, columns).tolist()):
        begin = -(mask * height * width % 16)
        first = torch.arange(begin, height * width, block)
        left, right, top, bottom = max(x1, 0), min(x2 + 1, width), max(y1, 0), min(y2 + 1, height)
        bottom = bottom if left < right else 0
        window = (width, left, right, top, bottom)
        found = first[_meets(first, block, *window)]
        inside = found[:, None] + torch.arange(0, block, part)
        blocks, near = blocks + len(first), near + len(found)
        parts += int(_meets(inside, part, *window).sum())
    return PasteWork(blocks, near, parts)


def _meets(first: Tensor, size: int, width: int, left: int, right: int, top: int, bottom: int) -> Tensor:
    """Whether any of `size` pixels from `first` on, row after row, lies in the box."""
    y, x = first.div(width, rounding_mode="floor"), first.remainder(width)
    row = (y + (x >= right)).clamp(min=top)
    return (row < bottom) & ((row - y) * width + left - x < size)


def own_channel_work(
    labels: Tensor, elements: int, classes: int, pixels: int, strides: tuple[int, int], block: int, own: int
) -> tuple[Tensor, Tensor]:
    """Turns of `mask_bce_backward_kernel`'s loops, of each program: RoIs in its stretch, chunks of their own channels.

    `strides` are from class to class and from pixel to pixel of the gradient.
    """
    of_roi, (step_k, step_p) = classes * pixels, strides
    start = torch.arange(0, elements, block)
    end = (start + block).clamp(max=elements)
    rois = (end - 1) // of_roi - start // of_roi + 1
    chunks = torch.zeros_like(start)
    for number in range(int(rois.max())):
        roi = start // of_roi + number
        label = labels[roi.clamp(max=len(labels) - 1)]
        base = roi * of_roi + label.clamp(min=0) * step_k
        first = (-(-(start - base) // step_p)).clamp(min=0)
        last = (-(-(end - base) // step_p)).clamp(max=pixels)
        here = (number < rois) & (label >= 0) & (label < classes)
        chunks += torch.where(here, (-(-(last - first) // own)).clamp(min=0), 0)
    return rois, chunks
