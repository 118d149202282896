"""Where each RoI lies: computed once, as a table that the forward and every backward read.

What a RoI's geometry decides is decided here (level, samples a bin, which cells it can touch), so that forward and
backward cannot disagree, and with IEEE division and no fused multiply-adds, so that they are the
reference's. A row of the table is 16 words of 4 bytes (8 for fp64), floats stored as their bits:

    0 y_start  1 y_bin               start and bin size in cells, fp32 (fp64)
    2 x_start  3 x_bin
    4 weight                         of one sample: 1 / samples a bin
    5, 6                             free
    7 whole                          1 where every sample lies inside the map: no load needs a mask
    8 level    9 image
    10 y_grid  11 x_grid             samples a bin
    12 y_first 13 y_last             the cells that samples may touch, both ends included; last < first: none
    14 x_first 15 x_last
"""

import triton
import triton.language as tl

from ..device import divide
from . import reference

TABLE_COLUMNS = tl.constexpr(16)
"""Words of a RoI in the table."""
MOST_SAMPLES = tl.constexpr(reference.MOST_SAMPLES)


@triton.jit
def roi_geometry_kernel(
    rois_ptr,  # [K, 5] batch index, x1, y1, x2, y2
    table_ptr,  # [K, 16] int32 (int64 for fp64 RoIs)
    number,  # K
    batch_size,
    heights,  # tuple of L
    widths,  # tuple of L
    SCALES: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    LEVELS: tl.constexpr,
    POOLED_H: tl.constexpr,
    POOLED_W: tl.constexpr,
    SAMPLING_RATIO: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the rows of BLOCK RoIs."""
    roi = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = roi < number
    roi = roi.to(tl.int64)
    batch = tl.load(rois_ptr + roi * 5, mask, 0.0)
    x1 = tl.load(rois_ptr + roi * 5 + 1, mask, 0.0)
    y1 = tl.load(rois_ptr + roi * 5 + 2, mask, 0.0)
    x2 = tl.load(rois_ptr + roi * 5 + 3, mask, 0.0)
    y2 = tl.load(rois_ptr + roi * 5 + 4, mask, 0.0)

    area = (x2 - x1) * (y2 - y1)
    level = tl.zeros((BLOCK,), tl.int32)
    height = level + heights[0]
    width = level + widths[0]
    scale = tl.zeros_like(area) + SCALES[0]
    for i in tl.static_range(1, LEVELS):
        on_level = area >= tl.zeros_like(area) + THRESHOLDS[i - 1]  # in the area's own precision
        level = tl.where(on_level, i, level)
        height = tl.where(on_level, heights[i], height)
        width = tl.where(on_level, widths[i], width)
        scale = tl.where(on_level, tl.zeros_like(area) + SCALES[i], scale)

    y_start, y_bin, y_grid, y_first, y_last, y_whole = _axis(y1, y2, scale, height, POOLED_H, SAMPLING_RATIO, ALIGNED)
    x_start, x_bin, x_grid, x_first, x_last, x_whole = _axis(x1, x2, scale, width, POOLED_W, SAMPLING_RATIO, ALIGNED)
    in_batch = (batch >= 0) & (batch < batch_size)  # NaN is not
    count = y_grid.to(area.dtype) * x_grid.to(area.dtype)  # beyond int32 where it is too many
    touches = in_batch & (y_first <= y_last) & (x_first <= x_last) & (count <= MOST_SAMPLES)
    # A RoI that reads nothing: its samples lie nowhere, and nobody walks them.
    y_start = tl.where(touches, y_start, float("nan"))
    y_last = tl.where(touches, y_last, -1)
    y_grid = tl.where(touches, y_grid, 0)
    x_grid = tl.where(touches, x_grid, 0)
    whole = touches & y_whole & x_whole
    count = tl.maximum(count, 1.0)

    row_ptr = table_ptr + roi * TABLE_COLUMNS
    _store_float(row_ptr, y_start, mask)
    _store_float(row_ptr + 1, y_bin, mask)
    _store_float(row_ptr + 2, x_start, mask)
    _store_float(row_ptr + 3, x_bin, mask)
    _store_float(row_ptr + 4, divide(tl.zeros_like(count) + 1.0, count), mask)
    tl.store(row_ptr + 7, whole.to(tl.int32), mask)
    tl.store(row_ptr + 8, level, mask)
    tl.store(row_ptr + 9, tl.where(in_batch, batch, 0.0).to(tl.int32), mask)
    tl.store(row_ptr + 10, y_grid, mask)
    tl.store(row_ptr + 11, x_grid, mask)
    tl.store(row_ptr + 12, y_first, mask)
    tl.store(row_ptr + 13, y_last, mask)
    tl.store(row_ptr + 14, x_first, mask)
    tl.store(row_ptr + 15, x_last, mask)


@triton.jit
def _axis(low, high, scale, length, BINS: tl.constexpr, SAMPLING_RATIO: tl.constexpr, ALIGNED: tl.constexpr):
    """One axis of RoIs: start, bin, grid, first and last cell, and whether all samples are inside the map."""
    OFFSET: tl.constexpr = 0.5 if ALIGNED else 0.0
    start = low * scale - OFFSET
    extent = high * scale - OFFSET - start
    if not ALIGNED:
        extent = tl.where(extent < 1.0, 1.0, extent)  # NaN stays NaN, and its samples lie nowhere
    bin_size = divide(extent, tl.zeros_like(extent) + BINS)
    if SAMPLING_RATIO > 0:
        grid = tl.zeros_like(length) + SAMPLING_RATIO
    else:
        # A RoI that is not finite, or far beyond all maps, has no samples: it would keep the GPU for ever.
        grid = tl.where(bin_size < MOST_SAMPLES, tl.ceil(bin_size), 0.0).to(tl.int32)

    # Positions rise with the sample and the bin, or fall where the RoI is inverted: the ends bound them all.
    samples = tl.maximum(grid, 1)
    at_start = start + 0.0 * bin_size + sample_offset(bin_size, 0, samples, SAMPLING_RATIO)
    last_offset = sample_offset(bin_size, (samples - 1).to(start.dtype), samples, SAMPLING_RATIO)
    at_end = start + (BINS - 1.0) * bin_size + last_offset
    lowest = tl.minimum(at_start, at_end)
    highest = tl.maximum(at_start, at_end)
    end = (length - 1).to(start.dtype)
    touches = (highest >= -1.0) & (lowest <= end + 1.0) & (grid > 0)
    whole = (lowest >= -1.0) & (highest <= end + 1.0)
    first = tl.minimum(tl.maximum(tl.where(touches, lowest, 0.0), 0.0), end).to(tl.int32)
    last = tl.minimum(tl.maximum(tl.where(touches, highest, 0.0), 0.0), end).to(tl.int32) + 1
    last = tl.where(touches, tl.minimum(last, length - 1), -1)
    return start, bin_size, grid, first, last, whole


@triton.jit
def sample_offset(bin_size, i, grid, SAMPLING_RATIO: tl.constexpr):
    """How far sample `i` of a bin lies from where the bin begins: (i + 0.5) * bin / grid, rounded as in torchvision."""
    if SAMPLING_RATIO == 1 or SAMPLING_RATIO == 2 or SAMPLING_RATIO == 4:
        return (i + 0.5) * (1.0 / SAMPLING_RATIO) * bin_size  # the same bits: the division is by a power of two
    else:
        return divide((i + 0.5) * bin_size, grid.to(bin_size.dtype))


@triton.jit
def corners(position, length):
    """The two cells around each sample along one axis: (low, high, weight of low, of high, inside the map).

    A sample counts from one cell before the map to its far edge, both included; NaN never does.
    """
    inside = (position >= -1.0) & (position <= length)
    position = tl.maximum(tl.where(inside, position, 0.0), 0.0)
    low = tl.minimum(position.to(tl.int32), length - 1)
    high = tl.minimum(low + 1, length - 1)
    high_weight = tl.where(low < length - 1, position - low.to(position.dtype), 0.0)
    return low, high, 1.0 - high_weight, high_weight, inside


@triton.jit
def load_axes(row_ptr):
    """The floats of a RoI's row, fp32 or fp64: y_start, y_bin, x_start, x_bin, weight."""
    DTYPE: tl.constexpr = tl.float64 if row_ptr.dtype.element_ty == tl.int64 else tl.float32
    y_start = tl.load(row_ptr).to(DTYPE, bitcast=True)
    y_bin = tl.load(row_ptr + 1).to(DTYPE, bitcast=True)
    x_start = tl.load(row_ptr + 2).to(DTYPE, bitcast=True)
    x_bin = tl.load(row_ptr + 3).to(DTYPE, bitcast=True)
    weight = tl.load(row_ptr + 4).to(DTYPE, bitcast=True)
    return y_start, y_bin, x_start, x_bin, weight


@triton.jit
def map_of(row_ptr, maps, heights, widths, CHANNELS: tl.constexpr, LEVELS: tl.constexpr):
    """The map that a RoI lies on: (pointer to its image's map, height, width)."""
    map_ptr, height, width = select_level(tl.load(row_ptr + 8).to(tl.int32), maps, heights, widths, LEVELS)
    image = tl.load(row_ptr + 9).to(tl.int64)
    return map_ptr + image * height * width * CHANNELS, height, width


@triton.jit
def select_level(level, maps, heights, widths, LEVELS: tl.constexpr):
    """(pointer, height, width) of one level: tuples have no index that is known only when the kernel runs."""
    map_ptr = maps[0]
    height = heights[0]
    width = widths[0]
    for i in tl.static_range(1, LEVELS):
        if level == i:
            map_ptr = maps[i]
            height = heights[i]
            width = widths[i]
    return map_ptr, height, width


@triton.jit
def _store_float(ptr, value, mask):
    tl.store(ptr, value.to(ptr.dtype.element_ty, bitcast=True), mask)
