"""Proposals as Triton kernels: one number to order each value by, and the boxes of the anchors chosen."""

import triton
import triton.language as tl

from .. import boxes
from ..device import divide
from ..device_anchors import grid_anchor

MAX_LOG_SCALE = tl.constexpr(boxes.MAX_LOG_SCALE)


@triton.jit
def topk_keys_kernel(
    values_ptr,  # [B, N] fp16, bf16 or fp32, any strides
    keys_ptr,  # [B, N] int64
    number,  # N
    stride_b,
    stride_n,
    BLOCK: tl.constexpr,
):
    """Writes for BLOCK values of a row a number that is larger the larger the value, then the smaller its index.

    As fp32, floats that are not negative are ordered as their bits are as integers, negative ones the other way round.
    """
    blocks = tl.cdiv(number, BLOCK)  # rows and blocks on one axis: the others of a grid end at 65,535
    index = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    mask = index < number
    value = tl.load(values_ptr + row * stride_b + index.to(tl.int64) * stride_n, mask, 0.0).to(tl.float32)
    value = tl.where(value != value, float("-inf"), value)
    value = tl.where(value == 0, 0.0, value)  # -0.0 equals 0.0, its bits do not
    bits = value.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = (order.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)
    tl.store(keys_ptr + row * number + index, key, mask)


@triton.jit
def decode_proposals_kernel(
    logits_ptr,  # [B, A] fp16, bf16 or fp32, any strides
    deltas_ptr,  # [B, A, 4] fp16, bf16 or fp32, any strides
    index_ptr,  # [B, n] int64
    sizes_ptr,  # [B, 2] int32 or int64: height, width
    boxes_ptr,  # [B, n, 4] fp32
    scores_ptr,  # [B, n] fp32
    number,  # n
    num_anchors,
    logits_stride_b,
    logits_stride_a,
    deltas_stride_b,
    deltas_stride_a,
    deltas_stride_d,
    min_size,
    cells_ptr,  # [L, k, 4] fp32
    per_cell,
    heights,  # tuple of L
    widths,
    strides_y,
    strides_x,
    BLOCK: tl.constexpr,
):
    """Makes boxes and scores of BLOCK anchors of one image."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    image = tl.program_id(1).to(tl.int64)
    mask = slot < number
    out = image * number + slot
    index = tl.load(index_ptr + out, mask, -1)
    full = (index >= 0) & (index < num_anchors)
    index = tl.where(full, index, 0)
    z = tl.load(logits_ptr + image * logits_stride_b + index * logits_stride_a, full, 0.0).to(tl.float32)
    row_ptr = deltas_ptr + image * deltas_stride_b + index * deltas_stride_a
    dx = tl.load(row_ptr, full, 0.0).to(tl.float32)
    dy = tl.load(row_ptr + deltas_stride_d, full, 0.0).to(tl.float32)
    dw = tl.load(row_ptr + deltas_stride_d * 2, full, 0.0).to(tl.float32)
    dh = tl.load(row_ptr + deltas_stride_d * 3, full, 0.0).to(tl.float32)

    ax1, ay1, ax2, ay2 = grid_anchor(cells_ptr, index, per_cell, heights, widths, strides_y, strides_x)
    height = tl.load(sizes_ptr + image * 2).to(tl.float32)
    width = tl.load(sizes_ptr + image * 2 + 1).to(tl.float32)
    x1, x2, x_finite = _decode_axis(dx, dw, ax1, ax2, width)
    y1, y2, y_finite = _decode_axis(dy, dh, ay1, ay2, height)
    decay = tl.exp(-tl.abs(z))  # never overflows
    score = divide(tl.where(z >= 0, 1.0, decay), 1.0 + decay)  # sigmoid
    valid = full & x_finite & y_finite & (score >= 0) & (x2 - x1 >= min_size) & (y2 - y1 >= min_size)

    tl.store(scores_ptr + out, tl.where(valid, score, -1.0), mask)
    tl.store(boxes_ptr + out * 4, tl.where(valid, x1, 0.0), mask)
    tl.store(boxes_ptr + out * 4 + 1, tl.where(valid, y1, 0.0), mask)
    tl.store(boxes_ptr + out * 4 + 2, tl.where(valid, x2, 0.0), mask)
    tl.store(boxes_ptr + out * 4 + 3, tl.where(valid, y2, 0.0), mask)


@triton.jit
def _decode_axis(shift, scale, low, high, limit):
    """One axis of boxes: both ends, clipped to 0..limit, and whether they were finite before."""
    INF: tl.constexpr = float("inf")
    size = high - low
    center = shift * size + (low + 0.5 * size)
    # Not minimum(), which may drop a NaN.
    half = tl.exp(tl.where(scale > MAX_LOG_SCALE, MAX_LOG_SCALE, scale)) * size * 0.5
    first = center - half
    last = center + half
    finite = (tl.abs(first) < INF) & (tl.abs(last) < INF)
    first = tl.minimum(tl.maximum(first, 0.0), limit)
    last = tl.minimum(tl.maximum(last, 0.0), limit)
    return first, last, finite
