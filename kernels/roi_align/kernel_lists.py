"""Which RoIs touch which tile of cells: lists for the gather of `kernel_matrix`.

RoIs are grouped by (level, image), then every tile lists those of its group that touch it, in ascending order. Prefix
sums do it, without atomics and without sorting, so that a cell's sum has one order in every run. A list has room for
all RoIs of its group: none can overflow, however RoIs cluster.
"""

import triton
import triton.language as tl

from .kernel_geometry import TABLE_COLUMNS


@triton.jit
def group_rois_kernel(
    table_ptr,  # [K, 16]
    starts_ptr,  # [L * B + 1] int32: where each group's RoIs begin in `order`
    order_ptr,  # [K] int32: RoIs group by group, in ascending order within a group
    number,  # K
    batch_size,
    BLOCK: tl.constexpr,
):
    """Writes the RoIs of one (level, image)."""
    group = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    before = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, number, BLOCK):
        before += (_group_of(table_ptr, first + lane, number, batch_size) < group).to(tl.int32)
    position = tl.sum(before)
    tl.store(starts_ptr + group, position)
    for first in range(0, number, BLOCK):
        here = (_group_of(table_ptr, first + lane, number, batch_size) == group).to(tl.int32)
        tl.store(order_ptr + position + tl.cumsum(here) - 1, first + lane, here != 0)
        position += tl.sum(here)
    if group == tl.num_programs(0) - 1:
        tl.store(starts_ptr + group + 1, position)


@triton.jit
def _group_of(table_ptr, roi, number, batch_size):
    """level * B + image of each RoI; a RoI that touches no cell, and one beyond the last, are in no group."""
    mask = roi < number
    row_ptr = table_ptr + roi.to(tl.int64) * TABLE_COLUMNS
    level = tl.load(row_ptr + 8, mask, 0).to(tl.int32)
    image = tl.load(row_ptr + 9, mask, 0).to(tl.int32)
    touches = tl.load(row_ptr + 13, mask, -1) >= 0
    return tl.where(touches, level * batch_size + image, 0x7FFFFFFF)


@triton.jit
def tile_of(tile, batch_size, heights, widths, LEVELS: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Which cells a tile holds: (level, image, its number in the image's map, its first y, x).

    The coarsest level comes first: its tiles have the longest lists, and a long one started last would be waited for.
    """
    level = 0
    first = 0
    end = 0
    for i in tl.static_range(LEVELS - 1, -1, -1):
        if tile >= end:
            level = i
            first = end
        end += batch_size * tl.cdiv(heights[i], TILE_H) * tl.cdiv(widths[i], TILE_W)
    tiles = tl.cdiv(heights[0], TILE_H) * tl.cdiv(widths[0], TILE_W)
    across = tl.cdiv(widths[0], TILE_W)
    for i in tl.static_range(1, LEVELS):
        if level == i:
            tiles = tl.cdiv(heights[i], TILE_H) * tl.cdiv(widths[i], TILE_W)
            across = tl.cdiv(widths[i], TILE_W)
    inside = (tile - first) % tiles
    return level, (tile - first) // tiles, inside, inside // across * TILE_H, inside % across * TILE_W


@triton.jit
def list_rois_kernel(
    table_ptr,  # [K, 16]
    starts_ptr,  # [L * B + 1]
    order_ptr,  # [K]
    lists_ptr,  # [K * tiles of the largest map] int32: the list of tile t of a group g begins at
    #             starts[g] * tiles of the largest map + t * RoIs of g
    lengths_ptr,  # [tiles] int32
    batch_size,
    heights,  # tuple of L
    widths,  # tuple of L
    most_tiles,  # of the largest map
    LEVELS: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the list of one tile: the RoIs of its group that may touch it."""
    tile = tl.program_id(0)
    level, image, t, y, x = tile_of(tile, batch_size, heights, widths, LEVELS, TILE_H, TILE_W)
    start = tl.load(starts_ptr + level * batch_size + image)
    number = tl.load(starts_ptr + level * batch_size + image + 1) - start
    list_ptr = lists_ptr + start.to(tl.int64) * most_tiles + t.to(tl.int64) * number
    length = 0
    for first in range(0, number, BLOCK):
        lane = first + tl.arange(0, BLOCK)
        mask = lane < number
        roi = tl.load(order_ptr + start + lane, mask, 0)
        row_ptr = table_ptr + roi.to(tl.int64) * TABLE_COLUMNS
        touches = mask & (tl.load(row_ptr + 12, mask, 0) < y + TILE_H) & (tl.load(row_ptr + 13, mask, 0) >= y)
        touches = touches & (tl.load(row_ptr + 14, mask, 0) < x + TILE_W) & (tl.load(row_ptr + 15, mask, 0) >= x)
        hit = touches.to(tl.int32)
        tl.store(list_ptr + length + tl.cumsum(hit) - 1, roi, touches)
        length += tl.sum(hit)
    tl.store(lengths_ptr + tile, length)
