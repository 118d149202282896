"""RoIAlign backward: each cell gathers its gradient (deterministic), or each RoI adds to its cells with atomics.

The gather, for all levels, images and sets of RoIs at once:

    table -> RoIs grouped by (level, image) -> for every tile of cells, the list of RoIs that touch it
          -> a tile sums W @ G over its list, W [cells, bins] interpolation weights, G [bins, channels] gradients,
             and writes every cell once, in the gradient's own type

Lists are made by prefix sums in the RoIs' order, without atomics and without sorting, so that every sum has one order.
A list has room for all RoIs of its group: nothing can overflow, however RoIs cluster.
"""

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

from ..device import divide
from .kernel_geometry import TABLE_COLUMNS, corners, load_axes, map_of


@triton.jit
def group_rois_kernel(
    table_ptr,  # [K, 16]
    starts_ptr,  # [L * B + 1] int32: where each group's RoIs begin in `order`
    order_ptr,  # [K] int32: RoIs group by group, in ascending order within a group
    number,  # K
    batch_size,
    BLOCK: tl.constexpr,
):
    """Writes the RoIs of one (level, image)."""
    group = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    before = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, number, BLOCK):
        before += (_group_of(table_ptr, first + lane, number, batch_size) < group).to(tl.int32)
    position = tl.sum(before)
    tl.store(starts_ptr + group, position)
    for first in range(0, number, BLOCK):
        here = (_group_of(table_ptr, first + lane, number, batch_size) == group).to(tl.int32)
        tl.store(order_ptr + position + tl.cumsum(here) - 1, first + lane, here != 0)
        position += tl.sum(here)
    if group == tl.num_programs(0) - 1:
        tl.store(starts_ptr + group + 1, position)


@triton.jit
def _group_of(table_ptr, roi, number, batch_size):
    """level * B + image of each RoI; a RoI that touches no cell, and one beyond the last, are in no group."""
    mask = roi < number
    row_ptr = table_ptr + roi.to(tl.int64) * TABLE_COLUMNS
    level = tl.load(row_ptr + 8, mask, 0).to(tl.int32)
    image = tl.load(row_ptr + 9, mask, 0).to(tl.int32)
    touches = tl.load(row_ptr + 13, mask, -1) >= 0
    return tl.where(touches, level * batch_size + image, 0x7FFFFFFF)


