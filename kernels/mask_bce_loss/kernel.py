"""Mask loss forward and backward as Triton kernels, reading each RoI's class channel only."""

import triton
import triton.language as tl

from ..device_bce import bce_with_logits, known_class


@triton.jit
def _pixels(logits_ptr, targets_ptr, roi, label, strides, pixel, mask, dtype: tl.constexpr, WIDTH: tl.constexpr):
    """Logits of the RoI's class and targets at `pixel`; WIDTH 0: the pixels of a plane lie `strides[3]` apart."""
    plane_ptr = logits_ptr + roi * strides[0] + label * strides[1]
    if WIDTH == 0:
        place = pixel.to(tl.int64) * strides[3]
    else:
        place = (pixel // WIDTH).to(tl.int64) * strides[2] + (pixel % WIDTH).to(tl.int64) * strides[3]
    z = tl.load(plane_ptr + place, mask, 0.0).to(dtype)
    return z, tl.load(targets_ptr + pixel, mask, 0).to(dtype)


@triton.jit
def mask_bce_forward_kernel(
    logits_ptr,  # [N, K, M, M'], any strides
    labels_ptr,  # [N] int64
    targets_ptr,  # [N, M, M'] contiguous
    rows_ptr,  # [N] fp32 (fp64 for fp64 logits)
    num_classes,
    stride_n,
    stride_k,
    stride_y,
    stride_x,
    PIXELS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program = RoI: the sum of its pixels' losses."""
    roi = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = rows_ptr.dtype.element_ty
    label, known = known_class(labels_ptr, roi, num_classes)
    strides = (stride_n, stride_k, stride_y, stride_x)
    total = tl.zeros((BLOCK,), dtype)
    for first in range(0, tl.where(known, PIXELS, 0), BLOCK):
        pixel = first + tl.arange(0, BLOCK)
        mask = pixel < PIXELS
        z, t = _pixels(logits_ptr, targets_ptr + roi * PIXELS, roi, label, strides, pixel, mask, dtype, WIDTH)
        total += tl.where(mask, bce_with_logits(z, t)[0], 0.0)
    tl.store(rows_ptr + roi, tl.sum(total, 0))


@triton.jit
def mask_bce_backward_kernel(
    logits_ptr,  # [N, K, M, M'], any strides
    labels_ptr,  # [N] int64
    targets_ptr,  # [N, M, M'] contiguous
    grad_loss_ptr,  # scalar
    scale_ptr,  # [N]
    grad_ptr,  # [N, K, M, M'], NCHW or NHWC without gaps
    elements,  # of the gradient
    num_classes,
    stride_n,
    stride_k,
    stride_y,
    stride_x,
    grad_stride_k,
    grad_stride_p,
    PIXELS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    OWN: tl.constexpr,
):
    """Program = stretch of the gradient's memory: zeros in wide stores, then what the class channels have in it.

    The memory is written once, whichever way it lies: with a pass of zeros and one of values, the few values of an
    NHWC gradient would each fetch and write a sector of DRAM again.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    index = start + tl.arange(0, BLOCK)
    zeros = tl.zeros((BLOCK,), grad_ptr.dtype.element_ty)
    tl.store(grad_ptr + index, zeros, index < elements)
    tl.debug_barrier()  # or another thread's zeros could come after these values

    dtype: tl.constexpr = scale_ptr.dtype.element_ty
    end = tl.minimum(start + BLOCK, elements)
    strides = (stride_n, stride_k, stride_y, stride_x)
    of_roi = num_classes * tl.full((), PIXELS, tl.int64)  # num_classes is a plain int where Triton specialises on 1
    for number in range((start // of_roi).to(tl.int32), ((end - 1) // of_roi).to(tl.int32) + 1):
        roi = start * 0 + number
        label, known = known_class(labels_ptr, roi, num_classes)
        base = roi * of_roi + label * grad_stride_k
        first = tl.maximum((start - base + grad_stride_p - 1) // grad_stride_p, 0).to(tl.int32)
        last = tl.minimum((end - base + grad_stride_p - 1) // grad_stride_p, PIXELS).to(tl.int32)
        scale = tl.load(scale_ptr + roi) * tl.load(grad_loss_ptr)
        for near in range(first, tl.where(known, last, 0), OWN):
            pixel = near + tl.arange(0, OWN)
            mask = pixel < last
            z, t = _pixels(logits_ptr, targets_ptr + roi * PIXELS, roi, label, strides, pixel, mask, dtype, WIDTH)
            grad = bce_with_logits(z, t)[1] * scale
            tl.store(grad_ptr + base + pixel * grad_stride_p, grad.to(grad_ptr.dtype.element_ty), mask)
