"""RPN loss forward and backward as Triton kernels: of all anchors, those of the slots are read and written."""

import triton
import triton.language as tl

from ..device import divide, load_boxes
from ..device_anchors import grid_anchor


@triton.jit
def _load_slots(
    logits_ptr,  # [B, A], any strides
    matched_ptr,  # [B, A] int32
    index_ptr,  # [B, S] int64
    drawn_ptr,  # [B, S] uint8, 0 or 1
    positive_ptr,  # [B, S] uint8, 0 or 1
    image,
    slot,
    num_slots,
    num_anchors,
    stride_b,
    stride_a,
    DTYPE: tl.constexpr,
):
    """Slots of an image: (anchor, its logit, its match, drawn, positive, whether the anchor exists).

    What is not drawn is anchor 0 with logit 0; where an anchor that does not exist is drawn, the logit is NaN.
    """
    mask = slot < num_slots
    place = image * num_slots + slot
    drawn = tl.load(drawn_ptr + place, mask, 0) != 0
    positive = drawn & (tl.load(positive_ptr + place, mask, 0) != 0)
    index = tl.load(index_ptr + place, mask, 0)
    exists = drawn & (index >= 0) & (index < num_anchors)
    anchor = tl.where(exists, index, 0)
    z = tl.load(logits_ptr + image * stride_b + anchor * stride_a, exists, 0.0).to(DTYPE)
    z = tl.where(drawn & (exists == 0), float("nan"), z)
    matched = tl.load(matched_ptr + image * num_anchors + anchor, exists & positive, -1)
    return anchor, z, matched, drawn, positive, exists


@triton.jit
def _box_errors(
    deltas_ptr,  # [B, A, 4], any strides
    cells_ptr,  # [L, k, 4] fp32
    gt_ptr,  # [B, G, 4] fp32
    image,
    anchor,
    matched,
    positive,
    exists,
    num_gt,
    stride_b,
    stride_a,
    stride_d,
    per_cell,
    heights,
    widths,
    strides_y,
    strides_x,
    DTYPE: tl.constexpr,
):
    """Deltas minus those that move each anchor onto its GT; 0 but in positive slots, NaN where one has no GT."""
    ax1, ay1, ax2, ay2 = grid_anchor(cells_ptr, anchor, per_cell, heights, widths, strides_y, strides_x)
    has_gt = (matched >= 0) & (matched < num_gt)
    gt = tl.where(has_gt, matched, 0)
    gx1, gy1, gx2, gy2 = load_boxes(gt_ptr + image * num_gt * 4, gt, has_gt, DTYPE)
    x, width, anchor_width = _encode_axis(gx1, gx2, ax1.to(DTYPE), ax2.to(DTYPE))
    y, height, anchor_height = _encode_axis(gy1, gy2, ay1.to(DTYPE), ay2.to(DTYPE))
    full = (width > 0) & (height > 0) & (anchor_width > 0) & (anchor_height > 0)
    # Not `full` but "not empty": a size of NaN is not, and shows in the loss.
    empty = (width <= 0) | (height <= 0) | (anchor_width <= 0) | (anchor_height <= 0)
    w = tl.log(divide(tl.where(full, width, 1.0), tl.where(full, anchor_width, 1.0)))
    h = tl.log(divide(tl.where(full, height, 1.0), tl.where(full, anchor_height, 1.0)))
    unknown = (has_gt == 0) | ((full | empty) == 0)

    row_ptr = deltas_ptr + image * stride_b + anchor * stride_a
    read = positive & exists
    dx = tl.load(row_ptr, read, 0.0).to(DTYPE) - tl.where(empty, 0.0, x)
    dy = tl.load(row_ptr + stride_d, read, 0.0).to(DTYPE) - tl.where(empty, 0.0, y)
    dw = tl.load(row_ptr + stride_d * 2, read, 0.0).to(DTYPE) - tl.where(empty, 0.0, w)
    dh = tl.load(row_ptr + stride_d * 3, read, 0.0).to(DTYPE) - tl.where(empty, 0.0, h)
    return (
        _of_positive(dx, positive, unknown),
        _of_positive(dy, positive, unknown),
        _of_positive(dw, positive, unknown),
        _of_positive(dh, positive, unknown),
    )


@triton.jit
def _encode_axis(low, high, anchor_low, anchor_high):
    """One axis of boxes and anchors: how far apart the centres are in sizes of the anchor, and both sizes."""
    size = high - low
    anchor_size = anchor_high - anchor_low
    distance = low + 0.5 * size - (anchor_low + 0.5 * anchor_size)
    return divide(distance, tl.where(anchor_size > 0, anchor_size, 1.0)), size, anchor_size


@triton.jit
def _of_positive(error, positive, unknown):
    return tl.where(positive, tl.where(unknown, float("nan"), error), 0.0)


@triton.jit
def _smooth_l1(error, BETA: tl.constexpr):
    size = tl.abs(error)
    if BETA > 0:
        return tl.where(size < BETA, 0.5 / BETA * error * error, size - 0.5 * BETA)
    else:
        return size


@triton.jit
def _smooth_l1_slope(error, BETA: tl.constexpr):
    """The derivative of `_smooth_l1`, NaN where the error is."""
    slope = tl.where(error > 0, 1.0, tl.where(error < 0, -1.0, error))
    if BETA > 0:
        slope = tl.where(tl.abs(error) < BETA, error * (1.0 / BETA), slope)
    return slope