@triton.jit
def _tile_of(tile, batch_size, heights, widths, LEVELS: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Which cells a tile holds: (level, image, its number in the image's map, tiles of that map, its first y, x).

    The coarsest level comes first: its tiles have the longest lists, and a long one started last would be waited for.
    """
    level = 0
    first = 0
    end = 0
    for i in tl.static_range(LEVELS - 1, -1, -1):
        if tile >= end:
            level = i
            first = end
        end += batch_size * tl.cdiv(heights[i], TILE_H) * tl.cdiv(widths[i], TILE_W)
    tiles = tl.cdiv(heights[0], TILE_H) * tl.cdiv(widths[0], TILE_W)
    across = tl.cdiv(widths[0], TILE_W)
    for i in tl.static_range(1, LEVELS):
        if level == i:
            tiles = tl.cdiv(heights[i], TILE_H) * tl.cdiv(widths[i], TILE_W)
            across = tl.cdiv(widths[i], TILE_W)
    inside = (tile - first) % tiles
    return level, (tile - first) // tiles, inside, tiles, inside // across * TILE_H, inside % across * TILE_W


@triton.jit
def list_rois_kernel(
    table_ptr,  # [K, 16]
    starts_ptr,  # [L * B + 1]
    order_ptr,  # [K]
    lists_ptr,  # [K * tiles of the largest map] int32: the list of tile t of a group g begins at
    #             starts[g] * tiles of the largest map + t * RoIs of g
    lengths_ptr,  # [tiles] int32
    batch_size,
    heights,  # tuple of L
    widths,  # tuple of L
    most_tiles,  # of the largest map
    LEVELS: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the list of one tile: the RoIs of its group that may touch it."""
    tile = tl.program_id(0)
    level, image, t, _, y, x = _tile_of(tile, batch_size, heights, widths, LEVELS, TILE_H, TILE_W)
    start = tl.load(starts_ptr + level * batch_size + image)
    number = tl.load(starts_ptr + level * batch_size + image + 1) - start
    list_ptr = lists_ptr + start.to(tl.int64) * most_tiles + t.to(tl.int64) * number
    length = 0
    for first in range(0, number, BLOCK):
        lane = first + tl.arange(0, BLOCK)
        mask = lane < number
        roi = tl.load(order_ptr + start + lane, mask, 0)
        row_ptr = table_ptr + roi.to(tl.int64) * TABLE_COLUMNS
        touches = mask & (tl.load(row_ptr + 12, mask, 0) < y + TILE_H) & (tl.load(row_ptr + 13, mask, 0) >= y)
        touches = touches & (tl.load(row_ptr + 14, mask, 0) < x + TILE_W) & (tl.load(row_ptr + 15, mask, 0) >= x)
        hit = touches.to(tl.int32)
        tl.store(list_ptr + length + tl.cumsum(hit) - 1, roi, touches)
        length += tl.sum(hit)
    tl.store(lengths_ptr + tile, length)


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
    level, image, t, _, y, x = _tile_of(tile, batch_size, heights, widths, LEVELS, TILE_H, TILE_W)
    grad_ptr = grads[0]
    height = heights[0]
    width = widths[0]
    for i in tl.static_range(1, LEVELS):
        if level == i:
            grad_ptr = grads[i]
            height = heights[i]
            width = widths[i]
    start = tl.load(starts_ptr + level * batch_size + image)
    number = tl.load(starts_ptr + level * batch_size + image + 1) - start
    list_ptr = lists_ptr + start.to(tl.int64) * most_tiles + t.to(tl.int64) * number

    cell_y = y + tl.arange(0, TILE_H)
    cell_x = x + tl.arange(0, TILE_W)
    DTYPE: tl.constexpr = tl.float64 if table_ptr.dtype.element_ty == tl.int64 else tl.float32
    total = tl.zeros((TILE_H * TILE_W, BLOCK_C), DTYPE)
    for entry in range(tl.load(lengths_ptr + tile)):
        roi = tl.load(list_ptr + entry)
        row_ptr = table_ptr + roi.to(tl.int64) * TABLE_COLUMNS
        grad_out_ptr = grad_outs[0]
        set_start = first_rois[0]
        pooled_h = POOLED_H[0] + 0 * t
        pooled_w = POOLED_W[0] + 0 * t
        for s in tl.static_range(1, SETS):
            if roi >= first_rois[s]:
                grad_out_ptr = grad_outs[s]
                set_start = first_rois[s]
                pooled_h = POOLED_H[s] + 0 * t
                pooled_w = POOLED_W[s] + 0 * t
        grad_out_ptr += (roi - set_start).to(tl.int64) * pooled_h * pooled_w * CHANNELS
        total = _add_roi(
            total, row_ptr, grad_out_ptr, channel, cell_y, cell_x, height, width, y, x, pooled_h, pooled_w,
            CHANNELS, SAMPLING_RATIO, PRECISION, TILE_H, TILE_W, BLOCK_BINS, BLOCK_C,
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
    tl.store(grad_ptr + offset, total.to(grad_ptr.dtype.element_ty), mask)


@triton.jit
def _add_roi(
    total, row_ptr, grad_out_ptr, channel, cell_y, cell_x, height, width, y, x, pooled_h, pooled_w,
    CHANNELS: tl.constexpr, SAMPLING_RATIO: tl.constexpr, PRECISION: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_BINS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`total` [cells, channels] and what one RoI gives to these cells: W @ G, BLOCK_BINS bins at a time."""
    y_grid = tl.load(row_ptr + 10).to(tl.int32)
    x_grid = tl.load(row_ptr + 11).to(tl.int32)
    y_start, y_bin, y_step, x_start, x_bin, x_step, weight = load_axes(row_ptr)
    y_first, y_bins = _bins_near(y_start, y_bin, y, TILE_H, pooled_h)
    x_first, x_bins = _bins_near(x_start, x_bin, x, TILE_W, pooled_w)
    per_row = divide(tl.full((), 1.0, tl.float32), x_bins.to(tl.float32))
    for first in range(0, y_bins * x_bins, BLOCK_BINS):
        k = first + tl.arange(0, BLOCK_BINS)
        present = k < y_bins * x_bins
        over = ((k + 0.5) * per_row).to(tl.int32)  # k // x_bins, a division of integers being dear
        row = y_first + over
        column = x_first + k - over * x_bins
        mask = present[:, None] & (channel < CHANNELS)[None, :]
        grad = tl.load(grad_out_ptr + ((row * pooled_w + column) * CHANNELS)[:, None] + channel[None, :], mask, 0.0)
        y_weights = (
            _hat(y_start + row.to(y_start.dtype) * y_bin, y_step, y_grid, cell_y, height, SAMPLING_RATIO) * weight
        )
        x_weights = _hat(x_start + column.to(y_start.dtype) * x_bin, x_step, x_grid, cell_x, width, SAMPLING_RATIO)
        weights = tl.reshape(y_weights[:, None, :] * x_weights[None, :, :], (TILE_H * TILE_W, BLOCK_BINS))
        total = _dot(weights, grad, total, PRECISION)
    return total


@triton.jit
def _bins_near(start, bin_size, cell, TILE: tl.constexpr, bins):
    """(first, number) of the bins with samples within one cell of the tile; where the RoI is inverted, all of them."""
    scale = divide(tl.zeros_like(bin_size) + 1.0, tl.maximum(bin_size, 1e-6))
    # A hundredth of a bin to spare: rounding may not lose a bin, and one too many has no weight.
    first = tl.maximum(tl.floor((cell - 1 - start) * scale - 0.01), 0.0)
    last = tl.minimum(tl.floor((cell + TILE - start) * scale + 0.01), bins - 1.0)
    first = tl.where(bin_size > 0, tl.minimum(first, bins - 1.0), 0.0).to(tl.int32)
    last = tl.where(bin_size > 0, tl.maximum(last, 0.0), bins - 1.0).to(tl.int32)
    return first, tl.maximum(last - first + 1, 0)


@triton.jit
def _hat(start, step, grid, cell, length, SAMPLING_RATIO: tl.constexpr):
    """Weights [cells, bins] along one axis: the samples of bins that begin at `start`, each a hat one cell wide."""
    weights = tl.zeros((cell.shape[0], start.shape[0]), start.dtype)
    if SAMPLING_RATIO > 0:
        for i in tl.static_range(SAMPLING_RATIO):
            weights += _hat_of_sample(start + (i + 0.5) * step, cell, length)
    else:
        for i in range(grid):
            weights += _hat_of_sample(start + (i + 0.5) * step, cell, length)
    return weights


@triton.jit
def _hat_of_sample(position, cell, length):
    inside = (position >= -1.0) & (position <= length)
    position = tl.minimum(tl.maximum(position, 0.0), (length - 1).to(position.dtype))
    position = tl.where(inside, position, -2.0)  # far from every cell
    return tl.maximum(1.0 - tl.abs(position[None, :] - cell[:, None].to(position.dtype)), 0.0)


@triton.jit
def _dot(weights, grad, total, PRECISION: tl.constexpr):
    """`total` + weights @ grad, exact to about the sum's own precision.

    "split": a half type's product with the weight as a sum of two halves, since one alone has 8 (bf16) or 11 bits.
    """
    if PRECISION == "split":
        high = weights.to(grad.dtype)
        low = (weights - high.to(weights.dtype)).to(grad.dtype)
        total = tl.dot(high, grad, total)
        return tl.dot(low, grad, total)
    elif PRECISION == "tf32x3" and is_cuda():
        return tl.dot(weights, grad.to(weights.dtype), total, input_precision="tf32x3")
    else:
        return tl.dot(weights, grad.to(weights.dtype), total, input_precision="ieee", out_dtype=total.dtype)


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
    y_start, y_bin, y_step, x_start, x_bin, x_step, weight = load_axes(row_ptr)
    y = y_start + row.to(y_start.dtype) * y_bin
    x = x_start + column.to(y_start.dtype) * x_bin

    mask = (row < POOLED_H) & (column < POOLED_W) & (channel < CHANNELS)
    grad_out_ptr += roi * (CHANNELS * POOLED_H * POOLED_W)
    grad = tl.load(grad_out_ptr + (row * POOLED_W + column) * CHANNELS + channel, mask, 0.0).to(y_start.dtype) * weight
    for iy in range(y_grid):
        y_low, y_high, wy_low, wy_high, y_inside = corners(y + (iy + 0.5) * y_step, height)
        low_ptr = image_ptr + y_low.to(tl.int64) * (width * CHANNELS) + channel
        high_ptr = image_ptr + y_high.to(tl.int64) * (width * CHANNELS) + channel
        for ix in range(x_grid):
            x_low, x_high, wx_low, wx_high, x_inside = corners(x + (ix + 0.5) * x_step, width)
            inside = mask & y_inside & x_inside
            tl.atomic_add(low_ptr + x_low * CHANNELS, grad * (wy_low * wx_low), inside, sem="relaxed")
            tl.atomic_add(low_ptr + x_high * CHANNELS, grad * (wy_low * wx_high), inside, sem="relaxed")
            tl.atomic_add(high_ptr + x_low * CHANNELS, grad * (wy_high * wx_low), inside, sem="relaxed")
            tl.atomic_add(high_ptr + x_high * CHANNELS, grad * (wy_high * wx_high), inside, sem="relaxed")
