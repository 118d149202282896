"""What RoIAlign must touch and compute for given RoIs: the part of `floors` that needs the geometry.

A RoI's sampling grid is a product of its two axes, and so are its weights: bin (i, j) gives cell (y, x) the weight
Y[i, y] X[j, x]. Everything below is counted on those two small matrices a RoI.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.checks import pair
from kernels.roi_align import reference

CHUNK = 2048  # RoIs at a time: bounds the memory of their weights, [CHUNK, bins, length]


@dataclass
class RoiWork:
    """Counts for one channel, summed over all RoIs."""

    bins: int  # of all outputs
    filled_bins: int = 0  # with a sample inside the map: what a gradient flows through
    cells: int = 0  # of all maps that some RoI reads, each counted once
    multiply_adds: int = 0


@dataclass(frozen=True)
class _Set:
    """RoIs that are pooled to one size."""

    rois: Tensor  # [k, 5], no two alike
    copies: Tensor  # [k]: how many of each there are
    levels: Tensor  # [k]
    size: tuple[int, int]

    def on(self, level: int, image: int) -> tuple[Tensor, Tensor]:
        """(boxes [n, 4], copies [n]) of one map."""
        here = (self.levels == level) & (self.rois[:, 0] == image)
        return self.rois[here, 1:], self.copies[here]


@dataclass(frozen=True)
class _Axis:
    """One axis of k RoIs."""

    touched: Tensor  # bool [k, length]: cells with a weight above zero in some bin
    terms: Tensor  # int64 [k]: weights above zero, all bins together; samples on the same cell are merged
    filled: Tensor  # int64 [k]: bins that have such a weight

    @property
    def lines(self) -> Tensor:
        """Touched cells of each RoI, [k]."""
        return self.touched.sum(dim=1)


def roi_work(
    shapes: Sequence[torch.Size],
    sets: Sequence[Tensor],
    dtype: torch.dtype,
    output_sizes: Sequence[int | tuple[int, int]],
    scales: float | Sequence[float],
    *options: object,
) -> RoiWork:
    """Count for maps of `shapes` ([B, C, H_l, W_l] each) and `sets` of RoIs [K_s, 5], each pooled to a size of its own.

    The options are those of the ops.
    """
    sizes = tuple(pair(size, "output_size") for size in output_sizes)
    scales = (scales,) if isinstance(scales, float) else tuple(scales)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    contents = tuple(rois.detach().cpu().to(wide).numpy().tobytes() for rois in sets)
    return _roi_work(tuple(map(tuple, shapes)), contents, wide, sizes, scales, *options)


@functools.lru_cache(maxsize=4)  # it takes seconds, and is the same forward and backward, in any dtype but fp64
def _roi_work(
    shapes: tuple[tuple[int, ...], ...],
    contents: tuple[bytes, ...],  # of the sets of RoIs
    wide: torch.dtype,
    sizes: tuple[tuple[int, int], ...],
    scales: tuple[float, ...],
    sampling_ratio: int = 2,
    aligned: bool = False,
    canonical_scale: int = 224,
    canonical_level: int = 4,
) -> RoiWork:
    thresholds = reference.level_thresholds(list(scales), canonical_scale, canonical_level)
    rois = [torch.frombuffer(bytearray(c), dtype=wide).view(-1, 5) if c else torch.zeros(0, 5) for c in contents]
    work = RoiWork(bins=sum(len(r) * h * w for r, (h, w) in zip(rois, sizes, strict=True)))
    sets = [_set(r, size, thresholds) for r, size in zip(rois, sizes, strict=True)]
    for level, (shape, scale) in enumerate(zip(shapes, scales, strict=True)):
        for image in range(shape[0]):
            readers = torch.zeros(shape[2:])  # of each cell, in all sets
            for of_set in sets:
                boxes, copies = of_set.on(level, image)
                _count(work, readers, boxes * scale, copies, of_set.size, sampling_ratio, aligned)
            work.cells += int(torch.count_nonzero(readers))
    return work


def _set(rois: Tensor, size: tuple[int, int], thresholds: list[float]) -> _Set:
    rois, copies = rois.unique(dim=0, return_counts=True)  # equal RoIs can be computed once
    return _Set(rois, copies, reference.assign_levels(rois, thresholds), size)


def _count(
    work: RoiWork,
    readers: Tensor,
    boxes: Tensor,
    copies: Tensor,
    size: tuple[int, int],
    sampling_ratio: int,
    aligned: bool,
) -> None:
    """Add the RoIs of one image and level, `boxes` [k, 4] in cells, to `work`, and to the `readers` of its cells."""
    height, width = readers.shape
    for part, times in zip(boxes.split(CHUNK), copies.split(CHUNK), strict=True):
        x = _axis(part[:, 0::2], width, size[1], sampling_ratio, aligned)
        y = _axis(part[:, 1::2], height, size[0], sampling_ratio, aligned)
        readers += y.touched.T.float() @ x.touched.float()
        work.filled_bins += int((times * y.filled * x.filled).sum())
        work.multiply_adds += int(torch.minimum(_multiply_adds(x, y), _multiply_adds(y, x)).sum())


def _multiply_adds(first: _Axis, second: _Axis) -> Tensor:
    """Multiply-adds of each RoI, [k], that sums along `first`, then `second`.

    The first pass computes each bin of its axis on every touched line of the other: terms - filled, since one term a
    bin needs no factor, when the others are divided by its weight and that weight moves into the second pass. Summing
    all terms of a bin at once, terms x terms, is never less. The backward is the transpose: at least as many.
    """
    return second.lines * (first.terms - first.filled) + second.terms * first.filled


def _axis(edges: Tensor, length: int, bins: int, sampling_ratio: int, aligned: bool) -> _Axis:
    """The axis of RoIs with `edges` [k, 2] (low, high), in cells, on a map of `length` cells, by the reference."""
    samples = reference._axis_samples(edges[:, :1], edges[:, 1:], bins, sampling_ratio, aligned)
    lengths = torch.full((len(edges), 1), length)
    weights = edges.new_zeros(len(edges), bins, length)
    for position, present in reference._each_sample(*samples, sampling_ratio):
        inside = reference._inside(position, present, lengths)
        low, high, high_weight = reference._corners(position, present, lengths)
        for cell, weight in ((low, 1 - high_weight), (high, high_weight)):
            weights.scatter_add_(2, cell[..., None], torch.where(inside, weight, 0)[..., None])
    used = weights > 0
    return _Axis(used.any(dim=1), used.sum(dim=(1, 2)), used.any(dim=2).sum(dim=1))