@triton.jit
def rpn_loss_forward_kernel(
    logits_ptr,  # [B, A] fp16, bf16, fp32 or fp64, any strides
    deltas_ptr,  # [B, A, 4], the same dtype, any strides
    gt_ptr,  # [B, G, 4] fp32
    matched_ptr,  # [B, A] int32
    index_ptr,  # [B, S] int64
    drawn_ptr,  # [B, S] uint8, 0 or 1
    positive_ptr,  # [B, S] uint8, 0 or 1
    objectness_ptr,  # [B] fp32 (fp64 for fp64 logits)
    box_ptr,  # [B], the same dtype
    num_slots,
    num_anchors,
    num_gt,
    logits_stride_b,
    logits_stride_a,
    deltas_stride_b,
    deltas_stride_a,
    deltas_stride_d,
    cells_ptr,  # [L, k, 4] fp32
    per_cell,
    heights,  # tuple of L
    widths,
    strides_y,
    strides_x,
    BETA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums the losses of one image: max(s, 0) + log(1 + exp(-|s|)), s = -z or z, and smooth L1 of the four deltas."""
    image = tl.program_id(0).to(tl.int64)
    DTYPE: tl.constexpr = objectness_ptr.dtype.element_ty
    objectness = tl.zeros((BLOCK,), DTYPE)
    box = tl.zeros((BLOCK,), DTYPE)
    for first in range(0, num_slots, BLOCK):
        anchor, z, matched, drawn, positive, exists = _load_slots(
            logits_ptr, matched_ptr, index_ptr, drawn_ptr, positive_ptr, image, first + tl.arange(0, BLOCK),
            num_slots, num_anchors, logits_stride_b, logits_stride_a, DTYPE,
        )  # fmt: skip
        wrong = tl.where(positive, -z, z)
        loss = tl.maximum(wrong, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(z)))
        loss += z - z  # 0, or NaN where the logit is not finite, which maximum() may hide
        objectness += tl.where(drawn, loss, 0.0)
        dx, dy, dw, dh = _box_errors(
            deltas_ptr, cells_ptr, gt_ptr, image, anchor, matched, positive, exists, num_gt,
            deltas_stride_b, deltas_stride_a, deltas_stride_d, per_cell, heights, widths, strides_y, strides_x, DTYPE,
        )  # fmt: skip
        box += _smooth_l1(dx, BETA) + _smooth_l1(dy, BETA) + _smooth_l1(dw, BETA) + _smooth_l1(dh, BETA)
    tl.store(objectness_ptr + image, tl.sum(objectness, 0))
    tl.store(box_ptr + image, tl.sum(box, 0))


@triton.jit
def rpn_loss_backward_kernel(
    logits_ptr,  # [B, A] fp16, bf16, fp32 or fp64, any strides
    deltas_ptr,  # [B, A, 4], the same dtype, any strides
    gt_ptr,  # [B, G, 4] fp32
    matched_ptr,  # [B, A] int32
    index_ptr,  # [B, S] int64
    drawn_ptr,  # [B, S] uint8, 0 or 1
    positive_ptr,  # [B, S] uint8, 0 or 1
    grad_objectness_ptr,  # [B], any stride: 0 where one number is for all
    grad_box_ptr,  # [B]
    grad_logits_ptr,  # [B, A] zeroed
    grad_deltas_ptr,  # [B, A, 4] zeroed
    grad_objectness_stride,
    grad_box_stride,
    num_slots,
    num_anchors,
    num_gt,
    logits_stride_b,
    logits_stride_a,
    deltas_stride_b,
    deltas_stride_a,
    deltas_stride_d,
    cells_ptr,  # [L, k, 4] fp32
    per_cell,
    heights,  # tuple of L
    widths,
    strides_y,
    strides_x,
    BETA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the gradients of the anchors in BLOCK slots of one image; no two of those drawn hold the same anchor."""
    image = tl.program_id(1).to(tl.int64)
    DTYPE: tl.constexpr = grad_objectness_ptr.dtype.element_ty
    anchor, z, matched, _, positive, exists = _load_slots(
        logits_ptr, matched_ptr, index_ptr, drawn_ptr, positive_ptr, image,
        tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), num_slots, num_anchors, logits_stride_b, logits_stride_a, DTYPE,
    )  # fmt: skip
    out = image * num_anchors + anchor
    wrong = tl.where(positive, -z, z)
    decay = tl.exp(-tl.abs(wrong))  # never overflows
    share = divide(tl.where(wrong >= 0, 1.0, decay), 1.0 + decay)  # sigmoid
    scale = tl.load(grad_objectness_ptr + image * grad_objectness_stride)
    grad = tl.where(positive, -share, share) * scale
    tl.store(grad_logits_ptr + out, grad.to(grad_logits_ptr.dtype.element_ty), exists)

    dx, dy, dw, dh = _box_errors(
        deltas_ptr, cells_ptr, gt_ptr, image, anchor, matched, positive, exists, num_gt,
        deltas_stride_b, deltas_stride_a, deltas_stride_d, per_cell, heights, widths, strides_y, strides_x, DTYPE,
    )  # fmt: skip
    scale = tl.load(grad_box_ptr + image * grad_box_stride)
    written = positive & exists
    row_ptr = grad_deltas_ptr + out * 4
    tl.store(row_ptr, (_smooth_l1_slope(dx, BETA) * scale).to(row_ptr.dtype.element_ty), written)
    tl.store(row_ptr + 1, (_smooth_l1_slope(dy, BETA) * scale).to(row_ptr.dtype.element_ty), written)
    tl.store(row_ptr + 2, (_smooth_l1_slope(dw, BETA) * scale).to(row_ptr.dtype.element_ty), written)
    tl.store(row_ptr + 3, (_smooth_l1_slope(dh, BETA) * scale).to(row_ptr.dtype.element_ty), written)
