"""Each GT's best IoU with any anchor, which the low-quality rule compares with: of a grid, and of given anchors."""

import triton
import triton.language as tl

from ..device import divide, load_boxes
from .kernel_tiles import INF, find_objects, hull_of, iou_or_inf, is_finite, load_grid_anchors, load_gt


@triton.jit
def _near(low, high, cells_low, cells_high, stride, number):
    """The first and last of `number` cells along an axis whose anchors can reach the interval (low, high)."""
    safe = tl.where(stride > 0, stride, 1.0)
    first = tl.floor(divide(low - cells_high, safe)) - 1
    last = tl.ceil(divide(high - cells_low, safe)) + 1
    known = (stride > 0) & (cells_high < INF) & (cells_low > -INF)
    end = (number - 1).to(tl.float32)  # -1 on a level without cells
    first = tl.where(known, tl.maximum(tl.minimum(first, end), 0.0), 0.0)
    last = tl.where(known, tl.minimum(tl.maximum(last, 0.0), end), end)
    return first.to(tl.int32), last.to(tl.int32)


@triton.jit
def _pick(numbers, level):
    """The entry of a tuple that a number on the device says."""
    picked = level * 0.0
    for i in tl.static_range(len(numbers)):
        picked = tl.where(level == i, level * 0 + numbers[i], picked)
    return picked


@triton.jit
def _bound(x1, y1, x2, y2, gt_area, heights, widths, strides_y, strides_x):
    """What no IoU of a GT with the anchors made of these cells exceeds: the smaller area over the larger.

    Moved to its place an anchor is rounded: each side by less than `slack`. Infinite where an anchor or the GT may lack
    a positive, finite area and the IoU may be 0/0.
    """
    largest = tl.max(tl.maximum(tl.maximum(tl.abs(x1), tl.abs(x2)), tl.maximum(tl.abs(y1), tl.abs(y2))))
    for i in tl.static_range(len(heights)):
        largest = tl.maximum(largest, tl.maximum(largest * 0 + heights[i] * strides_y[i], widths[i] * strides_x[i]))
    slack = largest * 4.8e-7  # two units in the last place of twice the largest coordinate
    least = tl.maximum(x2 - x1 - slack, 0.0) * tl.maximum(y2 - y1 - slack, 0.0)
    most = (x2 - x1 + slack) * (y2 - y1 + slack)
    gt_area += tl.zeros_like(least)
    proper = (least > 0) & (most < INF) & (gt_area >= 0) & (gt_area < INF)
    ratio = divide(tl.minimum(most, gt_area), tl.where(proper, tl.maximum(least, gt_area), 1.0))
    return tl.where(proper, ratio * 1.0001, INF)


