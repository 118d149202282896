"""Mask loss forward and backward as Triton kernels: one program a RoI, reading its class channel only."""

import triton
import triton.language as tl

from ..device import divide


@triton.jit
def _channel(logits_ptr, labels_ptr, roi, num_classes, stride_n, stride_k):
    """Pointer to the RoI's class channel, whether its slot holds a RoI, and whether the class exists."""
    label = tl.load(labels_ptr + roi)
    known = (label >= 0) & (label < num_classes)
    channel = tl.where(known, label, 0)
    return logits_ptr + roi * stride_n + channel.to(tl.int64) * stride_k, label >= 0, known


@triton.jit
def mask_bce_forward_kernel(
    logits_ptr,  # [N, K, M, M'], any strides
    labels_ptr,  # [N] int64
    targets_ptr,  # [N, M, M'] contiguous
    loss_ptr,  # [N] fp32 (fp64 for fp64 logits)
    num_classes,
    stride_n,
    stride_k,
    stride_y,
    stride_x,
    PIXELS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mean over the pixels of one RoI of max(z, 0) - z t + log(1 + exp(-|z|))."""
    roi = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = loss_ptr.dtype.element_ty
    channel_ptr, occupied, known = _channel(logits_ptr, labels_ptr, roi, num_classes, stride_n, stride_k)
    total = tl.zeros((BLOCK,), dtype)
    for first in range(0, tl.where(known, PIXELS, 0), BLOCK):
        pixel = first + tl.arange(0, BLOCK)
        mask = pixel < PIXELS
        z = tl.load(channel_ptr + (pixel // WIDTH) * stride_y + (pixel % WIDTH) * stride_x, mask, 0.0).to(dtype)
        t = tl.load(targets_ptr + roi * PIXELS + pixel, mask, 0).to(dtype)
        loss = tl.maximum(z, 0.0) - z * t + tl.log(1.0 + tl.exp(-tl.abs(z)))
        total += tl.where(mask, tl.where(z != z, z, loss), 0.0)  # maximum() may drop a NaN
    mean = tl.sum(total, 0) / PIXELS
    # A class that does not exist makes the loss NaN: visible at once, without stopping the device to look.
    tl.store(loss_ptr + roi, tl.where(occupied & (known == 0), float("nan"), mean))


@triton.jit
def mask_bce_backward_kernel(
    logits_ptr,  # [N, K, M, M'], any strides
    labels_ptr,  # [N] int64
    targets_ptr,  # [N, M, M'] contiguous
    grad_loss_ptr,  # [N]
    grad_ptr,  # [N, K, M, M'] zeroed, the strides of `grad_stride_*`
    num_classes,
    stride_n,
    stride_k,
    stride_y,
    stride_x,
    grad_stride_n,
    grad_stride_k,
    grad_stride_y,
    grad_stride_x,
    PIXELS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes (sigmoid(z) - t) * grad / pixels into the RoI's class channel; the other channels stay zero."""
    roi = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = grad_loss_ptr.dtype.element_ty
    channel_ptr, _, known = _channel(logits_ptr, labels_ptr, roi, num_classes, stride_n, stride_k)
    out_ptr, _, _ = _channel(grad_ptr, labels_ptr, roi, num_classes, grad_stride_n, grad_stride_k)
    scale = tl.load(grad_loss_ptr + roi) / PIXELS
    for first in range(0, tl.where(known, PIXELS, 0), BLOCK):
        pixel = first + tl.arange(0, BLOCK)
        mask = pixel < PIXELS
        y = pixel // WIDTH
        x = pixel % WIDTH
        z = tl.load(channel_ptr + y * stride_y + x * stride_x, mask, 0.0).to(dtype)
        t = tl.load(targets_ptr + roi * PIXELS + pixel, mask, 0).to(dtype)
        decay = tl.exp(-tl.abs(z))  # never overflows
        sigmoid = divide(tl.where(z >= 0, 1.0, decay), 1.0 + decay)
        grad = (sigmoid - t) * scale
        tl.store(out_ptr + y * grad_stride_y + x * grad_stride_x, grad.to(grad_ptr.dtype.element_ty), mask)
