"""COCO's masks: polygons, run lengths, bitmaps, through faster-coco-eval's port of pycocotools."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
from torch import Tensor

# A polygon is rasterised with memory proportional to its perimeter: bound it, also for damaged files.
_MAX_COORDINATE = 1e6


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


def masks_to_rle(masks: Tensor) -> list[dict]:
    """Bool or uint8 masks [n, H, W] on any device -> n dicts with size [H, W] and counts, which `json.dump` accepts."""
    if len(masks) == 0:
        return []
    bitmaps = masks.detach().cpu().numpy().astype(np.uint8)
    rles = mask_api().encode(np.asfortranarray(bitmaps.transpose(1, 2, 0)))
    return [{"size": list(rle["size"]), "counts": rle["counts"].decode()} for rle in rles]


def is_number(value: object) -> bool:
    """Whether a value from a JSON file is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
