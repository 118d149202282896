"""The IoU matrix and its gradient as Triton kernels."""

import triton
import triton.language as tl

from ..device import divide, intersection_over_union, load_boxes


@triton.jit
def box_iou_kernel(
    boxes1_ptr,  # [B, N, 4]
    boxes2_ptr,  # [B, M, 4]
    iou_ptr,  # [B, N, M] fp32 (fp64 for fp64 boxes)
    n,
    m,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Computes one [BLOCK_N, BLOCK_M] tile of one batch entry's matrix."""
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles = tl.cdiv(n, BLOCK_N) * tiles_m
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    row = (tile // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = (tile % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    dtype: tl.constexpr = iou_ptr.dtype.element_ty

    ax1, ay1, ax2, ay2 = load_boxes(boxes1_ptr + batch * n * 4, row[:, None], (row < n)[:, None], dtype)
    bx1, by1, bx2, by2 = load_boxes(boxes2_ptr + batch * m * 4, column[None, :], (column < m)[None, :], dtype)
    iou = intersection_over_union(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2)
    offset = (batch * n + row.to(tl.int64))[:, None] * m + column[None, :]
    tl.store(iou_ptr + offset, iou, (row < n)[:, None] & (column < m)[None, :])


@triton.jit
def _share(mine, other, SIGN: tl.constexpr):
    """Derivative of max(mine, other) (SIGN 1) or min (SIGN -1) by `mine`: PyTorch halves it at a tie."""
    difference = (mine - other) * SIGN
    return tl.where(difference > 0, 1.0, tl.where(difference == 0, 0.5, 0.0)).to(mine.dtype)


@triton.jit
def box_iou_backward_kernel(
    boxes1_ptr,  # [B, N, 4]
    boxes2_ptr,  # [B, M, 4]
    grad_iou_ptr,  # [B, N, M] with the strides below: transposed, the same kernel serves boxes2
    grad1_ptr,  # [B, N, 4]
    n,
    m,
    stride_b,
    stride_n,
    stride_m,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Sums the gradient of BLOCK_N boxes over all M partners, in order: no atomics, bitwise reproducible."""
    tiles = tl.cdiv(n, BLOCK_N)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype: tl.constexpr = grad_iou_ptr.dtype.element_ty
    ax1, ay1, ax2, ay2 = load_boxes(boxes1_ptr + batch * n * 4, row[:, None], (row < n)[:, None], dtype)
    dx1 = tl.zeros((BLOCK_N,), dtype)
    dy1 = tl.zeros((BLOCK_N,), dtype)
    dx2 = tl.zeros((BLOCK_N,), dtype)
    dy2 = tl.zeros((BLOCK_N,), dtype)
    for first in range(0, m, BLOCK_M):
        column = first + tl.arange(0, BLOCK_M)
        mask = (row < n)[:, None] & (column < m)[None, :]
        bx1, by1, bx2, by2 = load_boxes(boxes2_ptr + batch * m * 4, column[None, :], (column < m)[None, :], dtype)
        grad_at = batch * stride_b + row.to(tl.int64)[:, None] * stride_n + column.to(tl.int64)[None, :] * stride_m
        grad = tl.load(grad_iou_ptr + grad_at, mask, 0.0)

        width = tl.minimum(ax2, bx2) - tl.maximum(ax1, bx1)
        height = tl.minimum(ay2, by2) - tl.maximum(ay1, by1)
        inside_w = tl.maximum(width, 0.0)
        inside_h = tl.maximum(height, 0.0)
        intersection = inside_w * inside_h
        union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - intersection
        # iou = I / U with U = A + B - I: d iou = dI (1 + iou) / U - dA iou / U
        by_union = divide(tl.where(mask, grad, 0.0), tl.where(mask, union, 1.0))
        iou = divide(intersection, tl.where(mask, union, 1.0))
        by_intersection = by_union * (1.0 + iou)
        by_area = -by_union * iou
        by_width = tl.where(width > 0, by_intersection * inside_h, 0.0)
        by_height = tl.where(height > 0, by_intersection * inside_w, 0.0)
        dx1 += tl.sum(-by_width * _share(ax1, bx1, 1) - by_area * (ay2 - ay1), 1)
        dx2 += tl.sum(by_width * _share(ax2, bx2, -1) + by_area * (ay2 - ay1), 1)
        dy1 += tl.sum(-by_height * _share(ay1, by1, 1) - by_area * (ax2 - ax1), 1)
        dy2 += tl.sum(by_height * _share(ay2, by2, -1) + by_area * (ax2 - ax1), 1)
    out = grad1_ptr + (batch * n + row) * 4
    tl.store(out, dx1.to(grad1_ptr.dtype.element_ty), row < n)
    tl.store(out + 1, dy1.to(grad1_ptr.dtype.element_ty), row < n)
    tl.store(out + 2, dx2.to(grad1_ptr.dtype.element_ty), row < n)
    tl.store(out + 3, dy2.to(grad1_ptr.dtype.element_ty), row < n)
