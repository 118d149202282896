"""From tensors to launches: which kernels run on which layout, with which tiles. No autograd and no checks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layouts import is_channels_last, layout
from ..runtime import INTERPRETED, launch, next_power_of_2, tile
from .reference import level_thresholds

CELLS_PER_ROI = 256
"""About as many cells as one RoI reads. Transposing maps pays once the RoIs read as many cells as there are."""


@dataclass(frozen=True)
class Pooling:
    """What a call asks for apart from its tensors."""

    sizes: tuple[tuple[int, int], ...]  # bins (height, width), one pair for each set of RoIs
    scales: tuple[float, ...]
    sampling_ratio: int  # <= 0: adaptive
    aligned: bool
    canonical_scale: int
    canonical_level: int

    @property
    def geometry(self) -> dict:
        """Compile-time constants of the table."""
        return {
            "SCALES": self.scales,
            "THRESHOLDS": _thresholds(self.scales, self.canonical_scale, self.canonical_level),
            "ALIGNED": self.aligned,
            **self.sampling,
        }

    @property
    def sampling(self) -> dict:
        """Compile-time constants of all kernels."""
        return {"LEVELS": len(self.scales), "SAMPLING_RATIO": max(self.sampling_ratio, 0)}


@functools.cache
def _thresholds(*arguments) -> tuple[float, ...]:
    return tuple(level_thresholds(*arguments))


def empty_outputs(features: Sequence[Tensor], rois: Sequence[Tensor], pooling: Pooling, channels_last: bool) -> list:
    """[K, C, ph, pw] for each set of RoIs."""
    shapes = [(r.shape[0], features[0].shape[1], *size) for r, size in zip(rois, pooling.sizes, strict=True)]
    return [_empty(shape, features[0], channels_last) for shape in shapes]


def empty_gradients(
    grad_out: Tensor, batch_size: int, extents: Sequence[tuple[int, int]], channels_last: bool
) -> list[Tensor]:
    """[B, C, H_l, W_l] for each map of `extents` (H_l, W_l)."""
    shapes = [(batch_size, grad_out.shape[1], *extent) for extent in extents]
    return [_empty(shape, grad_out, channels_last) for shape in shapes]


def empty_table(rois: Sequence[Tensor]) -> Tensor:
    """Room for the geometry of all sets of RoIs: [K, 16]; the columns are described in `kernel_geometry`."""
    dtype = torch.int64 if rois[0].dtype == torch.float64 else torch.int32
    return torch.empty(sum(r.shape[0] for r in rois), 16, dtype=dtype, device=rois[0].device)


def _empty(shape: tuple[int, ...], like: Tensor, channels_last: bool) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout(channels_last))


def forward(
    features: Sequence[Tensor], rois: Sequence[Tensor], pooling: Pooling, out_channels_last: bool
) -> tuple[list[Tensor], Tensor]:
    """([K_s, C, ph_s, pw_s] of each set of RoIs [K_s, 5], the table of all RoIs' geometry)."""
    table, outs = empty_table(rois), empty_outputs(features, rois, pooling, out_channels_last)
    rois = [r.contiguous() for r in rois]
    batch_size, heights, widths = _extents(features)
    rows = [table] if len(rois) == 1 else table.split([len(r) for r in rois])
    for r, row, size in zip(rois, rows, pooling.sizes, strict=True):
        _fill_table(r, row, size, batch_size, heights, widths, pooling)
    channels_last = is_channels_last(features)
    features = [f.contiguous(memory_format=layout(channels_last)) for f in features]
    if not channels_last and _worth_transposing(features, len(table)):
        features, channels_last = [to_channels_last(f) for f in features], True
    for row, out in zip(rows, outs, strict=True):
        _pool(features, row, out, heights, widths, pooling, channels_last, out_channels_last)
    return outs, table


def _extents(maps: Sequence[Tensor]) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    return maps[0].shape[0], tuple(m.shape[2] for m in maps), tuple(m.shape[3] for m in maps)


def _fill_table(
    rois: Tensor,
    table: Tensor,
    size: tuple[int, int],
    batch_size: int,
    heights: tuple[int, ...],
    widths: tuple[int, ...],
    pooling: Pooling,
) -> None:
    from .kernel_geometry import roi_geometry_kernel

    block = tile(128, 1024)
    launch(
        roi_geometry_kernel,
        (-(-len(rois) // block),),
        rois,
        table,
        len(rois),
        batch_size,
        heights,
        widths,
        POOLED_H=size[0],
        POOLED_W=size[1],
        BLOCK=block,
        **pooling.geometry,
        device=rois.device,
    )


def _worth_transposing(features: Sequence[Tensor], rois: int) -> bool:
    """Whether reading NCHW maps cell by cell, a channel at a time, costs more than copying them once."""
    cells = sum(f.shape[0] * f.shape[2] * f.shape[3] for f in features)
    return features[0].shape[1] >= 16 and rois * CELLS_PER_ROI >= cells


def to_channels_last(x: Tensor) -> Tensor:
    """A copy of a contiguous [N, C, H, W] in channels_last, read and written in runs."""
    from .kernel_transpose import transpose_kernel

    out = _empty(tuple(x.shape), x, channels_last=True)
    rows, columns = x.shape[1], x.shape[2] * x.shape[3]
    grid = (x.shape[0] * -(-columns // 64), -(-rows // 64))
    launch(transpose_kernel, grid, x, out, rows, columns, BLOCK_ROWS=64, BLOCK_COLUMNS=64, device=x.device)
    return out


def _pool(
    features: Sequence[Tensor],
    table: Tensor,
    out: Tensor,
    heights: tuple[int, ...],
    widths: tuple[int, ...],
    pooling: Pooling,
    channels_last: bool,
    out_channels_last: bool,
) -> None:
    from .kernel_matrix import roi_align_matrix_kernel
    from .kernel_samples import roi_align_forward_kernel

    rois, channels, *size = out.shape
    if channels_last and _worth_products(features, out, pooling):
        kernel, constants = roi_align_matrix_kernel, _products_tile(channels, size, out.dtype)
    else:
        kernel = roi_align_forward_kernel
        # NCHW is read directly where there is little to do: small tiles spread it over the GPU.
        constants = _samples_tile(channels, size, *((256, 2048) if channels_last else (32, 256)))
        constants["MAPS_CHANNELS_LAST"] = channels_last
        constants["PAIRS"] = channels_last and _are_pairs(features)
    launch(
        kernel,
        _bins_grid(rois, channels, size, constants),
        tuple(features),
        table,
        out,
        heights,
        widths,
        CHANNELS=channels,
        POOLED_H=size[0],
        POOLED_W=size[1],
        OUT_CHANNELS_LAST=out_channels_last,
        **pooling.sampling,
        **constants,
        device=out.device,
    )


def _are_pairs(maps: Sequence[Tensor]) -> bool:
    """Whether bf16 maps can be read as int32: an even number of channels, from a multiple of 4 bytes."""
    return maps[0].dtype == torch.bfloat16 and all(m.shape[1] % 2 == 0 and m.data_ptr() % 4 == 0 for m in maps)


def _worth_products(features: Sequence[Tensor], out: Tensor, pooling: Pooling) -> bool:
    """Whether so many samples share cells that reading each cell once pays for computing a matrix of weights.

    Only half types, whose products tensor cores make as they are. Counted in instructions, 7 x 7 bins of 2 x 2 samples
    are as cheap sample by sample, 14 x 14 bins cost twice as much.
    """
    if not is_half(out.dtype) or out.shape[1] < 16:
        return False
    many = pooling.sampling_ratio <= 0 or pooling.sampling_ratio * max(out.shape[2:]) > 16
    cells = max(f.shape[2] * f.shape[3] for f in features)
    return many and cells < min(2**21, 2**31 // out.shape[1])  # counted in fp32 and in 32-bit offsets


def is_half(dtype: torch.dtype) -> bool:
    """Whether tensor cores multiply it directly."""
    return dtype in (torch.float16, torch.bfloat16)


def _samples_tile(channels: int, size: Sequence[int], most_channels: int, numbers: int) -> dict:
    """A tile of about `numbers` numbers of one RoI's bins for the forward and the atomics."""
    rows, block_w = next_power_of_2(size[0]), next_power_of_2(size[1])
    block_c = min(next_power_of_2(channels), tile(most_channels, 1024))
    rows = min(rows, max(1, tile(numbers, 1 << 20) // (block_w * block_c)))
    warps = min(8, max(1, rows * block_w * block_c // 512))
    return {"ROWS": rows, "BLOCK_W": block_w, "BLOCK_C": block_c, "num_warps": warps}


def _products_tile(channels: int, size: Sequence[int], dtype: torch.dtype) -> dict:
    """A tile of 16 to 32 bins: more would leave most of W zero, fewer would leave tensor cores idle."""
    block_w = next_power_of_2(size[1])
    rows = max(2, 16 // block_w)
    most = tile(min(256, max(16, 8192 // (rows * block_w))), 1024)  # more sums than that spill registers
    return {
        "PRECISION": _precision(dtype),
        "ROWS": rows,
        "BLOCK_W": block_w,
        "BLOCK_CELLS": 16,
        "BLOCK_C": max(16, min(next_power_of_2(channels), most)),
        "num_warps": 4,
        "num_stages": 2,
    }


def _precision(dtype: torch.dtype) -> str:
    """How `kernel_matrix.dot` multiplies."""
    if is_half(dtype):
        # The interpreter's bf16 arithmetic is wrong: it computes these products in fp32.
        return "ieee" if INTERPRETED and dtype == torch.bfloat16 else "split"
    return "tf32x3" if dtype == torch.float32 else "ieee"


def _bins_grid(rois: int, channels: int, size: Sequence[int], constants: dict) -> tuple[int, int]:
    """(RoI and tile of its rows, tile of the channels): only the first axis of a grid can be longer than 65,535."""
    return rois * -(-size[0] // constants["ROWS"]), -(-channels // constants["BLOCK_C"])


def backward(
    grad_outs: Sequence[Tensor],
    table: Tensor,
    batch_size: int,
    extents: Sequence[tuple[int, int]],
    channels_last: bool,
    pooling: Pooling,
    atomics: bool,
) -> list[Tensor]:
    """Gradients of the L maps of `extents` (H_l, W_l) from those of each set's output [K_s, C, ph_s, pw_s].

    PyTorch's deterministic mode overrules `atomics`.
    """
    grad_outs = [_channels_last(g) for g in grad_outs]
    method = _add_atomically if atomics and not torch.are_deterministic_algorithms_enabled() else _gather
    return method(grad_outs, table, empty_gradients(grad_outs[0], batch_size, extents, channels_last), pooling)


def _channels_last(x: Tensor) -> Tensor:
    if x.is_contiguous() and x.shape[1] >= 16 and x.shape[2] * x.shape[3] > 1:
        return to_channels_last(x)
    return x.contiguous(memory_format=torch.channels_last)


def _gather(grad_outs: Sequence[Tensor], table: Tensor, grads: list[Tensor], pooling: Pooling) -> list[Tensor]:
    """Deterministic: RoIs are grouped by map, listed by tile of cells, and every tile sums its list."""
    from .kernel_lists import group_rois_kernel, list_rois_kernel
    from .kernel_matrix import roi_align_gather_kernel

    batch_size, heights, widths = _extents(grads)
    device, levels, channels = table.device, len(grads), grads[0].shape[1]
    channels_last = is_channels_last(grads)
    # Runs of at least 32 bytes: along the channels, or along a row of an NCHW map.
    tile_h, tile_w = (4, 16) if not channels_last and is_half(grads[0].dtype) else (8, 8)
    tiles = [-(-h // tile_h) * -(-w // tile_w) for h, w in zip(heights, widths, strict=True)]
    total_tiles = batch_size * sum(tiles)
    int32 = functools.partial(torch.empty, dtype=torch.int32, device=device)
    starts, order, lengths = int32(levels * batch_size + 1), int32(len(table)), int32(total_tiles)
    lists = int32(len(table) * max(tiles))  # room for every RoI in every tile of its map: no list can overflow

    groups = (levels * batch_size,)
    launch(
        group_rois_kernel, groups, table, starts, order, len(table), batch_size, BLOCK=tile(1024, 1024), device=device
    )
    cells = {"TILE_H": tile_h, "TILE_W": tile_w}
    maps = (batch_size, heights, widths, max(tiles))
    launch(
        list_rois_kernel, (total_tiles,), table, starts, order, lists, lengths, *maps, BLOCK=256, num_warps=2,
        LEVELS=levels, device=device, **cells,
    )  # fmt: skip
    first_rois = [0]
    for g in grad_outs[:-1]:
        first_rois.append(first_rois[-1] + len(g))
    constants = _gather_tile(channels, grads[0].dtype)
    launch(
        roi_align_gather_kernel,
        (total_tiles * -(-channels // constants["BLOCK_C"]),),
        tuple(grads),
        tuple(grad_outs),
        table,
        starts,
        lists,
        lengths,
        tuple(first_rois),
        *maps,
        CHANNELS=channels,
        SETS=len(grad_outs),
        POOLED_H=tuple(g.shape[2] for g in grad_outs),
        POOLED_W=tuple(g.shape[3] for g in grad_outs),
        CHANNELS_LAST=channels_last,
        **pooling.sampling,
        **cells,
        **constants,
        device=device,
    )
    return grads


def _gather_tile(channels: int, dtype: torch.dtype) -> dict:
    """Tensor cores want at least 16 of everything; wider sums of fp32 spill registers.

    Most RoIs reach a tile with at most 16 bins, so that there is no next load to fetch ahead: one stage.
    """
    most = tile(128 if is_half(dtype) else 64, 1024)
    return {
        "PRECISION": _precision(dtype),
        "BLOCK_BINS": 16,
        "BLOCK_C": max(16, min(next_power_of_2(channels), most)),
        "num_warps": 4,
        "num_stages": 1,
    }


def _add_atomically(grad_outs: Sequence[Tensor], table: Tensor, grads: list[Tensor], pooling: Pooling) -> list[Tensor]:
    """Every RoI adds to its cells, in any order: the last bits of a sum may change from run to run."""
    from .kernel_samples import roi_align_atomic_kernel

    _, heights, widths = _extents(grads)
    dtype = torch.float64 if table.dtype == torch.int64 else torch.float32
    # Sums are fp32: atomics of a half type would round every addition.
    sums = [torch.zeros_like(g, dtype=dtype, memory_format=torch.channels_last) for g in grads]
    for g, rows in zip(grad_outs, table.split([len(g) for g in grad_outs]), strict=True):
        rois, channels, *size = g.shape
        constants = _samples_tile(channels, size, 128, 2048)
        launch(
            roi_align_atomic_kernel,
            _bins_grid(rois, channels, size, constants),
            tuple(sums),
            g,
            rows,
            heights,
            widths,
            CHANNELS=channels,
            POOLED_H=size[0],
            POOLED_W=size[1],
            **pooling.sampling,
            **constants,
            device=g.device,
        )
    return [grad.copy_(s) for grad, s in zip(grads, sums, strict=True)]
