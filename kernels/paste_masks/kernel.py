"""Masks into windows of the image: a program fills a stretch of one window's memory, some rows or parts of them."""

import triton
import triton.language as tl

from ..device import divide, load_boxes


@triton.jit
def _expand(low, high, BY: tl.constexpr):
    """Both ends of a box on one axis, moved apart as the border of zeros widens the mask: torchvision's order."""
    half = (high - low) * 0.5 * BY
    center = (high + low) * 0.5
    return center - half, center + half


@triton.jit
def _integer_box(boxes_ptr, mask, COLUMNS: tl.constexpr, FARTHEST: tl.constexpr):
    """`reference.integer_boxes` of one: the first and the last pixel on both axes."""
    x1, y1, x2, y2 = load_boxes(boxes_ptr, mask, mask >= 0, tl.float32)
    x1, x2 = _expand(x1, x2, (COLUMNS + 2) / COLUMNS)
    y1, y2 = _expand(y1, y2, (COLUMNS + 2) / COLUMNS)
    far = tl.maximum(tl.maximum(tl.abs(x1), tl.abs(x2)), tl.maximum(tl.abs(y1), tl.abs(y2)))
    # NaN, which a maximum may drop, is in both ends of an axis, and so in their sum.
    proper = (far < FARTHEST) & (x1 + x2 + y1 + y2 == x1 + x2 + y1 + y2)
    x1, y1 = tl.where(proper, x1, 0.0), tl.where(proper, y1, 0.0)
    x2, y2 = tl.where(proper, x2, -1.0), tl.where(proper, y2, -1.0)
    return x1.to(tl.int32), y1.to(tl.int32), x2.to(tl.int32), y2.to(tl.int32)


@triton.jit
def _rows_in(x, width, MOST: tl.constexpr):
    """x // width for x below width + MOST: a comparison, unless rows are short."""
    if width >= MOST:
        rows = (x >= width).to(tl.int32)
    else:
        rows = x // width
    return rows


@triton.jit
def _scale(size, CELLS: tl.constexpr):
    """Cells of the mask, border included, a pixel of its box."""
    return divide(tl.full((), CELLS + 2, tl.float32), tl.maximum(size, 1).to(tl.float32))


@triton.jit
def _sources(position, scale, CELLS: tl.constexpr):
    """The first of the two cells between which a pixel lies, from -1, in the border; the weight of the second.

    upsample_bilinear2d's for `align_corners=False`, in fp32.
    """
    at = scale * (position.to(tl.float32) + 0.5) - 0.5
    at = tl.minimum(tl.maximum(at, 0.0), CELLS + 1.0)  # also for pixels outside, whose cells are not read
    cell = at.to(tl.int32)
    return cell - 1, at - cell.to(tl.float32)


