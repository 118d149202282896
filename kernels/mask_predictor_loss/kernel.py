"""A mask head's last convolution and its loss as Triton kernels: one channel of K is computed, and none is stored.

A tile is [CHUNKS, pixels, LANES, 8], channel = (chunk * LANES + lane) * 8 + the last index: eight channels, 16 bytes
of a half type, and a byte of signs. With the pixels in the middle, LANES neighbouring threads share a pixel and a warp
has several of them: what is computed once a pixel is computed for all of these at a time.
"""

import triton
import triton.language as tl

from ..device_bce import bce_with_logits, known_class


@triton.jit
def _channels(CHUNKS: tl.constexpr, LANES: tl.constexpr):
    """Of a tile: which eight, [CHUNKS, 1, LANES], and which one, [CHUNKS, 1, LANES, 8]."""
    eight = tl.arange(0, CHUNKS)[:, None, None] * LANES + tl.arange(0, LANES)[None, None, :]
    return eight, eight[:, :, :, None] * 8 + tl.arange(0, 8)[None, None, None, :]


@triton.jit
def _load(features_ptr, pixel, stop, channel, stride_p, stride_c, channels, PIXELS: tl.constexpr, PLAIN: tl.constexpr):
    """A tile of features before pixel `stop`. PLAIN: of NHWC features that fill all its channels, without a mask."""
    if PLAIN:
        last = tl.minimum(stop, PIXELS) - 1
        place = tl.minimum(pixel, last)[None, :, None, None] * stride_p + channel * stride_c
        return tl.load(features_ptr + place)
    else:
        here = (pixel < stop) & (pixel < PIXELS)  # apart, both are known to hold for 16 pixels or for none
        place = pixel[None, :, None, None] * stride_p + channel * stride_c
        return tl.load(features_ptr + place, here[None, :, None, None] & (channel < channels), 0.0)


