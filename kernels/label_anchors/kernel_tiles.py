"""Which anchors a tile holds, and which GTs it has to look at: what the kernels of anchor labelling share.

All of them evaluate the same `iou_or_inf`; with fused multiply-adds off its results are bit-equal, which the
low-quality rule ("IoU equals the GT's best") needs.
"""

import triton
import triton.language as tl

from ..device import divide, intersection_over_union, load_boxes

INF = tl.constexpr(float("inf"))


@triton.jit
def iou_or_inf(ax1, ay1, ax2, ay2, gx1, gy1, gx2, gy2):
    """IoU with 0/0 as +inf: torchvision's NaN wins every maximum and stays positive, and so does inf."""
    iou = intersection_over_union(gx1, gy1, gx2, gy2, ax1, ay1, ax2, ay2)
    return tl.where(iou != iou, INF, iou)


@triton.jit
def load_gt(gt_ptr, g):
    """The four coordinates of one box, scalars."""
    gt_ptr += g * 4
    return tl.load(gt_ptr), tl.load(gt_ptr + 1), tl.load(gt_ptr + 2), tl.load(gt_ptr + 3)


@triton.jit
def is_finite(x1, y1, x2, y2):
    """Whether a GT is an object at all."""
    return (tl.abs(x1) < INF) & (tl.abs(y1) < INF) & (tl.abs(x2) < INF) & (tl.abs(y2) < INF)


@triton.jit
def load_grid_anchors(cells_ptr, level, y, column, exists, stride_y, stride_x, PER_CELL: tl.constexpr):
    """x1, y1, x2, y2 of a level's anchors in rows `y` of cells and `column`s (x, a) of anchors."""
    x1, y1, x2, y2 = load_boxes(cells_ptr, level * PER_CELL + column % PER_CELL, exists, tl.float32)
    shift_x = (column // PER_CELL).to(tl.float32) * stride_x
    shift_y = y.to(tl.float32) * stride_y
    return x1 + shift_x, y1 + shift_y, x2 + shift_x, y2 + shift_y


@triton.jit
def load_grid_tile(
    tile,
    cells_ptr,
    heights,
    widths,
    strides_y,
    strides_x,
    PER_CELL: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
):
    """The anchors of a tile, [TILE_H * TILE_W]: x1, y1, x2, y2, places among an image's anchors, which of them exist.

    A tile is TILE_H rows of cells by TILE_W columns of anchors. Levels come one after another.
    """
    tiles = tile * 0  # before the level at hand, and anchors before it
    anchors = tiles
    level, first_tile, first_anchor, rows, columns = tiles, tiles, tiles, tiles, tiles
    stride_y, stride_x = tiles * 1.0, tiles * 1.0
    for i in tl.static_range(len(heights)):
        level_rows = (tile * 0 + heights[i]).to(tl.int32)
        level_columns = (tile * 0 + widths[i]).to(tl.int32) * PER_CELL
        if tile >= tiles:
            level = tile * 0 + i
            first_tile, first_anchor = tiles, anchors
            rows, columns = level_rows, level_columns
            stride_y, stride_x = tile * 0 + strides_y[i], tile * 0 + strides_x[i]
        tiles += tl.cdiv(level_rows, TILE_H) * tl.cdiv(level_columns, TILE_W)
        anchors += level_rows * level_columns

    lane = tl.arange(0, TILE_H * TILE_W)
    across = tl.cdiv(columns, TILE_W)
    y = (tile - first_tile) // across * TILE_H + lane // TILE_W
    column = (tile - first_tile) % across * TILE_W + lane % TILE_W
    exists = (y < rows) & (column < columns)
    x1, y1, x2, y2 = load_grid_anchors(cells_ptr, level, y, column, exists, stride_y, stride_x, PER_CELL)
    return x1, y1, x2, y2, first_anchor + y * columns + column, exists


@triton.jit
def hull_of(x1, y1, x2, y2, exists):
    """What a tile's anchors have in common: the box around them, their least and largest area.

    Box and largest area are infinite where an anchor has no positive, finite area: its IoU with a box far away may be
    0/0.
    """
    area = (x2 - x1) * (y2 - y1)
    spoils = exists & ~((x2 > x1) & (y2 > y1) & (area > 0) & (area < INF))
    spoilt = tl.where(tl.max(spoils.to(tl.int32)) != 0, INF, 0.0)
    left = tl.min(tl.where(exists, x1, INF)) - spoilt
    top = tl.min(tl.where(exists, y1, INF)) - spoilt
    right = tl.max(tl.where(exists, x2, -INF)) + spoilt
    bottom = tl.max(tl.where(exists, y2, -INF)) + spoilt
    return left, top, right, bottom, tl.min(tl.where(exists, area, INF)), tl.max(tl.where(exists, area, 0.0)) + spoilt


@triton.jit
def find_objects(gt_ptr, slot, count, left, top, right, bottom, least, most):
    """Which slots hold an object, which of those may have an IoU other than 0 with the tile's anchors, and how large.

    No IoU is above the ratio of the two areas, the smaller over the larger, but for its rounding.
    """
    x1, y1, x2, y2 = load_boxes(gt_ptr, slot, slot < count, tl.float32)
    is_object = (slot < count) & is_finite(x1, y1, x2, y2)
    area = (x2 - x1) * (y2 - y1)
    # The union of two areas, one of them positive, is 0 or NaN only where the other is negative or not finite.
    proper = (area >= 0) & (area < INF)
    apart = (x1 >= right) | (x2 <= left) | (y1 >= bottom) | (y2 <= top)
    ratio = divide(tl.minimum(area, most), tl.maximum(area, least))  # 0/0, that of a spoilt tile, is below nothing
    bound = tl.where(proper & (area * 0 + most < INF), ratio * 1.0001, INF)
    return is_object, is_object & ~(apart & proper), bound
