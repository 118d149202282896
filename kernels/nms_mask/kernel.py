"""Greedy NMS without the [n, n] matrix: one program a group, its boxes in registers, one step a box."""

import triton
import triton.language as tl

from ..device import intersection_over_union, load_boxes


@triton.jit
def nms_mask_kernel(
    boxes_ptr,  # [G, n, 4] fp32, best first
    valid_ptr,  # [G, n] uint8, 0 or 1
    keep_ptr,  # [G, n] uint8
    n,
    threshold,  # a number that fp32 holds
    BLOCK: tl.constexpr,
):
    """Settles one group's boxes from the best to the worst: each that is still kept clears those it overlaps.

    The group's n boxes, BLOCK >= n, stay in registers from beginning to end. A step reads one box again, as scalars
    (its address does not depend on the steps before), and one flag out of the registers, which does.
    """
    group = tl.program_id(0).to(tl.int64)
    boxes_ptr += group * n * 4
    index = tl.arange(0, BLOCK)
    x1, y1, x2, y2 = load_boxes(boxes_ptr, index, index < n, tl.float32)
    keep = tl.load(valid_ptr + group * n + index, index < n, 0).to(tl.int32)

    for i in range(n):
        box = boxes_ptr + i * 4
        bx1, by1, bx2, by2 = tl.load(box), tl.load(box + 1), tl.load(box + 2), tl.load(box + 3)
        if tl.sum(tl.where(index == i, keep, 0)) != 0:
            iou = intersection_over_union(bx1, by1, bx2, by2, x1, y1, x2, y2)
            keep = tl.where((index > i) & (iou > threshold), 0, keep)  # false for NaN
    tl.store(keep_ptr + group * n + index, keep.to(tl.uint8), index < n)
