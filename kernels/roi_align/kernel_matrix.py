"""RoIAlign as products of matrices: forward W @ F, deterministic backward W^T @ G, both on tensor cores.

A sample at position p gives cell c the weight max(0, 1 - |p - c|), so a bin's weight of a cell is a product of one sum
of such hats along y and one along x. The forward takes the cells under a RoI's rows of bins, each read once however
many samples share it. The backward takes, for a tile of cells, the bins that touch it of every RoI in the tile's list
(see `kernel_lists`), and writes each cell once, in the gradient's own type: nothing is zeroed, added to or cast.
"""

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

from .kernel_geometry import TABLE_COLUMNS, load_axes, map_of, sample_offset, select_level
from .kernel_lists import tile_of


@triton.jit
def roi_align_matrix_kernel(
    maps,  # tuple of L pointers to [B, H_l, W_l, C]
    table_ptr,  # [K, 16]
    out_ptr,  # [K, C, ph, pw]
    heights,  # tuple of L
    widths,  # tuple of L
    CHANNELS: tl.constexpr,
    LEVELS: tl.constexpr,
    POOLED_H: tl.constexpr,
    POOLED_W: tl.constexpr,
    SAMPLING_RATIO: tl.constexpr,
    OUT_CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,  # see `dot`
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_CELLS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Computes ROWS rows of one RoI's output as W @ F, BLOCK_CELLS of the cells under them at a time.

    Every cell is read once, however many samples share it, and goes to the tensor cores as it is: for half types.
    """
    TILES: tl.constexpr = (POOLED_H + ROWS - 1) // ROWS
    roi = (tl.program_id(0) // TILES).to(tl.int64)
    first_row = (tl.program_id(0) % TILES) * ROWS
    row = first_row + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_W)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)

    row_ptr = table_ptr + roi * TABLE_COLUMNS
    image_ptr, height, width = map_of(row_ptr, maps, heights, widths, CHANNELS, LEVELS)
    y_grid = tl.load(row_ptr + 10).to(tl.int32)
    x_grid = tl.load(row_ptr + 11).to(tl.int32)
    y_start, y_bin, x_start, x_bin, weight = load_axes(row_ptr)
    y_first, y_cells = _cells_under(row_ptr + 12, y_start, y_bin, first_row, ROWS)
    x_first = tl.load(row_ptr + 14).to(tl.int32)
    x_cells = tl.load(row_ptr + 15).to(tl.int32) - x_first + 1
    y = (y_start + row.to(y_bin.dtype) * y_bin)[:, None]
    x = (x_start + column.to(x_bin.dtype) * x_bin)[:, None]

    first_ptr = image_ptr + (y_first.to(tl.int64) * width + x_first) * CHANNELS
    total = tl.zeros((ROWS * BLOCK_W, BLOCK_C), y_bin.dtype)
    per_row = 1.0 / x_cells
    for first in range(0, y_cells * x_cells, BLOCK_CELLS):
        k = first + tl.arange(0, BLOCK_CELLS)
        over = ((k + 0.5) * per_row).to(tl.int32)  # k // x_cells, a division of integers being dear
        cell_y = y_first + over
        cell_x = x_first + k - over * x_cells
        mask = (k < y_cells * x_cells)[:, None] & (channel < CHANNELS)[None, :]
        cell = over * (width - x_cells) + k  # from the first
        values = tl.load(first_ptr + (cell * CHANNELS)[:, None] + channel[None, :], mask, 0.0)
        y_weights = axis_weights(y, y_bin, y_grid, cell_y[None, :], height, (ROWS, BLOCK_CELLS), SAMPLING_RATIO)
        x_weights = axis_weights(x, x_bin, x_grid, cell_x[None, :], width, (BLOCK_W, BLOCK_CELLS), SAMPLING_RATIO)
        weights = y_weights[:, None, :] * x_weights[None, :, :]
        total = dot(tl.reshape(weights, (ROWS * BLOCK_W, BLOCK_CELLS)), values, total, PRECISION)

    bins = tl.arange(0, ROWS * BLOCK_W)
    row = first_row + bins // BLOCK_W
    column = bins % BLOCK_W
    mask = ((row < POOLED_H) & (column < POOLED_W))[:, None] & (channel < CHANNELS)[None, :]
    bins = row * POOLED_W + column
    if OUT_CHANNELS_LAST:
        offset = bins[:, None] * CHANNELS + channel[None, :]
    else:
        offset = channel[None, :] * (POOLED_H * POOLED_W) + bins[:, None]
    out_ptr += roi * (CHANNELS * POOLED_H * POOLED_W)
    tl.store(out_ptr + offset, (total * weight).to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _cells_under(bounds_ptr, start, bin_size, first_bin, BINS: tl.constexpr):
    """(first, number) of the cells that BINS bins touch along one axis; where the RoI is inverted, all of the RoI's."""
    first = tl.load(bounds_ptr).to(tl.int32)
    last = tl.load(bounds_ptr + 1).to(tl.int32)
    if (bin_size > 0) & (first <= last):
        # A hundredth of a cell to spare: rounding may not lose one, and one too many has no weight.
        begin = tl.maximum(start + first_bin * bin_size - 0.01, first.to(bin_size.dtype))
        end = tl.minimum(start + (first_bin + BINS) * bin_size + 0.01, last.to(bin_size.dtype))
        first = tl.minimum(begin.to(tl.int32), last)
        last = tl.minimum(end.to(tl.int32) + 1, last)
    return first, last - first + 1


@triton.jit
def roi_align_gather_kernel(
    grads,  # tuple of L pointers to [B, C, H_l, W_l]
    grad_outs,  # tuple of S pointers to [K_s, ph_s, pw_s, C]
    table_ptr,  # [K, 16], the RoIs of all sets one after another
    starts_ptr,  # [L * B + 1]
    lists_ptr,
    lengths_ptr,  # [tiles]
    first_rois,  # tuple of S: the first RoI of each set
    batch_size,
    heights,  # tuple of L
    widths,  # tuple of L
    most_tiles,  # of the largest map
    CHANNELS: tl.constexpr,
    LEVELS: tl.constexpr,
    SETS: tl.constexpr,
    POOLED_H: tl.constexpr,  # tuple of S
    POOLED_W: tl.constexpr,  # tuple of S
    SAMPLING_RATIO: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,  # "split", "tf32x3" or "ieee"
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_BINS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums and writes the gradient of one tile of cells, BLOCK_C channels of it."""
    CHANNEL_BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    tile = tl.program_id(0) // CHANNEL_BLOCKS
    channel = (tl.program_id(0) % CHANNEL_BLOCKS) * BLOCK_C + tl.arange(0, BLOCK_C)
    level, image, t, y, x = tile_of(tile, batch_size, heights, widths, LEVELS, TILE_H, TILE_W)
    grad_ptr, height, width = select_level(level, grads, heights, widths, LEVELS)
    start = tl.load(starts_ptr + level * batch_size + image)
    number = tl.load(starts_ptr + level * batch_size + image + 1) - start
    list_ptr = lists_ptr + start.to(tl.int64) * most_tiles + t.to(tl.int64) * number

    cell_y = y + tl.arange(0, TILE_H)
    cell_x = x + tl.arange(0, TILE_W)
    # A bin of many samples has small weights, and fp16 ends at 6e-8.
    SCALE: tl.constexpr = 1024.0 if grad_outs[0].dtype.element_ty == tl.float16 else 1.0
    DTYPE: tl.constexpr = tl.float64 if table_ptr.dtype.element_ty == tl.int64 else tl.float32
    total = tl.zeros((TILE_H * TILE_W, BLOCK_C), DTYPE)
    for entry in range(tl.load(lengths_ptr + tile)):
        roi = tl.load(list_ptr + entry)
        row_ptr = table_ptr + roi.to(tl.int64) * TABLE_COLUMNS
        grad_out_ptr = grad_outs[0]
        set_start = first_rois[0]
        pooled_h = POOLED_H[0]
        pooled_w = POOLED_W[0]
        for s in tl.static_range(1, SETS):
            if roi >= first_rois[s]:
                grad_out_ptr = grad_outs[s]
                set_start = first_rois[s]
                pooled_h = POOLED_H[s]
                pooled_w = POOLED_W[s]
        grad_out_ptr += (roi - set_start).to(tl.int64) * pooled_h * pooled_w * CHANNELS
        total = _add_roi(
            total, row_ptr, grad_out_ptr, channel, cell_y, cell_x, height, width, y, x, pooled_h, pooled_w,
            CHANNELS, SAMPLING_RATIO, PRECISION, SCALE, TILE_H, TILE_W, BLOCK_BINS, BLOCK_C,
        )  # fmt: skip

    cell = tl.arange(0, TILE_H * TILE_W)
    cell_y = y + cell // TILE_W
    cell_x = x + cell % TILE_W
    mask = ((cell_y < height) & (cell_x < width))[:, None] & (channel < CHANNELS)[None, :]
    grad_ptr += image.to(tl.int64) * height * width * CHANNELS
    if CHANNELS_LAST:
        grad_ptr += y.to(tl.int64) * width * CHANNELS
        offset = ((cell_y - y) * width + cell_x)[:, None] * CHANNELS + channel[None, :]
    else:
        offset = channel[None, :].to(tl.int64) * height * width + (cell_y * width + cell_x)[:, None]
    tl.store(grad_ptr + offset, (total * (1.0 / SCALE)).to(grad_ptr.dtype.element_ty), mask)


@triton.jit
def _add_roi(
    total, row_ptr, grad_out_ptr, channel, cell_y, cell_x, height, width, y, x, pooled_h, pooled_w,
    CHANNELS: tl.constexpr, SAMPLING_RATIO: tl.constexpr, PRECISION: tl.constexpr, SCALE: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_BINS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`total` [cells, channels] and what one RoI gives to these cells: W @ G, BLOCK_BINS bins at a time."""
    y_grid = tl.load(row_ptr + 10).to(tl.int32)
    x_grid = tl.load(row_ptr + 11).to(tl.int32)
    y_start, y_bin, x_start, x_bin, weight = load_axes(row_ptr)
    y_first, y_bins = _bins_near(y_start, y_bin, y, TILE_H, pooled_h)
    x_first, x_bins = _bins_near(x_start, x_bin, x, TILE_W, pooled_w)
    per_row = 1.0 / x_bins
    for first in range(0, y_bins * x_bins, BLOCK_BINS):
        k = first + tl.arange(0, BLOCK_BINS)
        present = k < y_bins * x_bins
        over = ((k + 0.5) * per_row).to(tl.int32)  # k // x_bins, a division of integers being dear
        row = y_first + over
        column = x_first + k - over * x_bins
        mask = present[:, None] & (channel < CHANNELS)[None, :]
        grad = tl.load(grad_out_ptr + ((row * pooled_w + column) * CHANNELS)[:, None] + channel[None, :], mask, 0.0)
        y_k = (y_start + row.to(y_bin.dtype) * y_bin)[None, :]
        x_k = (x_start + column.to(x_bin.dtype) * x_bin)[None, :]
        y_weights = axis_weights(y_k, y_bin, y_grid, cell_y[:, None], height, (TILE_H, BLOCK_BINS), SAMPLING_RATIO)
        x_weights = axis_weights(x_k, x_bin, x_grid, cell_x[:, None], width, (TILE_W, BLOCK_BINS), SAMPLING_RATIO)
        weights = (y_weights * (weight * SCALE))[:, None, :] * x_weights[None, :, :]
        weights = tl.reshape(weights, (TILE_H * TILE_W, BLOCK_BINS))
        total = dot(weights, grad, total, PRECISION)
    return total


@triton.jit
def _bins_near(start, bin_size, cell, TILE: tl.constexpr, bins):
    """(first, number) of the bins with samples within one cell of the tile; where the RoI is inverted, all of them."""
    scale = 1.0 / tl.maximum(bin_size, 1e-6)
    # A hundredth of a cell and of a bin to spare: rounding may not lose a bin, and one too many has no weight.
    first = tl.maximum(tl.floor((cell - 1.01 - start) * scale - 0.01), 0.0)
    last = tl.minimum(tl.floor((cell + (TILE + 0.01) - start) * scale + 0.01), bins - 1.0)
    first = tl.where(bin_size > 0, tl.minimum(first, bins - 1.0), 0.0).to(tl.int32)
    last = tl.where(bin_size > 0, tl.maximum(last, 0.0), bins - 1.0).to(tl.int32)
    return first, tl.maximum(last - first + 1, 0)


@triton.jit
def axis_weights(start, bin_size, grid, cell, length, SHAPE: tl.constexpr, SAMPLING_RATIO: tl.constexpr):
    """Weights along one axis between bins, whose samples begin at `start`, and cells; they broadcast to SHAPE."""
    weights = tl.zeros(SHAPE, start.dtype)
    if SAMPLING_RATIO == 1 or SAMPLING_RATIO == 2:
        for i in tl.static_range(SAMPLING_RATIO):
            weights += _hat(start + sample_offset(bin_size, i, grid, SAMPLING_RATIO), cell, length)
    else:
        for i in range(grid):
            weights += _hat(start + sample_offset(bin_size, i, grid, SAMPLING_RATIO), cell, length)
    return weights


@triton.jit
def _hat(position, cell, length):
    inside = (position >= -1.0) & (position <= length)
    position = tl.minimum(tl.maximum(position, 0.0), (length - 1).to(position.dtype))
    position = tl.where(inside, position, -2.0)  # far from every cell
    return tl.maximum(1.0 - tl.abs(position - cell.to(position.dtype)), 0.0)


@triton.jit
def dot(weights, values, total, PRECISION: tl.constexpr):
    """`total` + weights @ values, rounded far less than `values` are.

    "split": a half type's product with the weight as a sum of two halves: 16 bits of it in bf16, 22 in fp16.
    """
    if PRECISION == "split":
        high = weights.to(values.dtype)
        low = (weights - high.to(weights.dtype)).to(values.dtype)
        total = tl.dot(high, values, total)
        return tl.dot(low, values, total)
    elif PRECISION == "tf32x3" and is_cuda():
        return tl.dot(weights, values.to(weights.dtype), total, input_precision="tf32x3")
    else:
        return tl.dot(weights, values.to(weights.dtype), total, input_precision="ieee", out_dtype=total.dtype)
