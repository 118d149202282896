"""RoIAlign in plain PyTorch: the truth in fp64, on any device, differentiable by autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MOST_SAMPLES = 2.0**28
"""Adaptive sampling takes at most so many samples a bin; a larger RoI, or one that is not finite, has none."""


def level_thresholds(scales: Sequence[float], canonical_scale: int, canonical_level: int) -> list[float]:
    """Box areas from which a RoI belongs to the second, third, ... level of a pyramid (length L - 1).

    torchvision's LevelMapper takes floor(canonical_level + log2(sqrt(area) / canonical_scale) + 1e-6), clamped to
    the levels there are. Comparing areas gives the same level without a square root or logarithm (no
    difference in 6 million boxes), and a box without positive area is well defined: the lowest level.
    """
    lowest = -round(math.log2(scales[0]))
    return [(canonical_scale * 2.0 ** (lowest + i - canonical_level - 1e-6)) ** 2 for i in range(1, len(scales))]


def assign_levels(rois: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Index of the pyramid level of each RoI: rois [K, 5] -> int64 [K] in 0..L-1."""
    area = (rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])
    return sum((area >= t).long() for t in thresholds) + torch.zeros_like(area, dtype=torch.long)


def multiscale_roi_align(
    features: Sequence[Tensor],
    rois: Tensor,
    output_size: tuple[int, int],
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    canonical_scale: int,
    canonical_level: int,
) -> Tensor:
    """RoIAlign of `rois` [K, 5] on `features` ([B, C, H_l, W_l] each): [K, C, ph, pw] in the features' dtype.

    All levels' cells are laid end to end in one table, so that a RoI's level is only an offset into it.
    """
    rois = rois.to(torch.float64 if features[0].dtype == torch.float64 else torch.float32)
    table = torch.cat([f.permute(0, 2, 3, 1).reshape(-1, f.shape[1]) for f in features]).to(rois.dtype)
    levels = assign_levels(rois, level_thresholds(scales, canonical_scale, canonical_level))

    def per_level(values: Sequence[float], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device)[levels][:, None]

    height = per_level([f.shape[2] for f in features], levels)
    width = per_level([f.shape[3] for f in features], levels)
    cells = [f.shape[0] * f.shape[2] * f.shape[3] for f in features]
    first_cell = per_level([sum(cells[:i]) for i in range(len(cells))], levels) + rois[:, :1].long() * height * width
    scale = per_level(scales, rois)

    y_samples = _axis_samples(rois[:, 2:3] * scale, rois[:, 4:5] * scale, output_size[0], sampling_ratio, aligned)
    x_samples = _axis_samples(rois[:, 1:2] * scale, rois[:, 3:4] * scale, output_size[1], sampling_ratio, aligned)
    y_grid, x_grid = y_samples[1], x_samples[1]
    y_grid.masked_fill_(y_grid * x_grid > MOST_SAMPLES, 0)
    total = table.new_zeros(len(rois), *output_size, table.shape[1])
    total = total + table[:0].sum()  # zero, and a path for the gradient where there is no sample
    for y, y_inside in _each_sample(*y_samples, sampling_ratio):
        y_low, y_high, y_weight = _corners(y, y_inside, height)
        for x, x_inside in _each_sample(*x_samples, sampling_ratio):
            x_low, x_high, x_weight = _corners(x, x_inside, width)
            inside = _inside(y, y_inside, height)[:, :, None] & _inside(x, x_inside, width)[:, None, :]
            value = 0
            for row, row_weight in ((y_low, 1 - y_weight), (y_high, y_weight)):
                for column, column_weight in ((x_low, 1 - x_weight), (x_high, x_weight)):
                    cell = (first_cell + row * width)[:, :, None] + column[:, None, :]
                    weight = row_weight[:, :, None] * column_weight[:, None, :]
                    value = value + weight[..., None] * table[cell]
            total = total + torch.where(inside[..., None], value, 0)
    count = (y_grid * x_grid).clamp(min=1)[..., None, None]
    return (total / count).permute(0, 3, 1, 2).to(features[0].dtype)


def _axis_samples(
    low: Tensor, high: Tensor, bins: int, sampling_ratio: int, aligned: bool
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """((bin starts [K, bins], bin size [K, 1]), samples a bin [K, 1]) along one axis, in feature cells."""
    offset = 0.5 if aligned else 0.0
    extent = high - low
    if not aligned:
        extent = extent.clamp(min=1)  # NaN stays NaN
    bin_size = extent / bins
    if sampling_ratio > 0:
        grid = torch.full_like(bin_size, sampling_ratio)
    else:
        grid = torch.where(bin_size < MOST_SAMPLES, bin_size.ceil(), 0)  # NaN is not less
    starts = (low - offset) + torch.arange(bins, device=low.device, dtype=low.dtype) * bin_size
    return (starts, bin_size), grid


def _each_sample(bins: tuple[Tensor, Tensor], grid: Tensor, sampling_ratio: int):
    """Yield (coordinates [K, bins], bool [K, 1]: RoIs that have this sample) for sample 0, 1, ... of every bin."""
    starts, bin_size = bins
    largest = sampling_ratio if sampling_ratio > 0 else int(grid.max()) if grid.numel() else 0
    for i in range(largest):
        yield starts + (i + 0.5) * bin_size / grid, i < grid


def _inside(position: Tensor, present: Tensor, length: Tensor) -> Tensor:
    """A sample counts from one cell before the map to its far edge, both included; NaN never does."""
    return present & (position >= -1) & (position <= length)


def _corners(position: Tensor, present: Tensor, length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The two cells around each sample and the weight of the second one, clamped at the map's border."""
    position = torch.where(_inside(position, present, length), position, 0).clamp(min=0)
    low = torch.minimum(position.long(), length - 1)
    high = torch.minimum(low + 1, length - 1)
    weight = torch.where(low < length - 1, position - low, 0)
    return low, high, weight
