"""RoIAlign forward and backward as Triton kernels: all pyramid levels in one launch.

One program computes a tile of one RoI's output, [BLOCK_BINS, BLOCK_C]:

    RoI -> level (compare areas) -> start, bin size, samples a bin
        -> for every sample: four cells, their weights -> accumulate in fp32 (fp64 for fp64 features)

The backward walks the same samples and adds each weighted gradient to its four cells with atomics.
Features and output share one layout: NCHW, or NHWC with CHANNELS_LAST.
"""

import triton
import triton.language as tl

from ..device import divide


@triton.jit
def _roi_axis(low, high, scale, BINS: tl.constexpr, SAMPLING_RATIO: tl.constexpr, ALIGNED: tl.constexpr):
    """Start, bin size and samples a bin of a RoI along one axis, in feature cells."""
    OFFSET: tl.constexpr = 0.5 if ALIGNED else 0.0
    start = low * scale - OFFSET
    extent = high * scale - OFFSET - start
    if not ALIGNED:
        extent = tl.where(extent < 1.0, 1.0, extent)  # NaN stays NaN, and its samples lie nowhere
    bin_size = divide(extent, tl.zeros_like(extent) + BINS)
    if SAMPLING_RATIO > 0:
        grid = tl.full((), SAMPLING_RATIO, tl.int32)
    else:
        INF: tl.constexpr = float("inf")
        grid = tl.where(bin_size < INF, tl.ceil(bin_size), 0.0).to(tl.int32)  # a RoI that is not finite has no samples
    return start, bin_size, grid


