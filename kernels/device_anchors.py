"""A Triton device function that makes up an anchor of a feature pyramid from its number."""

import triton
import triton.language as tl


@triton.jit
def grid_anchor(cells_ptr, index, per_cell, heights, widths, strides_y, strides_x):
    """x1, y1, x2, y2 (fp32) of the anchors numbered `index`, each in 0..A-1, of the grid that `kernel_arguments` gives.

    Bit-equal to `AnchorGrid.anchors()`: cell times stride is a whole number that fp32 holds, and is added once. Four
    numbers are loaded, out of the few that all anchors share. (Given anchors are the only cell of one level: the four
    are then the anchor.)
    """
    index = index.to(tl.int32)
    cell = index // per_cell
    # Cells before a level are counted in fp32, in which the extents come; there are never too many for it.
    number = cell.to(tl.float32)
    first = 0.0
    first_of_level = tl.zeros_like(number)
    level = tl.zeros_like(index)
    width = first_of_level + widths[0]
    stride_y = first_of_level + strides_y[0]
    stride_x = first_of_level + strides_x[0]
    for i in tl.static_range(1, len(heights)):
        first += heights[i - 1] * widths[i - 1]
        reached = number >= first
        first_of_level = tl.where(reached, first, first_of_level)
        level = tl.where(reached, i, level)
        width = tl.where(reached, widths[i], width)
        stride_y = tl.where(reached, strides_y[i], stride_y)
        stride_x = tl.where(reached, strides_x[i], stride_x)
    within = (number - first_of_level).to(tl.int32)
    columns = tl.maximum(width.to(tl.int32), 1)
    row = within // columns
    y = row.to(tl.float32) * stride_y
    x = (within - row * columns).to(tl.float32) * stride_x
    corner_ptr = cells_ptr + (level * per_cell + index - cell * per_cell).to(tl.int64) * 4
    x1 = x + tl.load(corner_ptr)
    y1 = y + tl.load(corner_ptr + 1)
    x2 = x + tl.load(corner_ptr + 2)
    y2 = y + tl.load(corner_ptr + 3)
    return x1, y1, x2, y2