@triton.jit
def _signs_at(signs_ptr, roi, pixel, eight, channels, PIXELS: tl.constexpr):
    """Where the signs of a RoI's pixels are, [CHUNKS, pixels, LANES]."""
    return signs_ptr + (roi * PIXELS + pixel[None, :, None]) * ((channels + 7) // 8) + eight


@triton.jit
def mask_predictor_forward_kernel(
    features_ptr,  # [N, C, M, M'], NCHW or NHWC
    weight_ptr,  # [K, C]
    bias_ptr,  # [K]
    labels_ptr,  # [N] int64
    targets_ptr,  # [N, M, M']
    rows_ptr,  # [PARTS, N]: sums of losses
    slope_ptr,  # [N, M, M']: derivatives of a pixel's loss by its logit
    grad_weight_ptr,  # [N, PARTS, C]: sums of slope times features
    grad_bias_ptr,  # [N, PARTS]: sums of slopes
    signs_ptr,  # [N, M, M', ceil(C / 8)] uint8: which features were above 0
    n,
    num_classes,
    channels,
    stride_p,
    stride_c,
    PIXELS: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
    PLAIN: tl.constexpr,
    RELU: tl.constexpr,
):
    """Program = (RoI, PART of its pixels). The features are read once, and serve logits and the weight's gradient."""
    roi = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    parts: tl.constexpr = (PIXELS + PART - 1) // PART
    dtype: tl.constexpr = rows_ptr.dtype.element_ty
    label, known = known_class(labels_ptr, roi, num_classes)
    eight, channel = _channels(CHUNKS, LANES)
    exists = channel < channels
    weight = tl.load(weight_ptr + label * channels + channel, exists, 0.0).to(dtype)
    bias = tl.load(bias_ptr + label).to(dtype)
    features_ptr += roi * PIXELS * channels

    total = tl.zeros((BLOCK,), dtype)
    grad_bias = tl.zeros((BLOCK,), dtype)
    grad_weight = tl.zeros((CHUNKS, BLOCK, LANES, 8), dtype)
    end = tl.where(known, tl.minimum(part * PART + PART, PIXELS), 0)
    begin = part * PART
    stop = begin + PART  # what follows belongs to another program
    lane = tl.arange(0, BLOCK)
    following = _load(features_ptr, begin + lane, stop, channel, stride_p, stride_c, channels, PIXELS, PLAIN)
    for first in range(begin, end, BLOCK):
        pixel = first + lane
        here = pixel < PIXELS
        x = following.to(dtype)  # the next tile comes while this one is used
        following = _load(features_ptr, pixel + BLOCK, stop, channel, stride_p, stride_c, channels, PIXELS, PLAIN)
        if RELU:
            positive = (x <= 0.0) == 0  # NaN stays NaN
            x = tl.where(positive, x, 0.0)
            byte = tl.sum(positive.to(tl.int32) << tl.arange(0, 8)[None, None, None, :], 3)
            stored = here[None, :, None] & (eight * 8 < channels)
            tl.store(_signs_at(signs_ptr, roi, pixel, eight, channels, PIXELS), byte.to(tl.uint8), stored)
        z = tl.sum(tl.sum(tl.sum(x * weight, 3), 0), 1) + bias
        loss, slope = bce_with_logits(z, tl.load(targets_ptr + roi * PIXELS + pixel, here, 0).to(dtype))
        slope = tl.where(here, slope, 0.0)
        total += tl.where(here, loss, 0.0)
        tl.store(slope_ptr + roi * PIXELS + pixel, slope, here)
        grad_bias += slope
        grad_weight += x * slope[None, :, None, None]

    tl.store(rows_ptr + part * n + roi, tl.sum(total, 0))
    row = roi * parts + part
    tl.store(grad_bias_ptr + row, tl.sum(grad_bias, 0))
    sums = tl.sum(grad_weight, 1)[:, None, :, :]
    tl.store(grad_weight_ptr + row * channels + channel, sums, exists)


@triton.jit
def mask_predictor_features_kernel(
    grad_loss_ptr,  # scalar
    scale_ptr,  # [N]
    labels_ptr,  # [N] int64
    weight_ptr,  # [K, C]
    slope_ptr,  # [N, M, M']
    signs_ptr,  # [N, M, M', ceil(C / 8)] uint8
    grad_ptr,  # [N, C, M, M'], NCHW or NHWC
    num_classes,
    channels,
    stride_p,
    stride_c,
    PIXELS: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
    PLAIN: tl.constexpr,
    RELU: tl.constexpr,
):
    """Program = (RoI, PART of its pixels): the gradient of features that nobody has to read again, a pure write."""
    roi = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * PART
    dtype: tl.constexpr = slope_ptr.dtype.element_ty
    label, known = known_class(labels_ptr, roi, num_classes)
    eight, channel = _channels(CHUNKS, LANES)
    exists = channel < channels
    weight = tl.load(weight_ptr + label * channels + channel, exists, 0.0).to(dtype)
    weight *= tl.load(scale_ptr + roi) * tl.load(grad_loss_ptr)
    weight = tl.where(channel < tl.where(known, channels, 0), weight, 0.0)  # of an empty slot: chosen, as it may be NaN
    grad_ptr += roi * PIXELS * channels
    learns = tl.where(known, PIXELS, 0)
    for first in range(begin, tl.minimum(begin + PART, PIXELS), BLOCK):
        pixel = first + tl.arange(0, BLOCK)
        slope = tl.load(slope_ptr + roi * PIXELS + pixel, pixel < learns, 0.0)
        grad = slope[None, :, None, None] * weight
        if RELU:
            stored = (pixel < learns)[None, :, None] & (eight * 8 < channels)
            byte = tl.load(_signs_at(signs_ptr, roi, pixel, eight, channels, PIXELS), stored, 0).to(tl.int32)
            positive = byte[:, :, :, None] & (1 << tl.arange(0, 8))[None, None, None, :]
            grad = tl.where(positive != 0, grad, 0.0)
        places = grad_ptr + pixel[None, :, None, None] * stride_p + channel * stride_c
        stored = (pixel < PIXELS)[None, :, None, None]
        tl.store(places, grad.to(grad_ptr.dtype.element_ty), stored if PLAIN else stored & exists)


@triton.jit
def mask_predictor_weight_kernel(
    grad_loss_ptr,  # scalar
    scale_ptr,  # [N]
    labels_ptr,  # [N] int64
    parts_ptr,  # [N, PARTS, C]
    parts_bias_ptr,  # [N, PARTS]
    list_ptr,  # [channel blocks, K, N] int32, scratch
    grad_weight_ptr,  # [K, C]
    grad_bias_ptr,  # [K]
    n,
    num_classes,
    channels,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Program = (class, BLOCK_C channels): lists the class's RoIs in order, then adds what they bring."""
    label = tl.program_id(0)
    dtype: tl.constexpr = parts_ptr.dtype.element_ty
    list_ptr += (tl.program_id(1).to(tl.int64) * num_classes + label) * n
    count = 0
    for first in range(0, n, BLOCK_N):
        roi = first + tl.arange(0, BLOCK_N)
        mine = tl.load(labels_ptr + roi, roi < n, -1) == label
        place = count + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(list_ptr + place, roi, mine)
        count += tl.sum(mine.to(tl.int32), 0)
    tl.debug_barrier()  # the list is read by other threads than wrote it

    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((ROWS, BLOCK_C), dtype)
    total_bias = tl.zeros((ROWS,), dtype)
    for first in range(0, count * PARTS, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = row < count * PARTS
        roi = tl.load(list_ptr + row // PARTS, mask, 0).to(tl.int64)
        scale = tl.load(scale_ptr + roi, mask, 0.0)
        source = roi * PARTS + row % PARTS
        both = mask[:, None] & (channel < channels)[None, :]
        total += tl.load(parts_ptr + source[:, None] * channels + channel[None, :], both, 0.0) * scale[:, None]
        total_bias += tl.load(parts_bias_ptr + source, mask, 0.0) * scale
    grad_loss = tl.load(grad_loss_ptr)
    grad = (tl.sum(total, 0) * grad_loss).to(grad_weight_ptr.dtype.element_ty)
    tl.store(grad_weight_ptr + label * channels + channel, grad, channel < channels)
    if tl.program_id(1) == 0:
        tl.store(grad_bias_ptr + label, (tl.sum(total_bias, 0) * grad_loss).to(grad_bias_ptr.dtype.element_ty))
