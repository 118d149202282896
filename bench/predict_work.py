"""How often the loops of RoIAlign's kernels run for given RoIs: the geometry that `predict` needs.

The kernels decide from the table of `kernels.roi_align.kernel_geometry`; here the same follows from the PyTorch
reference, for all RoIs at once, so that nothing has to be interpreted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.checks import pair
from kernels.roi_align import reference

SPARE = 0.01  # of a cell or bin: what the kernels add so that rounding loses none


@dataclass(frozen=True)
class Axis:
    """One axis of K RoIs, each on its own level, in cells; the tensors are [K]."""

    start: Tensor
    bin_size: Tensor
    first: Tensor  # cells that samples may touch, both ends included; last < first: none
    last: Tensor
    bins: int


def roi_axes(
    shapes: Sequence[torch.Size],
    rois: Tensor,
    output_size: int | tuple[int, int],
    scales: Sequence[float],
    sampling_ratio: int = 2,
    aligned: bool = False,
    canonical_scale: int = 224,
    canonical_level: int = 4,
) -> tuple[Axis, Axis]:
    """(y, x) of `rois` [K, 5] on maps of `shapes` ([B, C, H_l, W_l] each); the options are those of the op.

    The kernels' loops are counted for a fixed number of samples only: `sampling_ratio` > 0.
    """
    thresholds = reference.level_thresholds(scales, canonical_scale, canonical_level)
    levels = reference.assign_levels(rois, thresholds)
    edges = rois[:, 1:] * torch.tensor(scales, dtype=rois.dtype)[levels, None]
    bins = pair(output_size, "output_size")

    def axis(low: int, dim: int) -> Axis:
        length = torch.tensor([shape[dim + 2] for shape in shapes])[levels]
        return _axis(edges[:, low::2], length, bins[dim], sampling_ratio, aligned)

    return axis(1, 0), axis(0, 1)


def _axis(edges: Tensor, length: Tensor, bins: int, sampling_ratio: int, aligned: bool) -> Axis:
    samples = reference._axis_samples(edges[:, :1], edges[:, 1:], bins, sampling_ratio, aligned)
    position = torch.cat([p for p, _ in reference._each_sample(*samples, sampling_ratio)], dim=1)
    lowest, highest, end = position.amin(dim=1), position.amax(dim=1), length - 1
    touches = (highest >= -1) & (lowest <= length)
    first = torch.where(touches, lowest, 0).clamp(min=0).minimum(end).long()
    last = (torch.where(touches, highest, 0).clamp(min=0).long() + 1).minimum(end)
    (starts, bin_size), _ = samples
    return Axis(starts[:, 0], bin_size[:, 0], first, torch.where(touches, last, -1), bins)


def matrix_chunks(y: Axis, x: Axis, rows: int, block: int) -> int:
    """Turns of `roi_align_matrix_kernel`'s loop, all RoIs: `block` cells each of those under `rows` rows of bins."""
    total = 0
    width = x.last - x.first + 1
    for row in range(0, y.bins, rows):
        begin = (y.start + row * y.bin_size - SPARE).maximum(y.first)
        end = (y.start + (row + rows) * y.bin_size + SPARE).minimum(y.last)
        height = (end.long() + 1).minimum(y.last) - begin.long().minimum(y.last) + 1
        height = torch.where(y.bin_size > 0, height, y.last - y.first + 1)
        touches = (y.last >= y.first) & (x.last >= x.first)
        total += int(_chunks(torch.where(touches, height * width, 0), block).sum())
    return total


def gather_work(y: Axis, x: Axis, tile_h: int, tile_w: int, block: int) -> tuple[int, int]:
    """Turns of `roi_align_gather_kernel`'s loops: ((tile, RoI) pairs, chunks of `block` bins near the tile in them)."""
    along_y, along_x = _bins_near(y, tile_h), _bins_near(x, tile_w)
    near = along_y[:, :, None] * along_x[:, None, :]
    return int(torch.count_nonzero(near)), int(_chunks(near, block).sum())


def _bins_near(axis: Axis, tile: int) -> Tensor:
    """[K, tiles]: bins with samples within one cell of each tile along the axis; 0 where the RoI is not listed."""
    number = torch.arange(int(axis.last.max()) // tile + 1)
    cell = number * tile
    start, bin_size = axis.start[:, None], axis.bin_size[:, None]
    scale = 1 / bin_size.clamp(min=1e-6)
    first = torch.floor((cell - 1 - start) * scale - SPARE).clamp(0, axis.bins - 1)
    last = torch.floor((cell + tile - start) * scale + SPARE).clamp(0, axis.bins - 1)
    bins = torch.where(bin_size > 0, last - first + 1, axis.bins)
    listed = (axis.first[:, None] < cell + tile) & (axis.last[:, None] >= cell)
    return torch.where(listed, bins, 0).long()


def _chunks(number: Tensor, block: int) -> Tensor:
    return (number + block - 1) // block
