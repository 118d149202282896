"""RoIAlign sample by sample: forward for any type and layout, and the backward that adds with atomics.

A program does a few rows of one RoI's bins, all pyramid levels in one launch; its tile is [ROWS, BLOCK_W, BLOCK_C]
bins and channels. `tl.fma` asks for the fused multiply-adds that the launch forbids everywhere else: sums may fuse,
geometry may not.
"""

import triton
import triton.language as tl

from .kernel_geometry import TABLE_COLUMNS, corners, load_axes, map_of, sample_offset


@triton.jit
def roi_align_forward_kernel(
    maps,  # tuple of L pointers to [B, C, H_l, W_l]
    table_ptr,  # [K, 16]
    out_ptr,  # [K, C, ph, pw]
    heights,  # tuple of L
    widths,  # tuple of L
    CHANNELS: tl.constexpr,
    LEVELS: tl.constexpr,
    POOLED_H: tl.constexpr,
    POOLED_W: tl.constexpr,
    SAMPLING_RATIO: tl.constexpr,
    MAPS_CHANNELS_LAST: tl.constexpr,
    OUT_CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Computes ROWS rows of one RoI's output, BLOCK_C channels of them.

    PAIRS: bf16 maps are read as int32, two channels each, and widened by a shift and a mask: Triton's own conversion
    takes three instructions for the two.
    """
    UNIT: tl.constexpr = 2 if PAIRS else 1
    TILES: tl.constexpr = (POOLED_H + ROWS - 1) // ROWS
    roi = (tl.program_id(0) // TILES).to(tl.int64)
    row = (tl.program_id(0) % TILES) * ROWS + tl.arange(0, ROWS)[:, None, None]
    column = tl.arange(0, BLOCK_W)[None, :, None]
    unit = tl.program_id(1) * (BLOCK_C // UNIT) + tl.arange(0, BLOCK_C // UNIT)[None, None, :]

    row_ptr = table_ptr + roi * TABLE_COLUMNS
    image_ptr, height, width = map_of(row_ptr, maps, heights, widths, CHANNELS, LEVELS)
    if PAIRS:
        image_ptr = image_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    whole = tl.load(row_ptr + 7) != 0
    y_grid = tl.load(row_ptr + 10).to(tl.int32)
    x_grid = tl.load(row_ptr + 11).to(tl.int32)
    y_start, y_bin, x_start, x_bin, weight = load_axes(row_ptr)
    # Bins beyond the last repeat it and are not stored: masks would cost every load.
    y = y_start + tl.minimum(row, POOLED_H - 1).to(y_bin.dtype) * y_bin
    x = x_start + tl.minimum(column, POOLED_W - 1).to(y_bin.dtype) * x_bin

    total = tl.zeros((ROWS, BLOCK_W, BLOCK_C), y_start.dtype)
    if whole:
        total = _add_samples(
            total, image_ptr, unit, y, y_bin, y_grid, height, x, x_bin, x_grid, width, weight,
            CHANNELS // UNIT, SAMPLING_RATIO, MAPS_CHANNELS_LAST, PAIRS, CHANNELS % BLOCK_C != 0,
        )  # fmt: skip
    else:
        total = _add_samples(
            total, image_ptr, unit, y, y_bin, y_grid, height, x, x_bin, x_grid, width, weight,
            CHANNELS // UNIT, SAMPLING_RATIO, MAPS_CHANNELS_LAST, PAIRS, True,
        )  # fmt: skip

    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, None, :]
    mask = (row < POOLED_H) & (column < POOLED_W) & (channel < CHANNELS)
    bins = row * POOLED_W + column
    if OUT_CHANNELS_LAST:
        offset = bins * CHANNELS + channel
    else:
        offset = channel * (POOLED_H * POOLED_W) + bins
    out_ptr += roi * (CHANNELS * POOLED_H * POOLED_W)
    tl.store(out_ptr + offset, total.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _add_samples(
    total, image_ptr, unit, y, y_bin, y_grid, height, x, x_bin, x_grid, width, weight,
    UNITS: tl.constexpr, SAMPLING_RATIO: tl.constexpr, CHANNELS_LAST: tl.constexpr, PAIRS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """`total` [rows, columns, channels] and all samples of its bins, which begin at `y` and `x`."""
    if SAMPLING_RATIO == 1 or SAMPLING_RATIO == 2:  # unrolled: more would take minutes to compile
        for iy in tl.static_range(SAMPLING_RATIO):
            y_i = y + sample_offset(y_bin, iy, y_grid, SAMPLING_RATIO)
            for ix in tl.static_range(SAMPLING_RATIO):
                x_i = x + sample_offset(x_bin, ix, x_grid, SAMPLING_RATIO)
                total = _add_sample(
                    total, image_ptr, unit, y_i, height, x_i, width, weight, UNITS, CHANNELS_LAST, PAIRS, MASKED
                )
    else:
        for iy in range(y_grid):
            y_i = y + sample_offset(y_bin, iy, y_grid, SAMPLING_RATIO)
            for ix in range(x_grid):
                x_i = x + sample_offset(x_bin, ix, x_grid, SAMPLING_RATIO)
                total = _add_sample(
                    total, image_ptr, unit, y_i, height, x_i, width, weight, UNITS, CHANNELS_LAST, PAIRS, MASKED
                )
    return total


@triton.jit
def _add_sample(
    total, image_ptr, unit, y, height, x, width, weight,
    UNITS: tl.constexpr, CHANNELS_LAST: tl.constexpr, PAIRS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    y_low, y_high, wy_low, wy_high, y_inside = corners(y, height)
    x_low, x_high, wx_low, wx_high, x_inside = corners(x, width)
    wy_low *= weight
    wy_high *= weight
    # 64 bits to the row, 32 inside it: an image may hold more than 2**31 elements.
    if CHANNELS_LAST:
        low_ptr = image_ptr + y_low.to(tl.int64) * (width * UNITS) + unit
        high_ptr = image_ptr + y_high.to(tl.int64) * (width * UNITS) + unit
        x_low *= UNITS
        x_high *= UNITS
    else:
        low_ptr = image_ptr + (unit.to(tl.int64) * height + y_low) * width
        high_ptr = image_ptr + (unit.to(tl.int64) * height + y_high) * width
    # Masked, not multiplied by zero: a sample outside the map is 0 even where the map holds inf or NaN.
    mask = unit < UNITS
    if MASKED:
        mask = mask & y_inside & x_inside
    total = tl.fma(wy_low * wx_low, _widen(low_ptr + x_low, mask, total, PAIRS, MASKED), total)
    total = tl.fma(wy_low * wx_high, _widen(low_ptr + x_high, mask, total, PAIRS, MASKED), total)
    total = tl.fma(wy_high * wx_low, _widen(high_ptr + x_low, mask, total, PAIRS, MASKED), total)
    total = tl.fma(wy_high * wx_high, _widen(high_ptr + x_high, mask, total, PAIRS, MASKED), total)
    return total


@triton.jit
def _widen(ptr, mask, total, PAIRS: tl.constexpr, MASKED: tl.constexpr):
    """Cells' values in the type of `total`. A mask costs an instruction a register even where it hides nothing."""
    if MASKED:
        values = tl.load(ptr, mask, 0)
    else:
        values = tl.load(ptr)
    if PAIRS:
        low = (values << 16).to(tl.float32, bitcast=True)
        high = (values & -65536).to(tl.float32, bitcast=True)
        return tl.reshape(tl.join(low, high), total.shape)
    else:
        return values.to(total.dtype)


@triton.jit
def roi_align_atomic_kernel(
    sums,  # tuple of L pointers to zeroed [B, H_l, W_l, C] in DTYPE
    grad_out_ptr,  # [K, ph, pw, C]
    table_ptr,  # [K, 16]
    heights,  # tuple of L
    widths,  # tuple of L
    CHANNELS: tl.constexpr,
    LEVELS: tl.constexpr,
    POOLED_H: tl.constexpr,
    POOLED_W: tl.constexpr,
    SAMPLING_RATIO: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Adds ROWS rows of one RoI's gradient, BLOCK_C channels of them, to the cells that their samples read."""
    TILES: tl.constexpr = (POOLED_H + ROWS - 1) // ROWS
    roi = (tl.program_id(0) // TILES).to(tl.int64)
    row = (tl.program_id(0) % TILES) * ROWS + tl.arange(0, ROWS)[:, None, None]
    column = tl.arange(0, BLOCK_W)[None, :, None]
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, None, :]

    row_ptr = table_ptr + roi * TABLE_COLUMNS
    image_ptr, height, width = map_of(row_ptr, sums, heights, widths, CHANNELS, LEVELS)
    y_grid = tl.load(row_ptr + 10).to(tl.int32)
    x_grid = tl.load(row_ptr + 11).to(tl.int32)
    y_start, y_bin, x_start, x_bin, weight = load_axes(row_ptr)
    y = y_start + row.to(y_start.dtype) * y_bin
    x = x_start + column.to(y_start.dtype) * x_bin

    mask = (row < POOLED_H) & (column < POOLED_W) & (channel < CHANNELS)
    grad_out_ptr += roi * (CHANNELS * POOLED_H * POOLED_W)
    grad = tl.load(grad_out_ptr + (row * POOLED_W + column) * CHANNELS + channel, mask, 0.0).to(y_start.dtype) * weight
    for iy in range(y_grid):
        y_low, y_high, wy_low, wy_high, y_inside = corners(y + sample_offset(y_bin, iy, y_grid, SAMPLING_RATIO), height)
        low_ptr = image_ptr + y_low.to(tl.int64) * (width * CHANNELS) + channel
        high_ptr = image_ptr + y_high.to(tl.int64) * (width * CHANNELS) + channel
        for ix in range(x_grid):
            x_i = x + sample_offset(x_bin, ix, x_grid, SAMPLING_RATIO)
            x_low, x_high, wx_low, wx_high, x_inside = corners(x_i, width)
            inside = mask & y_inside & x_inside
            tl.atomic_add(low_ptr + x_low * CHANNELS, grad * (wy_low * wx_low), inside, sem="relaxed")
            tl.atomic_add(low_ptr + x_high * CHANNELS, grad * (wy_low * wx_high), inside, sem="relaxed")
            tl.atomic_add(high_ptr + x_low * CHANNELS, grad * (wy_high * wx_low), inside, sem="relaxed")
            tl.atomic_add(high_ptr + x_high * CHANNELS, grad * (wy_high * wx_high), inside, sem="relaxed")
