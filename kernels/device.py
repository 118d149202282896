"""Triton device functions that several kernels share."""

import triton
import triton.language as tl


@triton.jit
def divide(a, b):
    """IEEE division: `/` on fp32 compiles to an approximation (div.full.f32) that can move a label or a bin.

    `tl.div_rn` rejects fp64, where `/` is exact already.
    """
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def divide_areas(part, whole):
    """`divide` for a `part` of an area that is often 0: the same quotients, but that 0 / -1 is 0 and not -0.

    NVIDIA's division takes a short path where an instruction (FCHK) finds both numbers harmless, and calls a subroutine
    for a warp with a lane where it does not. A dividend of 0 is thought to be such a lane: neither documented nor
    measured yet. Most pairs of boxes are disjoint, so -whole is divided there, and what is below 0 becomes 0: no other
    quotient is, since a part above 0 has a whole above 0. (Selecting by `part == 0` after the division would keep a
    predicate a pair alive across it, and a thread has seven: two more instructions a pair.)
    """
    zero = part == whole * 0.0  # part == 0, but that inf * 0 is NaN: inf / inf would be, as 0 / 0 and NaN / NaN are
    quotient = divide(tl.where(zero, -whole, part), whole)
    return tl.maximum(quotient, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def intersection_and_union(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2):
    """Both areas of xyxy boxes, in torchvision.ops.box_iou's order of operations."""
    width = tl.maximum(tl.minimum(ax2, bx2) - tl.maximum(ax1, bx1), 0.0)
    height = tl.maximum(tl.minimum(ay2, by2) - tl.maximum(ay1, by1), 0.0)
    intersection = width * height
    return intersection, (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - intersection


@triton.jit
def intersection_over_union(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2):
    """IoU of xyxy boxes in torchvision.ops.box_iou's order of operations; 0/0 is NaN.

    Bit-equal to it when launched with `enable_fp_fusion=False`: a fused multiply-add rounds once instead of
    twice, and the low-quality rule of anchor matching compares IoUs for equality.
    """
    intersection, union = intersection_and_union(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2)
    return divide_areas(intersection, union)


@triton.jit
def load_boxes(boxes_ptr, index, mask, DTYPE: tl.constexpr):
    """The four coordinates of boxes [*, 4] at `index`, widened to DTYPE; 0 where masked."""
    x1 = tl.load(boxes_ptr + index * 4, mask, 0.0).to(DTYPE)
    y1 = tl.load(boxes_ptr + index * 4 + 1, mask, 0.0).to(DTYPE)
    x2 = tl.load(boxes_ptr + index * 4 + 2, mask, 0.0).to(DTYPE)
    y2 = tl.load(boxes_ptr + index * 4 + 3, mask, 0.0).to(DTYPE)
    return x1, y1, x2, y2
