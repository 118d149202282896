"""Binary cross-entropy of a pixel, and the weighted mean over RoIs, for the two mask losses."""

import triton
import triton.language as tl

from .device import divide


@triton.jit
def bce_with_logits(z, target):
    """Loss max(z, 0) - z t + log(1 + exp(-|z|)), and its derivative sigmoid(z) - t.

    The logarithm is 2 artanh(decay / (2 + decay)) as a series: log(1 + decay) would lose a small decay, which is all
    of the loss of a pixel that the model is sure of.
    """
    decay = tl.exp(-tl.abs(z))  # never overflows
    sigmoid = tl.where(z >= 0, 1.0, decay) / (1.0 + decay)
    if z.dtype == tl.float64:
        log = tl.log(1.0 + decay)
    else:
        ratio = decay / (2.0 + decay)
        square = ratio * ratio  # at most 1/9: what follows the last term is below 2e-9 of the sum
        series = square * (1 / 15) + (1 / 13)
        series = series * square + (1 / 11)
        series = series * square + (1 / 9)
        series = series * square + (1 / 7)
        series = series * square + (1 / 5)
        series = series * square + (1 / 3)
        log = 2.0 * ratio + 2.0 * ratio * square * series
    return tl.maximum(z, 0.0) - z * target + log, sigmoid - target  # the product is NaN where z is


@triton.jit
def known_class(labels_ptr, roi, num_classes):
    """A RoI's class, 0 where it has none that exists; and whether it has."""
    label = tl.load(labels_ptr + roi)
    known = (label >= 0) & (label < num_classes)
    return tl.where(known, label, 0), known


@triton.jit
def weighted_mean_kernel(
    rows_ptr,  # [PARTS, N] fp32 or fp64: sums over some of the pixels of each RoI
    labels_ptr,  # [N] int64
    weights_ptr,  # [N] floating, unused unless WEIGHTED
    loss_ptr,  # scalar
    scale_ptr,  # [N]
    n,
    num_classes,
    PIXELS: tl.constexpr,
    PARTS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """sum(w * l) / max(sum(w), 1), and what each pixel of a RoI counts in it: w / max(sum(w), 1) / pixels.

    One program, so that the order of the sums is fixed. A class that does not exist makes the loss NaN: visible at
    once, without stopping the device to look.
    """
    dtype: tl.constexpr = loss_ptr.dtype.element_ty
    total = tl.zeros((BLOCK,), dtype)
    weight_total = tl.zeros((BLOCK,), dtype)
    for first in range(0, n, BLOCK):
        roi = first + tl.arange(0, BLOCK)
        weight = _weights(labels_ptr, weights_ptr, roi, n, WEIGHTED, dtype)
        row = tl.zeros((BLOCK,), dtype)
        for part in tl.static_range(PARTS):
            row += tl.load(rows_ptr + part * n + roi, roi < n, 0.0)
        stray = tl.load(labels_ptr + roi, roi < n, 0) >= num_classes
        total += tl.where(stray, float("nan"), weight * row)
        weight_total += weight
    denominator = tl.sum(weight_total, 0)
    denominator = tl.where(denominator < 1.0, 1.0, denominator)  # a NaN stays one
    tl.store(loss_ptr, divide(tl.sum(total, 0), denominator * PIXELS))
    for first in range(0, n, BLOCK):
        roi = first + tl.arange(0, BLOCK)
        weight = _weights(labels_ptr, weights_ptr, roi, n, WEIGHTED, dtype)
        tl.store(scale_ptr + roi, divide(weight, denominator * PIXELS + weight * 0.0), roi < n)


@triton.jit
def _weights(labels_ptr, weights_ptr, roi, n, WEIGHTED: tl.constexpr, DTYPE: tl.constexpr):
    """Of RoIs; 0 for an empty slot, whose own weight may be NaN."""
    occupied = (roi < n) & (tl.load(labels_ptr + roi, roi < n, -1) >= 0)
    if WEIGHTED:
        return tl.load(weights_ptr + roi, occupied, 0.0).to(DTYPE)
    else:
        return tl.where(occupied, 1.0, 0.0).to(DTYPE)
