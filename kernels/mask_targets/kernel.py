"""Mask targets as a Triton kernel: RoIAlign of one bitmap, cell by cell.

torchvision averages samples, each interpolated between four pixels. Seen from the pixels it is a sum over the few cells
that a bin touches: out[p, q] = sum_i sum_j wy[i, p] wx[j, q] mask[cell_y(p) + i, cell_x(q) + j] / samples, where a
weight is the sum of the hats of all samples of that bin and axis. A box of b pixels a bin has ceil(b)^2 samples, of 4
pixels each, but touches (ceil(b) + 1)^2 cells, and the weights of an axis are the same for all bins of the other.
"""

import triton
import triton.language as tl

from ..device import divide
from . import reference

LONGEST = tl.constexpr(reference.LONGEST)


@triton.jit
def _axis(low, high, length, bin, SIZE: tl.constexpr, ALIGNED: tl.constexpr):
    """One axis of a box: starts of bins, their size, samples of each; cells where they begin, how many they touch."""
    if ALIGNED:
        low -= 0.5
        high -= 0.5
    extent = high - low
    if not ALIGNED:
        extent = tl.maximum(extent, 1.0, propagate_nan=tl.PropagateNan.ALL)  # NaN would be a pixel wide
    bin_size = divide(extent, extent * 0.0 + SIZE)
    usable = (extent <= LONGEST * length) & (tl.abs(low) <= LONGEST * length + 1)  # NaN is not
    samples = tl.where(usable, tl.maximum(tl.ceil(bin_size), 0.0), 0.0).to(tl.int32)
    start = low + bin * bin_size
    first = start + _offset(0, bin_size, samples)
    last = start + _offset(samples - 1, bin_size, samples)
    top = (length - 1).to(low.dtype)
    begin = tl.minimum(tl.maximum(first, 0.0), top).to(tl.int32)
    end = tl.minimum(tl.maximum(last, 0.0), top).to(tl.int32) + 1
    touched = tl.where(samples > 0, tl.max(end - begin, 0) + 1, 0)
    return start, bin_size, samples, begin, touched


@triton.jit
def _offset(sample, bin_size, samples):
    """Of a sample from the start of its bin, rounded as torchvision rounds it."""
    return divide((sample + 0.5) * bin_size, tl.maximum(samples, 1).to(bin_size.dtype))


@triton.jit
def _store_weights(
    table_ptr, axis, first, length, visible_from, visible_to, CELLS: tl.constexpr, BINS: tl.constexpr
):  # fmt: skip
    """Weights [CELLS, BINS] of the cells from `first` on that each bin touches; 0 where the bitmap does not reach."""
    start, bin_size, samples, begin, _ = axis
    step = tl.arange(0, CELLS)
    cell = begin[None, :] + first + step[:, None]
    total = tl.zeros((CELLS, BINS), start.dtype)
    for sample in range(samples):
        position = start + _offset(sample, bin_size, samples)
        counts = (position >= -1.0) & (position <= length)
        position = tl.minimum(tl.maximum(position, 0.0), (length - 1).to(start.dtype))
        weight = tl.maximum(1.0 - tl.abs(position[None, :] - cell), 0.0)
        total += tl.where(counts[None, :], weight, 0.0)
    total = tl.where((cell >= visible_from) & (cell < visible_to), total, 0.0)
    tl.store(table_ptr + step[:, None] * BINS + tl.arange(0, BINS)[None, :], total)


