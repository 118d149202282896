"""Landscape, portrait or square: batches of one kind have one shape the whole run.

With a shape of its own for every batch, torch.compile and CUDA graphs would begin anew again and again; with one shape
for all, four of ten pixels that the model sees would be padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .augment import resized_size

if TYPE_CHECKING:
    from ..config import DataConfig
    from .coco import CocoDataset
    from .shapes import ShapesDataset

LANDSCAPE, PORTRAIT, SQUARE = "landscape", "portrait", "square"
DIVISOR = 32  # the stride of the coarsest FPN input
POOL_BYTES = 4096  # a mask pool's length is a multiple of it


@dataclass(frozen=True)
class Bucket:
    """The shapes of every batch of one kind."""

    size: tuple[int, int]  # height and width
    pool_bytes: int  # of the batch's masks (`kernels.MaskPool.bitmaps`)


def kind_of(height: int, width: int) -> str:
    """Of an image before any transform; what rounding makes of it does not matter."""
    return LANDSCAPE if width > height else PORTRAIT if height > width else SQUARE


def group_by_kind(order: Iterable[tuple[int, int]], kinds: Sequence[str], batch: int) -> Iterator[tuple[int, int]]:
    """The (position, index) of `order`, so put that each `batch` of them in turn are of one of `kinds`, index by index.

    Samples wait until enough of their kind have come, in the next pass over the data where this one has too few: none
    is left out or taken twice. At most `batch` - 1 of each kind wait, so that an endless `order` never starves; what
    waits when a run ends is not trained on.
    """
    waiting: dict[str, list[tuple[int, int]]] = {}
    for item in order:
        kind = kinds[item[1]]
        waiting.setdefault(kind, []).append(item)
        if len(waiting[kind]) == batch:
            yield from waiting.pop(kind)


def find_buckets(
    dataset: CocoDataset | ShapesDataset, data: DataConfig, slots: int, batches: Iterable[Sequence[int]]
) -> dict[str, Bucket]:
    """By kind, the smallest shapes that hold every batch of a run at the largest scale of its augmentation.

    The images' size follows from all images of the kind, the masks' bytes from `batches`, the indices of each batch:
    the fullest one a data set could give is many times the fullest that occurs.
    """
    resized = {size: resized_size(*size, data.image_size, data.max_size) for size in set(dataset.sizes)}
    kinds = [kind_of(*size) for size in dataset.sizes]
    needed = _mask_bytes(dataset, resized, slots)
    most: dict[str, int] = {}
    for batch in batches:
        kind = kinds[batch[0]]
        most[kind] = max(most.get(kind, 1), sum(needed[index] for index in batch))
    buckets = {}
    for kind in set(kinds):
        sides = zip(*(after for before, after in resized.items() if kind_of(*before) == kind), strict=True)
        height, width = (round_up(max(side), DIVISOR) for side in sides)
        buckets[kind] = Bucket((height, width), round_up(most.get(kind, 1), POOL_BYTES))
    return buckets


def _mask_bytes(dataset: CocoDataset | ShapesDataset, resized: dict, slots: int) -> list[int]:
    """At most how many bytes the packed masks of each image take: their rectangles, resized, in rows of whole bytes."""
    found = []
    for size, objects in zip(dataset.sizes, dataset.object_sizes(), strict=True):
        # Nearest neighbours of n pixels are at most ceil(n x factor) of them; one more for the factor's rounding.
        height, width = (np.ceil(objects * np.divide(resized[size], size)) + 1).astype(np.int64).T
        found.append(int(np.sort(height * ((width + 7) // 8))[-slots:].sum()))
    return found


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple that is not below `number`."""
    return -(-number // multiple) * multiple