@triton.jit
def _roi_on_level(
    maps,
    rois_ptr,
    roi,
    batch_size,
    channels,
    heights,
    widths,
    SCALES: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    LEVELS: tl.constexpr,
    POOLED_H: tl.constexpr,
    POOLED_W: tl.constexpr,
    SAMPLING_RATIO: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Where a RoI lies: its image's map, that map's size, and start, bin size and samples a bin on both axes."""
    batch = tl.load(rois_ptr + roi * 5)
    x1 = tl.load(rois_ptr + roi * 5 + 1)
    y1 = tl.load(rois_ptr + roi * 5 + 2)
    x2 = tl.load(rois_ptr + roi * 5 + 3)
    y2 = tl.load(rois_ptr + roi * 5 + 4)

    area = (x2 - x1) * (y2 - y1)
    map_ptr = maps[0]
    height = heights[0]
    width = widths[0]
    scale = tl.zeros_like(x1) + SCALES[0]
    for i in tl.static_range(1, LEVELS):
        if area >= tl.zeros_like(area) + THRESHOLDS[i - 1]:  # in the area's own precision
            map_ptr = maps[i]
            height = heights[i]
            width = widths[i]
            scale = tl.zeros_like(x1) + SCALES[i]

    in_batch = (batch >= 0) & (batch < batch_size)  # NaN is not
    image = tl.where(in_batch, batch, 0.0).to(tl.int64)
    image_ptr = map_ptr + image * channels * height * width
    y_start, bin_height, y_grid = _roi_axis(y1, y2, scale, POOLED_H, SAMPLING_RATIO, ALIGNED)
    x_start, bin_width, x_grid = _roi_axis(x1, x2, scale, POOLED_W, SAMPLING_RATIO, ALIGNED)
    y_grid = tl.where(in_batch, y_grid, 0)  # a RoI of no image has no samples
    return image_ptr, height, width, y_start, bin_height, y_grid, x_start, bin_width, x_grid


@triton.jit
def _sample_axis(start, bin_size, bins, i, grid, length):
    """Sample `i` of every bin along one axis: (low cell, high cell, low weight, high weight, inside the map)."""
    position = start + bins.to(start.dtype) * bin_size + divide((i + 0.5) * bin_size, grid.to(start.dtype))
    inside = (position >= -1.0) & (position <= length)
    position = tl.maximum(tl.where(inside, position, 0.0), 0.0)
    low = tl.minimum(position.to(tl.int32), length - 1)
    high = tl.minimum(low + 1, length - 1)
    high_weight = tl.where(low < length - 1, position - low.to(start.dtype), 0.0)
    return low, high, 1.0 - high_weight, high_weight, inside


@triton.jit
def roi_align_forward_kernel(
    features,  # tuple of L pointers to [B, C, H_l, W_l]
    rois_ptr,  # [K, 5] batch index, x1, y1, x2, y2
    out_ptr,  # [K, C, ph, pw]
    batch_size,
    channels,
    heights,  # tuple of L
    widths,  # tuple of L
    SCALES: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    LEVELS: tl.constexpr,
    POOLED_H: tl.constexpr,
    POOLED_W: tl.constexpr,
    SAMPLING_RATIO: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_BINS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Computes one [BLOCK_BINS, BLOCK_C] tile of one RoI's output."""
    BINS: tl.constexpr = POOLED_H * POOLED_W
    TILES: tl.constexpr = (BINS + BLOCK_BINS - 1) // BLOCK_BINS
    roi = (tl.program_id(0) // TILES).to(tl.int64)
    bins = (tl.program_id(0) % TILES) * BLOCK_BINS + tl.arange(0, BLOCK_BINS)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    out_mask = (bins < BINS)[:, None] & (channel < channels)[None, :]

    image_ptr, height, width, y_start, bin_height, y_grid, x_start, bin_width, x_grid = _roi_on_level(
        features, rois_ptr, roi, batch_size, channels, heights, widths,
        SCALES, THRESHOLDS, LEVELS, POOLED_H, POOLED_W, SAMPLING_RATIO, ALIGNED,
    )  # fmt: skip
    cell_stride = channels if CHANNELS_LAST else 1
    image_ptr += (channel if CHANNELS_LAST else channel * (height * width))[None, :]

    total = tl.zeros((BLOCK_BINS, BLOCK_C), y_start.dtype)
    for iy in range(y_grid):
        y_low, y_high, wy_low, wy_high, y_inside = _sample_axis(
            y_start, bin_height, bins // POOLED_W, iy, y_grid, height
        )
        for ix in range(x_grid):
            x_low, x_high, wx_low, wx_high, x_inside = _sample_axis(
                x_start, bin_width, bins % POOLED_W, ix, x_grid, width
            )
            # Masked, not multiplied by zero: a sample outside the map is 0 even where the map holds inf or NaN.
            mask = (y_inside & x_inside)[:, None] & out_mask
            low_low = image_ptr + ((y_low * width + x_low) * cell_stride)[:, None]
            low_high = image_ptr + ((y_low * width + x_high) * cell_stride)[:, None]
            high_low = image_ptr + ((y_high * width + x_low) * cell_stride)[:, None]
            high_high = image_ptr + ((y_high * width + x_high) * cell_stride)[:, None]
            total += (wy_low * wx_low)[:, None] * tl.load(low_low, mask, 0.0).to(total.dtype)
            total += (wy_low * wx_high)[:, None] * tl.load(low_high, mask, 0.0).to(total.dtype)
            total += (wy_high * wx_low)[:, None] * tl.load(high_low, mask, 0.0).to(total.dtype)
            total += (wy_high * wx_high)[:, None] * tl.load(high_high, mask, 0.0).to(total.dtype)
    count = tl.maximum(y_grid * x_grid, 1).to(total.dtype)
    total = divide(total, tl.zeros_like(total) + count)

    if CHANNELS_LAST:
        offset = bins[:, None] * channels + channel[None, :]
    else:
        offset = channel[None, :] * BINS + bins[:, None]
    tl.store(out_ptr + roi * channels * BINS + offset, total.to(out_ptr.dtype.element_ty), out_mask)


@triton.jit
def roi_align_backward_kernel(
    grads,  # tuple of L pointers to zeroed [B, C, H_l, W_l], fp32 (fp64 for fp64 features)
    rois_ptr,  # [K, 5] batch index, x1, y1, x2, y2
    grad_out_ptr,  # [K, C, ph, pw]
    batch_size,
    channels,
    heights,  # tuple of L
    widths,  # tuple of L
    SCALES: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    LEVELS: tl.constexpr,
    POOLED_H: tl.constexpr,
    POOLED_W: tl.constexpr,
    SAMPLING_RATIO: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_BINS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Adds one [BLOCK_BINS, BLOCK_C] tile of one RoI's gradient to the cells that its samples read."""
    BINS: tl.constexpr = POOLED_H * POOLED_W
    TILES: tl.constexpr = (BINS + BLOCK_BINS - 1) // BLOCK_BINS
    roi = (tl.program_id(0) // TILES).to(tl.int64)
    bins = (tl.program_id(0) % TILES) * BLOCK_BINS + tl.arange(0, BLOCK_BINS)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    out_mask = (bins < BINS)[:, None] & (channel < channels)[None, :]

    image_ptr, height, width, y_start, bin_height, y_grid, x_start, bin_width, x_grid = _roi_on_level(
        grads, rois_ptr, roi, batch_size, channels, heights, widths,
        SCALES, THRESHOLDS, LEVELS, POOLED_H, POOLED_W, SAMPLING_RATIO, ALIGNED,
    )  # fmt: skip
    cell_stride = channels if CHANNELS_LAST else 1
    image_ptr += (channel if CHANNELS_LAST else channel * (height * width))[None, :]

    if CHANNELS_LAST:
        offset = bins[:, None] * channels + channel[None, :]
    else:
        offset = channel[None, :] * BINS + bins[:, None]
    grad = tl.load(grad_out_ptr + roi * channels * BINS + offset, out_mask, 0.0).to(y_start.dtype)
    count = tl.maximum(y_grid * x_grid, 1).to(grad.dtype)
    grad = divide(grad, tl.zeros_like(grad) + count)

    for iy in range(y_grid):
        y_low, y_high, wy_low, wy_high, y_inside = _sample_axis(
            y_start, bin_height, bins // POOLED_W, iy, y_grid, height
        )
        for ix in range(x_grid):
            x_low, x_high, wx_low, wx_high, x_inside = _sample_axis(
                x_start, bin_width, bins % POOLED_W, ix, x_grid, width
            )
            mask = (y_inside & x_inside)[:, None] & out_mask
            low_low = image_ptr + ((y_low * width + x_low) * cell_stride)[:, None]
            low_high = image_ptr + ((y_low * width + x_high) * cell_stride)[:, None]
            high_low = image_ptr + ((y_high * width + x_low) * cell_stride)[:, None]
            high_high = image_ptr + ((y_high * width + x_high) * cell_stride)[:, None]
            tl.atomic_add(low_low, grad * (wy_low * wx_low)[:, None], mask, sem="relaxed")
            tl.atomic_add(low_high, grad * (wy_low * wx_high)[:, None], mask, sem="relaxed")
            tl.atomic_add(high_low, grad * (wy_high * wx_low)[:, None], mask, sem="relaxed")
            tl.atomic_add(high_high, grad * (wy_high * wx_high)[:, None], mask, sem="relaxed")
