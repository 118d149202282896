"""The matrix of IoUs or of generalised IoUs and its gradient as Triton kernels."""

import triton
import triton.language as tl

from ..device import divide, divide_areas, intersection_and_union, load_boxes


@triton.jit
def box_iou_kernel(
    boxes1_ptr,  # [B, N, 4]
    boxes2_ptr,  # [B, M, 4]
    iou_ptr,  # [B, N, M] fp32 (fp64 for fp64 boxes)
    n,
    m,
    chunks,  # of BLOCK_M columns, a program
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    NARROW: tl.constexpr,
    VECTOR: tl.constexpr,  # divides m: so many numbers a thread may store at once
    BATCHED: tl.constexpr,
    GENERALIZED: tl.constexpr,
):
    """Computes 2 * BLOCK_N rows by chunks * BLOCK_M columns: the rows' boxes stay in registers, the columns go by.

    What all chunks share (the rows' loads, areas and 64-bit addresses) is so paid for once, and no lane idles in more
    than one narrow chunk. Two slabs of BLOCK_N rows share a chunk's boxes; one of twice the rows has as many rows as
    threads, and Triton then gives each thread a row and sends every result through shared memory.
    """
    m = m // VECTOR * VECTOR  # the same number, which Triton now knows to be divisible
    tile = tl.program_id(0)
    if BATCHED:
        tiles = tl.cdiv(n, 2 * BLOCK_N)
        batch = (tile // tiles).to(tl.int64)
        tile = tile % tiles
        boxes1_ptr += batch * n * 4
        boxes2_ptr += batch * m * 4
        iou_ptr += batch * n * m
    rows1 = _rows(boxes1_ptr, iou_ptr, tile * (2 * BLOCK_N), n, m, BLOCK_N)
    rows2 = _rows(boxes1_ptr, iou_ptr, tile * (2 * BLOCK_N) + BLOCK_N, n, m, BLOCK_N)
    span = chunks * BLOCK_M
    first = tl.program_id(1).to(tl.int64) * span
    last = tl.minimum(first + span, m)
    narrow = first + (last - first) // BLOCK_M * BLOCK_M
    for column in range(first, narrow, BLOCK_M):
        _chunk(rows1, rows2, boxes2_ptr, column, m, BLOCK_M, False, GENERALIZED)
    for column in range(narrow, last, NARROW):
        _chunk(rows1, rows2, boxes2_ptr, column, m, NARROW, True, GENERALIZED)


@triton.jit
def _rows(boxes1_ptr, iou_ptr, first, n, m, BLOCK_N: tl.constexpr):
    """BLOCK_N boxes as a column, and where their rows of the matrix begin.

    Those beyond the last are the last again: the same numbers are written twice, and no row needs a mask.
    """
    row = tl.minimum(first + tl.arange(0, BLOCK_N), n - 1).to(tl.int64)[:, None]
    dtype: tl.constexpr = iou_ptr.dtype.element_ty
    box = boxes1_ptr + row * 4
    x1, y1, x2, y2 = tl.load(box), tl.load(box + 1), tl.load(box + 2), tl.load(box + 3)
    return x1.to(dtype), y1.to(dtype), x2.to(dtype), y2.to(dtype), iou_ptr + row * m


@triton.jit
def _chunk(
    rows1,
    rows2,
    boxes2_ptr,
    first,
    m,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
    GENERALIZED: tl.constexpr,
):
    """COLUMNS columns of both slabs of rows."""
    dtype: tl.constexpr = rows1[4].dtype.element_ty
    lane = tl.arange(0, COLUMNS)[None, :]
    box = boxes2_ptr + first * 4 + lane * 4
    inside = first + lane < m if MASKED else None
    other: tl.constexpr = 0.0 if MASKED else None
    x1, y1 = tl.load(box, inside, other).to(dtype), tl.load(box + 1, inside, other).to(dtype)
    x2, y2 = tl.load(box + 2, inside, other).to(dtype), tl.load(box + 3, inside, other).to(dtype)
    tl.store(rows1[4] + first + lane, _iou(rows1, x1, y1, x2, y2, GENERALIZED), inside)
    tl.store(rows2[4] + first + lane, _iou(rows2, x1, y1, x2, y2, GENERALIZED), inside)


@triton.jit
def _iou(a, bx1, by1, bx2, by2, GENERALIZED: tl.constexpr):
    """IoU, or generalised IoU in torchvision.ops.generalized_box_iou's order of operations."""
    intersection, union = intersection_and_union(a[0], a[1], a[2], a[3], bx1, by1, bx2, by2)
    iou = divide_areas(intersection, union)
    if GENERALIZED:
        hull_width = tl.maximum(tl.maximum(a[2], bx2) - tl.minimum(a[0], bx1), 0.0)
        hull_height = tl.maximum(tl.maximum(a[3], by2) - tl.minimum(a[1], by1), 0.0)
        hull = hull_width * hull_height
        iou -= divide(hull - union, hull)  # 0 only where one box holds the other: too rare to guard
    return iou


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
    GENERALIZED: tl.constexpr,
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
        union = tl.where(mask, union, 1.0)
        # iou = I / U with U = A + B - I: d iou = dI (1 + iou) / U - dA iou / U. A dividend of 1 is never the 0 that
        # `divide_areas` avoids, as gradients and intersections are.
        inverse = divide(tl.full(union.shape, 1.0, dtype), union)
        by_union = grad * inverse
        iou = intersection * inverse
        by_intersection = by_union * (1.0 + iou)
        by_area = -by_union * iou
        if GENERALIZED:
            # giou = iou - 1 + U / C with the hull C: dU / C besides, and -dC U / C^2
            hull_width = tl.maximum(ax2, bx2) - tl.minimum(ax1, bx1)
            hull_height = tl.maximum(ay2, by2) - tl.minimum(ay1, by1)
            hull_w = tl.maximum(hull_width, 0.0)
            hull_h = tl.maximum(hull_height, 0.0)
            inverse = divide(tl.full(union.shape, 1.0, dtype), tl.where(mask, hull_w * hull_h, 1.0))
            by_hull = grad * inverse
            by_intersection -= by_hull
            by_area += by_hull
            by_hull *= -union * inverse
            by_hull_w = tl.where(hull_width > 0, by_hull * hull_h, 0.0)
            by_hull_h = tl.where(hull_height > 0, by_hull * hull_w, 0.0)
            dx1 += tl.sum(-by_hull_w * _share(ax1, bx1, -1), 1)
            dx2 += tl.sum(by_hull_w * _share(ax2, bx2, 1), 1)
            dy1 += tl.sum(-by_hull_h * _share(ay1, by1, -1), 1)
            dy2 += tl.sum(by_hull_h * _share(ay2, by2, 1), 1)
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
