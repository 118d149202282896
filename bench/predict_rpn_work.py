"""How often the loops of the kernels of a region proposal network run on given boxes: what `predict_rpn` needs.

The kernels decide from place and size which objects a tile of anchors looks at, and which levels an object searches.
The same is followed here in PyTorch, for all at once, so that nothing has to be interpreted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import AnchorGrid

from .rpn_inputs import by_level, iou_with

SPARE = 1.0001  # how much the kernels raise the bound that two areas set on an IoU


@dataclass(frozen=True)
class Search:
    """What `best_iou_with_grid_kernel` goes through for one object."""

    levels: int
    rows: int  # rows of blocks, all levels together
    blocks: int  # of tile_h rows by tile_w columns of anchors
    best: float


def best_searches(grid: AnchorGrid, boxes: Tensor, tile_h: int, tile_w: int) -> list[Search]:
    """The search of each of `boxes` [n, 4]: levels by what their sizes allow, until one allows less than was found.

    For boxes and anchors with positive, finite areas.
    """
    anchors = by_level(grid, grid.anchors())
    return [_search(grid, anchors, box, tile_h, tile_w) for box in boxes]


def _search(grid: AnchorGrid, anchors: list[Tensor], box: Tensor, tile_h: int, tile_w: int) -> Search:
    sizes = (grid.cells[..., 2:] - grid.cells[..., :2]).prod(-1)
    area = (box[2:] - box[:2]).prod()
    bounds = (torch.minimum(sizes, area) / torch.maximum(sizes, area) * SPARE).amax(1)
    levels, rows, blocks, best = 0, 0, 0, 0.0
    for level in bounds.argsort(descending=True, stable=True).tolist():
        if bounds[level] < best:
            break
        window, per_cell = _near(grid, level, box), grid.cells.shape[1]
        down = -(-(window[0].stop - window[0].start) // tile_h)
        across = -(-(window[1].stop - window[1].start) * per_cell // tile_w)
        levels, rows, blocks = levels + 1, rows + down, blocks + down * across
        best = max(best, iou_with(anchors[level][window], box).max().item())
    return Search(levels, rows, blocks, best)


def _near(grid: AnchorGrid, level: int, box: Tensor) -> tuple[slice, slice]:
    """Rows and columns of cells that the kernel visits."""
    found = []
    for axis, extent, stride in zip((1, 0), grid.extents[level], grid.strides[level], strict=True):
        low, high = grid.cells[level, :, axis].min(), grid.cells[level, :, axis + 2].max()
        first = torch.floor((box[axis] - high) / stride) - 1
        last = torch.ceil((box[axis + 2] - low) / stride) + 1
        found.append(slice(int(first.clamp(0, extent - 1)), int(last.clamp(0, extent - 1)) + 1))
    return found[0], found[1]


def tile_visits(grid: AnchorGrid, boxes: Tensor, best: Tensor, tile_h: int, tile_w: int, low: float) -> Tensor:
    """How many of an image's `boxes` [n, 4], with their best IoUs [n], each tile of anchors computes IoUs with."""
    hulls = torch.stack([_hull(tile) for tile in _tiles(grid, tile_h, tile_w)])
    left, top, right, bottom, least, most = hulls.T[:, :, None]
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    near = (boxes[:, 0] < right) & (boxes[:, 2] > left) & (boxes[:, 1] < bottom) & (boxes[:, 3] > top)
    bound = torch.minimum(area, most) / torch.maximum(area, least) * SPARE
    matters = torch.where(near, best, float("inf")).amin(1).clamp(max=low)
    return (near & (bound >= matters[:, None])).sum(1)


def _tiles(grid: AnchorGrid, tile_h: int, tile_w: int) -> Iterator[Tensor]:
    """Anchors [rows, columns, 4] of each tile."""
    for level in by_level(grid, grid.anchors()):
        flat = level.flatten(1, 2)
        for rows in flat.split(tile_h):
            yield from rows.split(tile_w, dim=1)


def _hull(tile: Tensor) -> Tensor:
    """The box around a tile's anchors, their least and largest area."""
    low, high = tile[..., :2].amin((0, 1)), tile[..., 2:].amax((0, 1))
    area = (tile[..., 2:] - tile[..., :2]).prod(-1)
    return torch.stack([*low, *high, area.min(), area.max()])


@dataclass(frozen=True)
class NmsWork:
    """What the two kernels of NMS go through."""

    tiles: int  # that do not leave at once
    close: int  # steps in these with a pair too close to the threshold to tell without a division
    rounds: list[int]  # of settling 32 boxes, summed over a group


def nms_work(
    boxes: Tensor, valid: Tensor, screen: tuple[float, float], block_rows: int, block_words: int, step: int
) -> NmsWork:
    """For groups of boxes [G, n, 4] of which `valid` [G, n] count; `screen` are the kernel's share and slack."""
    tiles, close, rounds = 0, 0, []
    for of_group, counts in zip(boxes, valid, strict=True):
        suppresses, doubtful = _pairs(of_group, *screen)
        columns = 32 * block_words
        active = _any_of(counts, block_rows)[:, None] & _any_of(counts, columns)[None]
        ends = (torch.arange(active.shape[1]) + 1) * columns
        active &= ends[None] > (torch.arange(active.shape[0]) * block_rows)[:, None]
        steps = _any_of(_any_of(doubtful, step).T, columns).T  # [rows / step, words / block_words]
        steps = _padded(steps, block_rows // step).view(active.shape[0], -1, active.shape[1])
        tiles += int(active.sum())
        close += int((steps & active[:, None]).sum())
        rounds.append(_rounds(suppresses.triu(1), counts))
    return NmsWork(tiles, close, rounds)


def _pairs(boxes: Tensor, share: float, slack: float) -> tuple[Tensor, Tensor]:
    """Which pairs [n, n] of a group's boxes are above the threshold, and which need a division to tell."""
    x1, y1, x2, y2 = boxes.T.contiguous()
    width = (torch.minimum(x2, x2[:, None]) - torch.maximum(x1, x1[:, None])).clamp_(min=0)
    height = torch.minimum(y2, y2[:, None]) - torch.maximum(y1, y1[:, None])
    intersection, area = width.mul_(height), share * ((x2 - x1) * (y2 - y1))
    enough = area[:, None] + area
    suppresses = intersection > enough
    return suppresses, (intersection > enough.mul_(slack)) ^ suppresses


def _padded(flags: Tensor, block: int) -> Tensor:
    """More rows, False, so that `block` divides their number."""
    missing = -len(flags) % block
    return torch.cat([flags, flags.new_zeros(missing, *flags.shape[1:])]) if missing else flags


def _any_of(flags: Tensor, block: int) -> Tensor:
    """Whether any of each `block` rows is True."""
    return _padded(flags, block).view(-1, block, *flags.shape[1:]).any(1)


def _rounds(suppresses: Tensor, valid: Tensor) -> int:
    """Rounds of `_settle` over all blocks of 32 boxes, the last of each, which changes nothing, included."""
    total, removed = 0, ~valid
    for first in range(0, len(valid), 32):
        here = slice(first, first + 32)
        free, among = ~removed[here], suppresses[here, here]
        kept, before = free, None
        while before is None or not torch.equal(kept, before):
            before, total = kept, total + 1
            kept = free & ~among[kept].any(0)
        removed |= suppresses[here][kept].any(0)
    return total