@triton.jit
def mask_targets_kernel(
    bitmaps_ptr,  # [P] uint8
    offset_ptr,  # [B, G] int64
    extent_ptr,  # [B, G, 4] int32
    sizes_ptr,  # [B, 2] int64
    boxes_ptr,  # [B, S, 4] fp32 or fp64
    matched_ptr,  # [B, S] int32 or int64
    table_ptr,  # [B * S, tiles, 2, CELLS, BINS] of the boxes' dtype, scratch
    out_ptr,  # [B, S, SIZE, SIZE] of the boxes' dtype, or uint8
    rois,  # S
    slots,  # G
    SIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PACKED: tl.constexpr,
    CELLS: tl.constexpr,
    BINS: tl.constexpr,
):
    """Program = (RoI, tile of BINS x BINS bins)."""
    roi = tl.program_id(0).to(tl.int64)
    tiles: tl.constexpr = (SIZE + BINS - 1) // BINS
    first_y = tl.program_id(1) // tiles * BINS
    first_x = tl.program_id(1) % tiles * BINS
    lane = tl.arange(0, BINS)
    bin_y = tl.minimum(first_y + lane, SIZE - 1)
    bin_x = tl.minimum(first_x + lane, SIZE - 1)

    image = roi // rois
    matched = tl.load(matched_ptr + roi).to(tl.int64)
    known = (matched >= 0) & (matched < slots)
    slot = image * slots + tl.where(known, matched, 0)
    x0 = tl.load(extent_ptr + slot * 4, known, 0)  # there may be no slot at all
    y0 = tl.load(extent_ptr + slot * 4 + 1, known, 0)
    x1 = tl.load(extent_ptr + slot * 4 + 2, known, 0)
    y1 = tl.load(extent_ptr + slot * 4 + 3, known, 0)
    height = tl.load(sizes_ptr + image * 2).to(tl.int32)
    width = tl.load(sizes_ptr + image * 2 + 1).to(tl.int32)
    box_ptr = boxes_ptr + roi * 4
    axis_y = _axis(tl.load(box_ptr + 1), tl.load(box_ptr + 3), height, bin_y, SIZE, ALIGNED)
    axis_x = _axis(tl.load(box_ptr), tl.load(box_ptr + 2), width, bin_x, SIZE, ALIGNED)
    visible = (x1 > x0) & (y1 > y0)
    touched_y = tl.where(visible, axis_y[4], 0)
    touched_x = tl.where(visible, axis_x[4], 0)

    bitmap_ptr = bitmaps_ptr + tl.load(offset_ptr + slot, known, 0)
    pitch = (x1 - x0 + 7) // 8 if PACKED else x1 - x0
    table_y_ptr = table_ptr + (roi * (tiles * tiles) + tl.program_id(1)) * (2 * CELLS * BINS)
    table_x_ptr = table_y_ptr + CELLS * BINS
    total = tl.zeros((BINS, BINS), table_ptr.dtype.element_ty)
    for near_y in range(0, touched_y, CELLS):
        tl.debug_barrier()  # nobody reads the last table any more
        _store_weights(table_y_ptr, axis_y, near_y, height, y0, y1, CELLS, BINS)
        for near_x in range(0, touched_x, CELLS):
            tl.debug_barrier()
            _store_weights(table_x_ptr, axis_x, near_x, width, x0, x1, CELLS, BINS)
            tl.debug_barrier()  # all of both tables is there
            for i in range(0, tl.minimum(touched_y - near_y, CELLS)):
                row = tl.minimum(tl.maximum(axis_y[3] + (near_y + i) - y0, 0), y1 - y0 - 1) * pitch
                along = tl.zeros((BINS, BINS), total.dtype)
                for j in range(0, tl.minimum(touched_x - near_x, CELLS)):
                    column = tl.minimum(tl.maximum(axis_x[3] + (near_x + j) - x0, 0), x1 - x0 - 1)
                    weight = tl.load(table_x_ptr + j * BINS + lane)
                    if PACKED:
                        byte = tl.load(bitmap_ptr + row[:, None] + (column >> 3)[None, :]).to(tl.int32)
                        inside = byte & (1 << (column & 7))[None, :]
                    else:
                        inside = tl.load(bitmap_ptr + row[:, None] + column[None, :])
                    along += tl.where(inside != 0, weight[None, :], 0.0)
                total += tl.load(table_y_ptr + i * BINS + lane)[:, None] * along

    total = divide(total, tl.maximum(axis_y[2] * axis_x[2], 1).to(total.dtype) + total * 0.0)
    if out_ptr.dtype.element_ty == tl.uint8:
        total = total >= 0.5
    y = (first_y + lane)[:, None]
    x = (first_x + lane)[None, :]
    out = out_ptr + roi * (SIZE * SIZE) + y * SIZE + x
    tl.store(out, total.to(out_ptr.dtype.element_ty), (y < SIZE) & (x < SIZE))