@triton.jit
def _interpolate(mask_ptr, x, y, scale_x, scale_y, inside, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The mask at pixels (x, y) of its box; 0 for those that are not inside."""
    column, weight_x = _sources(x, scale_x, COLUMNS)
    row, weight_y = _sources(y, scale_y, ROWS)
    # The border is not in memory: cells are from -1 to ROWS or COLUMNS, and the second of two never before the first.
    upper, lower = inside & (row >= 0) & (row < ROWS), inside & (row + 1 < ROWS)
    left, right = (column >= 0) & (column < COLUMNS), column + 1 < COLUMNS
    corner = mask_ptr + row * COLUMNS + column
    a = tl.load(corner, upper & left, 0.0).to(tl.float32)
    b = tl.load(corner + 1, upper & right, 0.0).to(tl.float32)
    c = tl.load(corner + COLUMNS, lower & left, 0.0).to(tl.float32)
    d = tl.load(corner + COLUMNS + 1, lower & right, 0.0).to(tl.float32)
    above = (1.0 - weight_x) * a + weight_x * b
    below = (1.0 - weight_x) * c + weight_x * d
    return (1.0 - weight_y) * above + weight_y * below


@triton.jit
def _meets(y, x, size, width, left, right, top, bottom):
    """Whether any of `size` pixels from (x, y) on, row after row, lies in the box: the first in its row, or a later."""
    row = tl.maximum(y + (x >= right).to(tl.int32), top)
    return (row < bottom) & ((row - y) * width + left - x < size)


@triton.jit
def _store(out_ptr, first, values, pixels, SIZE: tl.constexpr):
    """All at once, or, where some belong to a neighbouring window, one by one."""
    lane = tl.arange(0, SIZE)
    if (first >= 0) & (first + SIZE <= pixels):
        tl.store(out_ptr + lane, values)
    else:
        tl.store(out_ptr + lane, values, (first + lane >= 0) & (first + lane < pixels))


@triton.jit
def paste_masks_kernel(
    masks_ptr,  # [n, ROWS, COLUMNS] fp16, bf16 or fp32
    boxes_ptr,  # [n, 4]
    windows_ptr,  # [n, 4] int64 x, y, width, height; read if CROPS
    offsets_ptr,  # [n] int64, where each window begins in out; read if CROPS
    out_ptr,  # flat: uint8 if BINARY, else fp32
    height,  # of the image, which is the window if not CROPS
    width,
    threshold,
    programs,  # a mask
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FARTHEST: tl.constexpr,
    CROPS: tl.constexpr,
    BINARY: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
):
    """Fills up to STEPS blocks of a window; a block without a pixel of the box with zeros, others in parts.

    A block is a stretch of memory that begins at a multiple of 16, whatever the length of the rows, so that each thread
    stores 16 bytes of it at once (of a part: 4, it being smaller so that fewer pixels outside are computed).
    """
    mask = (tl.program_id(0) // programs).to(tl.int64)
    program = tl.program_id(0) % programs
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    window_x = 0
    window_y = 0
    if CROPS:
        window_x = tl.load(windows_ptr + mask * 4).to(tl.int32)
        window_y = tl.load(windows_ptr + mask * 4 + 1).to(tl.int32)
        width = tl.load(windows_ptr + mask * 4 + 2).to(tl.int32)
        height = tl.load(windows_ptr + mask * 4 + 3).to(tl.int32)
        offset = tl.load(offsets_ptr + mask)
    else:
        offset = mask * height * width
    pixels = width * height
    begin = program * (STEPS * BLOCK) - (offset % 16).to(tl.int32)
    if tl.maximum(begin, 0) >= pixels:
        return
    out_ptr += (offset // 16 + program.to(tl.int64) * (STEPS * BLOCK // 16)) * 16

    x1, y1, x2, y2 = _integer_box(boxes_ptr, mask, COLUMNS, FARTHEST)
    scale_x, scale_y = _scale(x2 - x1 + 1, COLUMNS), _scale(y2 - y1 + 1, ROWS)
    left, right = tl.maximum(x1 - window_x, 0), tl.minimum(x2 + 1 - window_x, width)
    top, bottom = tl.maximum(y1 - window_y, 0), tl.minimum(y2 + 1 - window_y, height)
    bottom = tl.where(left < right, bottom, 0)

    y = begin // width  # of the block's first pixel
    x = begin - y * width
    for step in range(0, tl.minimum(tl.cdiv(pixels - begin, BLOCK), STEPS)):
        first = begin + step * BLOCK
        if _meets(y, x, BLOCK, width, left, right, top, bottom):
            part_y, part_x = y, x
            for part in range(0, BLOCK, PART):
                values = tl.zeros((PART,), tl.float32)
                if _meets(part_y, part_x, PART, width, left, right, top, bottom):
                    column = part_x + tl.arange(0, PART)
                    rows = _rows_in(column, width, PART)
                    column -= rows * width
                    row = part_y + rows
                    inside = (column >= left) & (column < right) & (row >= top) & (row < bottom)
                    values = _interpolate(
                        masks_ptr + mask * (ROWS * COLUMNS), column + (window_x - x1), row + (window_y - y1),
                        scale_x, scale_y, inside, ROWS, COLUMNS,
                    )  # fmt: skip
                    values = tl.where(inside, values, 0.0)
                if BINARY:
                    stored = (values > threshold).to(dtype)
                else:
                    stored = values
                _store(out_ptr + step * BLOCK + part, first + part, stored, pixels, PART)
                rows = _rows_in(part_x + PART, width, PART)
                part_y, part_x = part_y + rows, part_x + PART - rows * width
        else:
            _store(out_ptr + step * BLOCK, first, tl.zeros((BLOCK,), dtype), pixels, BLOCK)
        rows = _rows_in(x + BLOCK, width, BLOCK)
        y, x = y + rows, x + BLOCK - rows * width
