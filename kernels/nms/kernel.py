"""Greedy NMS in two kernels: all pairs into words of bits, on every processor; then a sweep over each group's words."""

import triton
import triton.language as tl

from ..device import intersection_over_union, load_boxes


@triton.jit
def _survey(boxes_ptr, valid_ptr, index, n):
    """Whether any of the boxes is valid; whether any of those has no area that `reference.screen` holds for."""
    x1, y1, x2, y2 = load_boxes(boxes_ptr, index, index < n, tl.float32)
    valid = tl.load(valid_ptr + index, index < n, 0).to(tl.int32)
    area = (x2 - x1) * (y2 - y1)
    return tl.max(valid, 0), tl.max(tl.where((area > 1e-9) & (area < 1e38), 0, valid), 0)


@triton.jit
def nms_words_kernel(
    boxes_ptr,  # [G, n, 4] fp32, best first
    valid_ptr,  # [G, n] uint8, 0 or 1
    classes_ptr,  # [G, n] integers; read if GROUPED
    words_ptr,  # [G, n, stride] int32: bit j of word w of row i is set if box i suppresses box 32 w + j
    n,
    stride,
    threshold,  # a number that fp32 holds
    share,  # an IoU is above the threshold where I > share * (A + B),
    slack,  # and is not where I <= slack * share * (A + B); negative: divide always. See `reference.screen`
    GROUPED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Compares BLOCK_ROWS boxes with 32 * BLOCK_WORDS others of their group, STEP rows at a time.

    A program is one warp: each lane holds a box of every word, and 32 lanes make that word. Divided is only where
    some pair of a step is too close to the threshold to tell without. Tiles below the diagonal, and those without a
    valid row or a valid column, are left unwritten: nobody heeds what they say.
    """
    row_tiles = tl.cdiv(n, BLOCK_ROWS)
    tiles = row_tiles * tl.cdiv(n, 32 * BLOCK_WORDS)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    first_row = (tl.program_id(0) % tiles % row_tiles) * BLOCK_ROWS
    first_word = (tl.program_id(0) % tiles // row_tiles) * BLOCK_WORDS
    if (first_word + BLOCK_WORDS) * 32 <= first_row:
        return
    boxes_ptr += group * n * 4
    valid_ptr += group * n
    classes_ptr += group * n
    words_ptr += group * n * stride
    some_row, odd_row = _survey(boxes_ptr, valid_ptr, first_row + tl.arange(0, BLOCK_ROWS), n)
    columns = first_word * 32 + tl.arange(0, 32 * BLOCK_WORDS)
    some_column, odd_column = _survey(boxes_ptr, valid_ptr, columns, n)
    if (some_row == 0) | (some_column == 0):
        return

    divide = odd_row | odd_column | tl.where(slack < 0, 1, 0)
    lane = tl.arange(0, 32)[None, None, :]
    column = (first_word + tl.arange(0, BLOCK_WORDS))[None, :, None] * 32 + lane
    x1, y1, x2, y2 = load_boxes(boxes_ptr, column, column < n, tl.float32)
    column_share = share * ((x2 - x1) * (y2 - y1))
    for start in range(0, BLOCK_ROWS, STEP):
        row = first_row + start + tl.arange(0, STEP)[:, None, None]
        box = boxes_ptr + tl.minimum(row, n - 1) * 4
        rx1, ry1, rx2, ry2 = tl.load(box), tl.load(box + 1), tl.load(box + 2), tl.load(box + 3)
        width = tl.maximum(tl.minimum(x2, rx2) - tl.maximum(x1, rx1), 0.0)
        height = tl.minimum(y2, ry2) - tl.maximum(y1, ry1)  # negative for some: their product is above no share
        intersection = width * height
        enough = share * ((rx2 - rx1) * (ry2 - ry1)) + column_share
        suppresses = intersection > enough
        close = ((intersection > slack * enough) ^ suppresses).to(tl.int32)
        if (tl.max(tl.max(tl.max(close, 0), 0), 0) | divide) != 0:
            iou = intersection_over_union(rx1, ry1, rx2, ry2, x1, y1, x2, y2)
            suppresses = iou > threshold  # false for NaN
        if GROUPED:
            classes = tl.load(classes_ptr + column, column < n, 0)
            suppresses &= tl.load(classes_ptr + tl.minimum(row, n - 1)) == classes
        bits = tl.sum(tl.where(suppresses, 1 << lane, 0), 2)
        at = first_row + start + tl.arange(0, STEP)[:, None]
        word = first_word + tl.arange(0, BLOCK_WORDS)[None, :]
        tl.store(words_ptr + at.to(tl.int64) * stride + word, bits, (at < n) & (word < stride))


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _load_words(words_ptr, stride, row, word, wanted):
    """Words [rows, words] of a group; 0 in rows that are not wanted."""
    inside = wanted[:, None] & (word < stride)[None, :]
    return tl.load(words_ptr + row.to(tl.int64)[:, None] * stride + word[None, :], inside, 0)


@triton.jit
def _settle(free, suppressed, lane):
    """Which of 32 boxes, a bit each, greedy NMS keeps of those that are free: [32] words say what each suppresses.

    The fixed point of "kept unless a kept, better box suppresses me": the first i boxes are right after i rounds, and
    all should be after a few.
    """
    suppressed = suppressed & (-2 << lane)  # worse boxes only
    kept = free
    before = ~free
    while kept != before:
        before = kept
        kept = free & ~tl.reduce(tl.where((kept >> lane) & 1 != 0, suppressed, 0), 0, _or)
    return kept


@triton.jit
def nms_sweep_kernel(
    words_ptr,  # [G, n, stride] int32
    valid_ptr,  # [G, n] uint8, 0 or 1
    keep_ptr,  # [G, n] uint8
    n,
    stride,
    WORDS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Settles one group's boxes from the best to the worst, 32 a step.

    The boxes of WORDS words at a time have a bit each in registers, set once a kept box suppresses them. Those words
    begin with what all boxes kept before them suppress, read BLOCK_ROWS rows at a time.
    """
    group = tl.program_id(0).to(tl.int64)
    words_ptr += group * n * stride
    valid_ptr += group * n
    keep_ptr += group * n
    lane = tl.arange(0, 32)

    for first in range(0, tl.cdiv(n, 32), WORDS):
        word = first + tl.arange(0, WORDS)
        box = word[:, None] * 32 + lane[None, :]
        removed = tl.sum((tl.load(valid_ptr + box, box < n, 0) == 0).to(tl.int32) << lane[None, :], 1)
        tl.debug_barrier()  # the flags that are read here were stored by other threads of this program
        for start in range(0, first * 32, BLOCK_ROWS):
            row = start + tl.arange(0, BLOCK_ROWS)
            is_kept = tl.load(keep_ptr + row, row < first * 32, 0) != 0
            removed |= tl.reduce(_load_words(words_ptr, stride, row, word, is_kept), 0, _or)

        row = first * 32 + lane
        rows = _load_words(words_ptr, stride, row, word, row < n)
        diagonal = tl.load(words_ptr + row.to(tl.int64) * stride + first, row < n, 0)
        for step in range(first, tl.minimum(first + WORDS, tl.cdiv(n, 32))):
            # The next step's words are under way while this one is settled: their addresses do not depend on it.
            next_row = row + 32
            next_rows = _load_words(words_ptr, stride, next_row, word, next_row < n)
            next_diagonal = tl.load(words_ptr + next_row.to(tl.int64) * stride + step + 1, next_row < n, 0)

            kept = _settle(~tl.sum(tl.where(word == step, removed, 0), 0), diagonal, lane)
            is_kept = (kept >> lane) & 1
            tl.store(keep_ptr + row, is_kept.to(tl.uint8), row < n)
            removed |= tl.reduce(tl.where(is_kept[:, None] != 0, rows, 0), 0, _or)
            row, rows, diagonal = next_row, next_rows, next_diagonal
