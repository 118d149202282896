"""NCHW to NHWC: RoIAlign's kernels read and write runs of channels."""

import triton
import triton.language as tl


@triton.jit
def transpose_kernel(
    input_ptr,  # [N, rows, columns]
    out_ptr,  # [N, columns, rows]
    rows,
    columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Transposes one tile of one matrix: NCHW to NHWC with rows = C and columns = H * W."""
    tiles = tl.cdiv(columns, BLOCK_COLUMNS)
    matrix = (tl.program_id(0) // tiles).to(tl.int64) * rows * columns
    column = (tl.program_id(0) % tiles) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    source = row[:, None].to(tl.int64) * columns + column[None, :]
    tile = tl.load(input_ptr + matrix + source, (row < rows)[:, None] & (column < columns)[None, :])
    target = column[:, None].to(tl.int64) * rows + row[None, :]
    tl.store(out_ptr + matrix + target, tl.trans(tile), (column < columns)[:, None] & (row < rows)[None, :])
