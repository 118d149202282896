"""Masks of detections as COCO run lengths, without pasting any beyond its box."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from kernels import paste_mask_crops

from ..data.rle import crop_runs, runs_to_rle

PIXELS_AT_ONCE = 1 << 24
"""Of masks on their way to run lengths, or one column: memory does not grow with the image or with their number."""


def paste_as_rle(masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float, windows: Tensor) -> list[dict]:
    """Probabilities [n, M, M] in their boxes [n, 4] -> n COCO RLE dictionaries of an image of `size`.

    Args:
        masks, boxes: on one device.
        size: height and width.
        threshold: of the probabilities.
        windows: `kernels.mask_windows` of them, [n, 4] on the CPU.
    """
    owners, strips = _strips(windows, PIXELS_AT_ONCE)
    runs: list[list[np.ndarray]] = [[] for _ in masks]
    for owner, part in _chunks(owners, strips, PIXELS_AT_ONCE):
        index = owner.to(masks.device, non_blocking=True)
        pixels = paste_mask_crops(masks[index], boxes[index], size, threshold, windows=part).pixels
        found = crop_runs(pixels.cpu().numpy(), part.numpy(), size[0])
        for i, run in zip(owner.tolist(), found, strict=True):
            runs[i].append(run)
    return [runs_to_rle(run, size) for run in runs]


def _strips(windows: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Windows [n, 4] (x, y, width, height) cut from left to right into strips of at most so many pixels, or a column.

    Returns:
        owners [k], the window that each strip is of, in order, and the strips [k, 4]; none of empty windows.
    """
    rows = [
        (i, first, y, min(step, x + width - first), height)
        for i, (x, y, width, height) in enumerate(windows.tolist())
        for step in [max(most // max(height, 1), 1)]
        for first in range(x, x + width, step)
    ]
    table = torch.tensor(rows, dtype=torch.int64).view(-1, 5)
    return table[:, 0], table[:, 1:]


def _chunks(owners: Tensor, strips: Tensor, most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Consecutive strips, together at most so many pixels, or a single one."""
    begin = held = 0
    for i, pixels in enumerate((strips[:, 2] * strips[:, 3]).tolist()):
        if i > begin and held + pixels > most:
            yield owners[begin:i], strips[begin:i]
            begin, held = i, 0
        held += pixels
    if len(strips):
        yield owners[begin:], strips[begin:]
