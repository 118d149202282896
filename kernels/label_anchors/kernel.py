"""Anchor labels without the [A, G] matrix: a tile of anchors at a time, with the GTs that reach it.

On a feature pyramid nearly all GTs lie apart from a given tile, and most of the others are so much larger or smaller
than its anchors that their IoUs decide nothing: these cost a comparison of boxes, not IoUs.
"""

import triton
import triton.language as tl

from ..device import load_boxes
from .kernel_tiles import INF, find_objects, hull_of, iou_or_inf, load_grid_tile, load_gt


@triton.jit(do_not_specialize=["num_gt"])  # it changes from batch to batch
def label_anchors_kernel(
    anchors_ptr,  # [A, 4] fp32, given; an image's own begin anchors_stride later. Or a grid's cells, [L, k, 4]
    gt_ptr,  # [B, G, 4] fp32
    count_ptr,  # [B] int32
    best_ptr,  # [B, G] fp32
    labels_ptr,  # [B, A] int8
    matched_ptr,  # [B, A] int32
    anchors_stride,
    num_anchors,
    num_gt,
    heights,  # tuples of L fp32, of a grid
    widths,
    strides_y,
    strides_x,
    high_threshold,
    low_threshold,
    LOW_QUALITY: tl.constexpr,
    LOW_INCLUSIVE: tl.constexpr,
    REQUIRE_OVERLAP: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PER_CELL: tl.constexpr,
):
    """Labels one tile of anchors of one image, holding their best GT in registers while the GTs go by.

    PER_CELL: a grid's anchors a cell; 0 where the anchors are given.
    """
    image = tl.program_id(1).to(tl.int64)
    if PER_CELL > 0:
        ax1, ay1, ax2, ay2, place, exists = load_grid_tile(
            tl.program_id(0), anchors_ptr, heights, widths, strides_y, strides_x, PER_CELL, TILE_H, TILE_W
        )
    else:
        place = tl.program_id(0) * TILE_H * TILE_W + tl.arange(0, TILE_H * TILE_W)
        exists = place < num_anchors
        ax1, ay1, ax2, ay2 = load_boxes(anchors_ptr + image * anchors_stride, place, exists, tl.float32)
    left, top, right, bottom, least, most = hull_of(ax1, ay1, ax2, ay2, exists)
    gt_ptr += image * num_gt * 4
    best_ptr += image * num_gt
    count = tl.minimum(tl.load(count_ptr + image), num_gt)

    first_object = num_gt + tl.zeros((), tl.int32)
    claims_all = tl.zeros((), tl.int32)  # an object whose best IoU is 0 claims whatever lies apart from it
    matters = low_threshold + tl.zeros((), tl.float32)  # no IoU below this decides a label, or a positive's match
    for first in range(0, count, BLOCK_G):
        slot = first + tl.arange(0, BLOCK_G)
        is_object, near, bound = find_objects(gt_ptr, slot, count, left, top, right, bottom, least, most)
        first_object = tl.minimum(first_object, tl.min(tl.where(is_object, slot, num_gt)))
        if LOW_QUALITY:
            best_of_gt = tl.load(best_ptr + slot, slot < count, 1.0)
            claims = is_object & (near | (best_of_gt == 0))
            if REQUIRE_OVERLAP:
                claims = claims & (best_of_gt > 0)
            matters = tl.minimum(matters, tl.min(tl.where(claims, best_of_gt, INF)))
            claims_all |= tl.max((claims & ~near).to(tl.int32))

    best = tl.zeros((TILE_H * TILE_W,), tl.float32)
    matched = tl.zeros((TILE_H * TILE_W,), tl.int32)
    claimed = tl.zeros((TILE_H * TILE_W,), tl.int32)
    for first in range(0, count, BLOCK_G):
        slot = first + tl.arange(0, BLOCK_G)
        is_object, near, bound = find_objects(gt_ptr, slot, count, left, top, right, bottom, least, most)
        near = near & ~(bound < matters)
        g = tl.min(tl.where(near, slot, num_gt))
        while g < num_gt:
            gx1, gy1, gx2, gy2 = load_gt(gt_ptr, g)
            iou = iou_or_inf(ax1, ay1, ax2, ay2, gx1, gy1, gx2, gy2)
            better = iou > best  # strict: a tie keeps the first GT
            best = tl.where(better, iou, best)
            matched = tl.where(better, g, matched)
            if LOW_QUALITY:
                own_best = tl.load(best_ptr + g)
                if REQUIRE_OVERLAP:
                    own_best = tl.where(own_best > 0, own_best, -1.0)  # no IoU is -1: claims nothing
                claimed |= (iou == own_best).to(tl.int32)
            g = tl.min(tl.where(near & (slot > g), slot, num_gt))

    some = first_object < num_gt
    best = tl.where(some, best, -1.0)
    above_low = (best > low_threshold) if LOW_INCLUSIVE else (best >= low_threshold)
    labels = tl.where(best >= high_threshold, 1, tl.where(above_low, -1, 0))
    labels = tl.where((claimed | claims_all) != 0, 1, labels)
    matched = tl.where(best > 0, matched, first_object)  # where all IoUs are 0 the first wins
    matched = tl.where(labels == 1, matched, 0)
    out = image * num_anchors + place
    tl.store(labels_ptr + out, labels.to(tl.int8), exists)
    tl.store(matched_ptr + out, matched, exists)
