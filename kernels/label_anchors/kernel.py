"""Anchor labels without the [A, G] matrix: each GT's best IoU first, then every anchor's label.

Both kernels evaluate the same `_iou`; with fused multiply-adds off its results are bit-equal, which the
low-quality rule ("IoU equals the GT's best") needs.
"""

import triton
import triton.language as tl

from ..device import intersection_over_union, load_boxes


@triton.jit
def _finite(x1, y1, x2, y2):
    INF: tl.constexpr = float("inf")
    return (tl.abs(x1) < INF) & (tl.abs(y1) < INF) & (tl.abs(x2) < INF) & (tl.abs(y2) < INF)


@triton.jit
def _iou(ax1, ay1, ax2, ay2, gx1, gy1, gx2, gy2):
    """IoU with 0/0 as +inf: torchvision's NaN wins every maximum and stays positive, and so does inf."""
    iou = intersection_over_union(gx1, gy1, gx2, gy2, ax1, ay1, ax2, ay2)
    return tl.where(iou != iou, float("inf"), iou)


@triton.jit
def best_iou_of_gt_kernel(
    anchors_ptr,  # [A, 4] fp32
    gt_ptr,  # [B, G, 4] fp32
    count_ptr,  # [B] int32
    partial_ptr,  # [B, G, splits] fp32: best IoU of each GT among one split of the anchors
    num_anchors,
    num_gt,
    anchors_per_split,
    BLOCK_G: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """Finds the best IoU of BLOCK_G boxes of one image among `anchors_per_split` anchors."""
    gt_blocks = tl.cdiv(num_gt, BLOCK_G)
    image = (tl.program_id(0) // gt_blocks).to(tl.int64)
    slot = (tl.program_id(0) % gt_blocks) * BLOCK_G + tl.arange(0, BLOCK_G)
    split = tl.program_id(1)
    count = tl.minimum(tl.load(count_ptr + image), num_gt)
    gx1, gy1, gx2, gy2 = load_boxes(gt_ptr + image * num_gt * 4, slot[:, None], (slot < count)[:, None], tl.float32)
    is_object = _finite(gx1, gy1, gx2, gy2) & (slot < count)[:, None]

    best = tl.full((BLOCK_G, BLOCK_A), -1.0, tl.float32)
    first = split * anchors_per_split
    for start in range(first, tl.minimum(first + anchors_per_split, num_anchors), BLOCK_A):
        anchor = start + tl.arange(0, BLOCK_A)[None, :]
        inside = anchor < num_anchors
        ax1, ay1, ax2, ay2 = load_boxes(anchors_ptr, anchor, inside, tl.float32)
        iou = _iou(ax1, ay1, ax2, ay2, gx1, gy1, gx2, gy2)
        best = tl.maximum(best, tl.where(inside & is_object, iou, -1.0))
    out = (image * num_gt + slot) * tl.num_programs(1) + split
    tl.store(partial_ptr + out, tl.max(best, 1), slot < num_gt)


@triton.jit
def label_anchors_kernel(
    anchors_ptr,  # [A, 4] fp32
    gt_ptr,  # [B, G, 4] fp32
    count_ptr,  # [B] int32
    best_of_gt_ptr,  # [B, G] fp32
    labels_ptr,  # [B, A] int8
    matched_ptr,  # [B, A] int32
    num_anchors,
    num_gt,
    high_threshold,
    low_threshold,
    LOW_QUALITY: tl.constexpr,
    LOW_INCLUSIVE: tl.constexpr,
    REQUIRE_OVERLAP: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """Labels BLOCK_A anchors of one image, holding their best GT in registers while the GTs go by."""
    anchor = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    image = tl.program_id(1).to(tl.int64)
    inside = anchor < num_anchors
    ax1, ay1, ax2, ay2 = load_boxes(anchors_ptr, anchor, inside, tl.float32)

    best = tl.full((BLOCK_A,), -1.0, tl.float32)
    matched = tl.zeros((BLOCK_A,), tl.int32)
    claimed = tl.zeros((BLOCK_A,), tl.int32)
    count = tl.minimum(tl.load(count_ptr + image), num_gt)
    for g in range(count):
        gt = gt_ptr + (image * num_gt + g) * 4
        gx1, gy1, gx2, gy2 = tl.load(gt), tl.load(gt + 1), tl.load(gt + 2), tl.load(gt + 3)
        iou = _iou(ax1, ay1, ax2, ay2, gx1, gy1, gx2, gy2)
        # No object: below every threshold, and below the -1 that stands for it in best_of_gt.
        iou = tl.where(_finite(gx1, gy1, gx2, gy2), iou, -2.0)
        better = iou > best  # strict: a tie keeps the first GT
        best = tl.where(better, iou, best)
        matched = tl.where(better, g, matched)
        if LOW_QUALITY:
            best_of_gt = tl.load(best_of_gt_ptr + image * num_gt + g)
            if REQUIRE_OVERLAP:
                best_of_gt = tl.where(best_of_gt > 0, best_of_gt, -1.0)  # no IoU is -1: claims nothing
            claimed |= (iou == best_of_gt).to(tl.int32)

    above_low = (best > low_threshold) if LOW_INCLUSIVE else (best >= low_threshold)
    labels = tl.where(best >= high_threshold, 1, tl.where(above_low, -1, 0))
    labels = tl.where(claimed != 0, 1, labels)
    out = image * num_anchors + anchor
    tl.store(labels_ptr + out, labels.to(tl.int8), inside)
    tl.store(matched_ptr + out, matched, inside)