@triton.jit(do_not_specialize=["num_gt"])
def best_iou_with_grid_kernel(
    cells_ptr,  # [L, k, 4] fp32
    gt_ptr,  # [B, G, 4] fp32
    count_ptr,  # [B] int32
    best_ptr,  # [B, G] fp32
    num_gt,
    heights,  # tuples of L fp32
    widths,
    strides_y,
    strides_x,
    PER_CELL: tl.constexpr,
    CELLS: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
):
    """Finds the best IoU of one GT among the anchors of a grid, where it can be: near the GT, on levels of its size.

    Levels come in the order of the best IoU that the sizes of their anchors allow; the first that does not allow what
    was found already ends the search.
    """
    image = tl.program_id(1).to(tl.int64)
    g = tl.program_id(0)
    gt_ptr += image * num_gt * 4
    gx1, gy1, gx2, gy2 = load_gt(gt_ptr, g)
    best = 0.0
    if (g < tl.load(count_ptr + image)) & is_finite(gx1, gy1, gx2, gy2):
        cell = tl.arange(0, CELLS)
        level_of = cell // PER_CELL
        is_cell = cell < len(heights) * PER_CELL
        cx1, cy1, cx2, cy2 = load_boxes(cells_ptr, cell, is_cell, tl.float32)
        bound = _bound(cx1, cy1, cx2, cy2, (gx2 - gx1) * (gy2 - gy1), heights, widths, strides_y, strides_x)
        bound = tl.where(is_cell, bound, -1.0)
        most = tl.max(bound)
        while most >= best:
            level = tl.min(tl.where(bound == most, level_of, CELLS))
            here = is_cell & (level_of == level)
            # The box around the level's cells, infinite where a bound is: then all anchors are visited.
            spoilt = tl.where(most == INF, INF, 0.0)
            left, right = tl.min(tl.where(here, cx1, INF)) - spoilt, tl.max(tl.where(here, cx2, -INF)) + spoilt
            top, bottom = tl.min(tl.where(here, cy1, INF)) - spoilt, tl.max(tl.where(here, cy2, -INF)) + spoilt
            rows, across = _pick(heights, level).to(tl.int32), _pick(widths, level).to(tl.int32)
            stride_y, stride_x = _pick(strides_y, level), _pick(strides_x, level)
            y_first, y_last = _near(gy1, gy2, top, bottom, stride_y, rows)
            x_first, x_last = _near(gx1, gx2, left, right, stride_x, across)

            ious = tl.zeros((TILE_H * TILE_W,), tl.float32)
            lane = tl.arange(0, TILE_H * TILE_W)
            for first_row in range(y_first, y_last + 1, TILE_H):
                for first_column in range(x_first * PER_CELL, (x_last + 1) * PER_CELL, TILE_W):
                    y = first_row + lane // TILE_W
                    column = first_column + lane % TILE_W
                    exists = (y < rows) & (column < across * PER_CELL)
                    ax1, ay1, ax2, ay2 = load_grid_anchors(
                        cells_ptr, level, y, column, exists, stride_y, stride_x, PER_CELL
                    )
                    iou = iou_or_inf(ax1, ay1, ax2, ay2, gx1, gy1, gx2, gy2)
                    ious = tl.maximum(ious, tl.where(exists, iou, 0.0))
            best = tl.maximum(best, tl.max(ious))
            bound = tl.where(here, -1.0, bound)
            most = tl.max(bound)
    tl.store(best_ptr + image * num_gt + g, best)


@triton.jit(do_not_specialize=["num_gt"])
def best_iou_with_anchors_kernel(
    anchors_ptr,  # [A, 4] fp32; an image's own begin anchors_stride later
    gt_ptr,  # [B, G, 4] fp32
    count_ptr,  # [B] int32
    best_ptr,  # [B, G] int32, 0 before: the best IoU of each GT as the bits of its fp32
    anchors_stride,
    num_anchors,
    num_gt,
    TILE_W: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Raises the best IoUs of one image's GTs to those with TILE_W anchors.

    The order does not matter to a maximum: the result is the same in every run. IoUs are not negative (and never -0.0,
    see `divide_areas`), so they have the order of their bits, and the atomic is one on whole numbers, which every GPU
    has.
    """
    image = tl.program_id(1).to(tl.int64)
    anchor = tl.program_id(0) * TILE_W + tl.arange(0, TILE_W)
    exists = anchor < num_anchors
    ax1, ay1, ax2, ay2 = load_boxes(anchors_ptr + image * anchors_stride, anchor, exists, tl.float32)
    left, top, right, bottom, least, most = hull_of(ax1, ay1, ax2, ay2, exists)
    gt_ptr += image * num_gt * 4
    count = tl.minimum(tl.load(count_ptr + image), num_gt)
    for first in range(0, count, BLOCK_G):
        slot = first + tl.arange(0, BLOCK_G)
        _, near, _ = find_objects(gt_ptr, slot, count, left, top, right, bottom, least, most)
        g = tl.min(tl.where(near, slot, num_gt))
        while g < num_gt:
            gx1, gy1, gx2, gy2 = load_gt(gt_ptr, g)
            iou = iou_or_inf(ax1, ay1, ax2, ay2, gx1, gy1, gx2, gy2)
            best = tl.max(tl.where(exists, iou, 0.0))
            tl.atomic_max(best_ptr + image * num_gt + g, best.to(tl.int32, bitcast=True), sem="relaxed")
            g = tl.min(tl.where(near & (slot > g), slot, num_gt))
