"""What RoIAlign must touch and compute for given RoIs: the part of `floors` that needs the geometry.

A RoI's sampling grid is a product of its two axes, and so are its weights: bin (i, j) gives cell (y, x) the weight
Y[i, y] X[j, x]. Everything below is counted on those two small matrices a RoI.
"""

from __future__ import annotations

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

    bins: int  # of the output
    filled_bins: int = 0  # with a sample inside the map: what a gradient flows through
    cells: int = 0  # of all maps that some RoI reads, each counted once
    multiply_adds: int = 0


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
    rois: Tensor,
    dtype: torch.dtype,
    output_size: int | tuple[int, int],
    scales: float | Sequence[float],
    sampling_ratio: int = 2,
    aligned: bool = False,
    canonical_scale: int = 224,
    canonical_level: int = 4,
) -> RoiWork:
    """Count for maps of `shapes` ([B, C, H_l, W_l] each) and `rois` [K, 5]; the options are those of the ops."""
    size, scales = pair(output_size, "output_size"), [scales] if isinstance(scales, float) else list(scales)
    work = RoiWork(bins=len(rois) * size[0] * size[1])
    rois = rois.detach().cpu().to(torch.float64 if dtype == torch.float64 else torch.float32)
    rois, copies = rois.unique(dim=0, return_counts=True)  # equal RoIs can be computed once
    levels = reference.assign_levels(rois, reference.level_thresholds(scales, canonical_scale, canonical_level))
    for level, (shape, scale) in enumerate(zip(shapes, scales, strict=True)):
        for image in range(shape[0]):
            here = (levels == level) & (rois[:, 0] == image)
            _count(work, shape, rois[here, 1:] * scale, copies[here], size, sampling_ratio, aligned)
    return work


def _count(
    work: RoiWork,
    shape: torch.Size,
    boxes: Tensor,
    copies: Tensor,
    size: tuple[int, int],
    sampling_ratio: int,
    aligned: bool,
) -> None:
    """Add the RoIs of one image and level, `boxes` [k, 4] in cells, to `work`."""
    readers = torch.zeros(shape[2:])  # of each cell
    for part, times in zip(boxes.split(CHUNK), copies.split(CHUNK), strict=True):
        x = _axis(part[:, 0::2], shape[3], size[1], sampling_ratio, aligned)
        y = _axis(part[:, 1::2], shape[2], size[0], sampling_ratio, aligned)
        readers += y.touched.T.float() @ x.touched.float()
        work.filled_bins += int((times * y.filled * x.filled).sum())
        work.multiply_adds += int(torch.minimum(_multiply_adds(x, y), _multiply_adds(y, x)).sum())
    work.cells += int(torch.count_nonzero(readers))


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
