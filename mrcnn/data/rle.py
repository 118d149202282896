"""COCO's masks: polygons, run lengths, bitmaps, through faster-coco-eval's port of pycocotools."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

# A polygon is rasterised with memory proportional to its perimeter: bound it, also for damaged files.
_MAX_COORDINATE = 1e6

_MAX_GROUPS = 8  # 40 bits


def mask_api() -> ModuleType:
    """Import `faster_coco_eval.core.mask`, which encodes and decodes COCO's run-length masks.

    Raises:
        ImportError: the package is not installed; the message says how to install it.
    """
    try:
        from faster_coco_eval.core import mask
    except ImportError as error:
        message = "COCO masks and metrics need the package faster-coco-eval: pip install faster-coco-eval"
        raise ImportError(message) from error
    return mask


def segmentation_to_rle(segmentation: list | dict, height: int, width: int) -> dict:
    """Convert any of COCO's three segmentation forms to one compressed RLE.

    Args:
        segmentation: a list of polygons `[x0, y0, x1, y1, ...]` in pixels, whose union is the object (parts
            with fewer than three points are left out), or an RLE dict with `size` `[height, width]` and
            `counts` as a list of run lengths or as COCO's compressed string.
        height: of the image, in pixels.
        width: of the image, in pixels.

    Returns:
        `{"size": [height, width], "counts": bytes}`.

    Raises:
        ValueError: the segmentation is malformed or does not fit an image of this size.
    """
    api = mask_api()
    if isinstance(segmentation, dict):
        counts = segmentation.get("counts")
        if list(segmentation.get("size", ())) != [height, width]:
            raise ValueError(f"the RLE is not of size {[height, width]}")
        if isinstance(counts, list):
            return api.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        counts = counts.encode() if isinstance(counts, str) else counts
        if not isinstance(counts, bytes):
            raise ValueError("the RLE has no counts")
        return {"size": [height, width], "counts": counts}
    if not isinstance(segmentation, list):
        raise ValueError("neither polygons nor an RLE")
    # The API would read a "polygon" of four numbers as a box, as COCO's own does.
    parts = [part for part in segmentation if isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0]
    if not parts or not all(is_number(v) and abs(v) < _MAX_COORDINATE for part in parts for v in part):
        raise ValueError("no polygon with three points or more")
    return api.merge(api.frPyObjects(parts, height, width))


def run_lengths(counts: bytes) -> np.ndarray:
    """The run lengths, int64, of COCO's compressed string: background, object, background, ..., down the columns.

    Each number is a little-endian sequence of 5-bit groups, bit 5 of a byte saying that another follows; from
    the fourth on it is the difference to the run two before (cocoapi, maskApi.c, rleFrString).

    Raises:
        ValueError: the string breaks off within a number, a number has more groups than an image's pixels need, or a
            run is negative.
    """
    groups = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    last = groups & 32 == 0
    ends = np.flatnonzero(last)
    if not len(groups) or not last[-1]:
        raise ValueError("the RLE breaks off")
    lengths = np.diff(ends, prepend=-1)
    if lengths.max() > _MAX_GROUPS:
        raise ValueError("a run of the RLE is too long")
    starts = ends - lengths + 1
    shift = 5 * (np.arange(len(groups)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((groups & 31) << shift, starts)
    runs -= np.where(groups[ends] & 16, 32 << shift[ends], 0)  # the sign
    runs[1::2], runs[2::2] = runs[1::2].cumsum(), runs[2::2].cumsum()
    if runs.min() < 0:
        raise ValueError("a run of the RLE is negative")
    return runs


def decode_masks(counts: Sequence[bytes], height: int, width: int) -> np.ndarray:
    """Compressed run lengths of n masks of an image -> uint8 [n, height, width] of 0 and 1, each row by row.

    What `mask_api().decode` gives, but transposed: COCO's runs go down the columns. Decoded and turned round is only
    the rectangle that an object fills, a small part of most images.

    Raises:
        ValueError: run lengths that are malformed or do not fill the image.
    """
    masks = np.zeros((len(counts), height, width), np.uint8)
    for mask, string in zip(masks, counts, strict=True):
        runs = run_lengths(string)
        if runs.sum() != height * width:
            raise ValueError(f"the RLE is not of {height} x {width} pixels")
        runs = runs[: len(runs) // 2 * 2]  # without the background after the last object's run
        first = int(runs[0]) // height if len(runs) else 0
        runs[:1] -= first * height
        columns = -(-int(runs.sum()) // height)
        bits = np.zeros((columns, height), np.uint8)
        bits.reshape(-1)[: runs.sum()] = np.repeat(np.arange(len(runs), dtype=np.uint8) & 1, runs)
        rows = np.flatnonzero(bits.any(0))
        if len(rows):
            top, bottom = rows[0], rows[-1] + 1
            mask[top:bottom, first : first + columns] = bits[:, top:bottom].T
    return masks


def masks_to_rle(masks: Tensor) -> list[dict]:
    """Bool or uint8 masks [n, H, W] on any device -> n dicts with size [H, W] and counts, which `json.dump` accepts."""
    if len(masks) == 0:
        return []
    bitmaps = masks.detach().cpu().numpy().astype(np.uint8)
    rles = mask_api().encode(np.asfortranarray(bitmaps.transpose(1, 2, 0)))
    return [{"size": list(rle["size"]), "counts": rle["counts"].decode()} for rle in rles]


def crop_runs(pixels: np.ndarray, windows: np.ndarray, height: int) -> Iterator[np.ndarray]:
    """The runs of set pixels in windows of images `height` pixels high, whose columns COCO's counts go down.

    Args:
        pixels: [P] bool or uint8, the windows one after the other, each row by row.
        windows: [k, 4] integers: x, y, width, height, inside the image.
        height: of the image.

    Yields:
        int64 [2, r] for each window: first places, and places behind the last, in the whole image's column-major order.
        A run ends with its column.
    """
    at = 0
    for x, y, columns, rows in windows.tolist():
        # A zero before all and one below each column: every run begins and ends with a change.
        padded = np.zeros(1 + columns * (rows + 1), np.uint8)
        padded[1:].reshape(columns, rows + 1)[:, :rows] = pixels[at : at + columns * rows].reshape(rows, columns).T
        column, row = np.divmod(np.flatnonzero(padded[1:] != padded[:-1]), rows + 1)
        yield ((x + column) * height + y + row).reshape(-1, 2).T
        at += columns * rows


def runs_to_rle(runs: list[np.ndarray], size: tuple[int, int]) -> dict:
    """The runs [2, r] that `crop_runs` finds in windows of one mask -> a dict with size [H, W] and counts.

    The windows must not overlap.
    """
    ends = np.concatenate([np.zeros((2, 0), np.int64), *runs], axis=1)
    ends, times = np.unique(ends, return_counts=True)
    ends = ends[times == 1]  # where one run ends another may begin, in the next column: the two are one
    counts = np.diff(ends, prepend=0, append=size[0] * size[1]).tolist()
    if counts[-1] == 0:  # only the first may be
        counts.pop()
    rle = mask_api().frPyObjects({"size": list(size), "counts": counts}, *size)
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def crops_to_rle(pixels: Tensor, windows: Tensor, size: tuple[int, int]) -> list[dict]:
    """Masks known in a window each (`kernels.paste_mask_crops`) -> `masks_to_rle` of the whole, which is never formed.

    Args:
        pixels: [P] bool or uint8 on any device, the windows one after the other, each row by row.
        windows: [n, 4] int64: x, y, width, height, inside the image.
        size: height and width of the image.

    Raises:
        TypeError, ValueError: pixels that are not bool or uint8, or not those of the windows; a window outside `size`.
    """
    if pixels.dtype not in (torch.bool, torch.uint8):
        raise TypeError(f"pixels must be bool or uint8 (paste with a threshold), got {pixels.dtype}")
    if (windows[:, :2] + windows[:, 2:] > windows.new_tensor([size[1], size[0]])).any():
        raise ValueError(f"windows (x, y, width, height) must lie in the image of {size[0]} x {size[1]} pixels")
    if len(pixels) != windows[:, 2:].prod(1).sum():
        raise ValueError(f"{len(pixels)} pixels are not those of the windows")
    runs = crop_runs(pixels.detach().cpu().numpy(), windows.cpu().numpy(), size[0])
    return [runs_to_rle([run], size) for run in runs]


def is_number(value: object) -> bool:
    """Whether a value from a JSON file is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
