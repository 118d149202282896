"""RoIAlign forward: all pyramid levels in one launch, a few rows of one RoI's output a program.

    table row -> map, start, bin -> for every sample: four cells, their weights -> sum in fp32 (fp64 for fp64 maps)

A program's tile is [ROWS, BLOCK_W, BLOCK_C] bins and channels: with channels last every load is a run of channels.
`tl.fma` asks for the fused multiply-adds that the launch forbids everywhere else: sums may fuse, geometry may not.
"""

import triton
import triton.language as tl

from .kernel_geometry import TABLE_COLUMNS, corners, load_axes, map_of


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
):
    """Computes ROWS rows of one RoI's output, BLOCK_C channels of them."""
    TILES: tl.constexpr = (POOLED_H + ROWS - 1) // ROWS
    roi = (tl.program_id(0) // TILES).to(tl.int64)
    row = (tl.program_id(0) % TILES) * ROWS + tl.arange(0, ROWS)[:, None, None]
    column = tl.arange(0, BLOCK_W)[None, :, None]
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, None, :]

    row_ptr = table_ptr + roi * TABLE_COLUMNS
    image_ptr, height, width = map_of(row_ptr, maps, heights, widths, CHANNELS, LEVELS)
    whole = tl.load(row_ptr + 7) != 0
    y_grid = tl.load(row_ptr + 10).to(tl.int32)
    x_grid = tl.load(row_ptr + 11).to(tl.int32)
    y_start, y_bin, y_step, x_start, x_bin, x_step, weight = load_axes(row_ptr)
    # Bins beyond the last repeat it and are not stored: masks would cost every load.
    y = y_start + tl.minimum(row, POOLED_H - 1).to(y_bin.dtype) * y_bin
    x = x_start + tl.minimum(column, POOLED_W - 1).to(y_bin.dtype) * x_bin

    total = tl.zeros((ROWS, BLOCK_W, BLOCK_C), y_start.dtype)
    if whole:
        total = _add_samples(
            total, image_ptr, channel, y, y_step, y_grid, height, x, x_step, x_grid, width, weight,
            CHANNELS, SAMPLING_RATIO, MAPS_CHANNELS_LAST, BLOCK_C, False,
        )  # fmt: skip
    else:
        total = _add_samples(
            total, image_ptr, channel, y, y_step, y_grid, height, x, x_step, x_grid, width, weight,
            CHANNELS, SAMPLING_RATIO, MAPS_CHANNELS_LAST, BLOCK_C, True,
        )  # fmt: skip

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
    total, image_ptr, channel, y, y_step, y_grid, height, x, x_step, x_grid, width, weight,
    CHANNELS: tl.constexpr, SAMPLING_RATIO: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """`total` [rows, columns, channels] and all samples of its bins, which begin at `y` and `x`."""
    if SAMPLING_RATIO > 0:
        for iy in tl.static_range(SAMPLING_RATIO):
            for ix in tl.static_range(SAMPLING_RATIO):
                total = _add_sample(
                    total, image_ptr, channel, y + (iy + 0.5) * y_step, height, x + (ix + 0.5) * x_step, width, weight,
                    CHANNELS, CHANNELS_LAST, BLOCK_C, MASKED,
                )  # fmt: skip
    else:
        for iy in range(y_grid):
            for ix in range(x_grid):
                total = _add_sample(
                    total, image_ptr, channel, y + (iy + 0.5) * y_step, height, x + (ix + 0.5) * x_step, width, weight,
                    CHANNELS, CHANNELS_LAST, BLOCK_C, MASKED,
                )  # fmt: skip
    return total


@triton.jit
def _add_sample(
    total, image_ptr, channel, y, height, x, width, weight,
    CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    y_low, y_high, wy_low, wy_high, y_inside = corners(y, height)
    x_low, x_high, wx_low, wx_high, x_inside = corners(x, width)
    wy_low *= weight
    wy_high *= weight
    # 64 bits to the row, 32 inside it: an image may hold more than 2**31 elements.
    if CHANNELS_LAST:
        low_ptr = image_ptr + y_low.to(tl.int64) * (width * CHANNELS)
        high_ptr = image_ptr + y_high.to(tl.int64) * (width * CHANNELS)
        low_cell = x_low * CHANNELS + channel
        high_cell = x_high * CHANNELS + channel
    else:
        plane_ptr = image_ptr + channel.to(tl.int64) * height * width
        low_ptr = plane_ptr + y_low.to(tl.int64) * width
        high_ptr = plane_ptr + y_high.to(tl.int64) * width
        low_cell = x_low
        high_cell = x_high
    # Masked, not multiplied by zero: a sample outside the map is 0 even where the map holds inf or NaN.
    mask = channel < CHANNELS
    if MASKED:
        mask = mask & y_inside & x_inside
    EVERYWHERE: tl.constexpr = not MASKED and CHANNELS % BLOCK_C == 0
    total = tl.fma(wy_low * wx_low, _load(low_ptr + low_cell, mask, EVERYWHERE).to(total.dtype), total)
    total = tl.fma(wy_low * wx_high, _load(low_ptr + high_cell, mask, EVERYWHERE).to(total.dtype), total)
    total = tl.fma(wy_high * wx_low, _load(high_ptr + low_cell, mask, EVERYWHERE).to(total.dtype), total)
    total = tl.fma(wy_high * wx_high, _load(high_ptr + high_cell, mask, EVERYWHERE).to(total.dtype), total)
    return total


@triton.jit
def _load(ptr, mask, EVERYWHERE: tl.constexpr):
    """A masked load costs an instruction a register even where nothing is masked."""
    if EVERYWHERE:
        return tl.load(ptr)
    else:
        return tl.load(ptr, mask, 0.0)


@triton.jit
def transpose_kernel(
    input_ptr,  # [N, rows, columns]
    out_ptr,  # [N, columns, rows]
    rows,
    columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Transposes one tile of one matrix: NCHW to NHWC with rows = C and columns = H * W, and back."""
    tiles = tl.cdiv(columns, BLOCK_COLUMNS)
    matrix = (tl.program_id(0) // tiles).to(tl.int64) * rows * columns
    column = (tl.program_id(0) % tiles) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    source = row[:, None].to(tl.int64) * columns + column[None, :]
    tile = tl.load(input_ptr + matrix + source, (row < rows)[:, None] & (column < columns)[None, :])
    target = column[:, None].to(tl.int64) * rows + row[None, :]
    tl.store(out_ptr + matrix + target, tl.trans(tile), (column < columns)[:, None] & (row < rows)[None, :])
