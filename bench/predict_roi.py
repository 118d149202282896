"""What RoIAlign's kernels issue: their loops' instructions times how often they run on the workload's boxes.

| kernel | warp instructions |
| --- | --- |
| forward, sample by sample | programs x all but the path with masks, which no RoI inside its map takes |
| forward by matrices | chunks of cells x loop + programs x rest |
| gather (backward) | chunks of bins x inner loop + (tile, RoI) pairs x the rest of the outer + programs x the rest |

Chunks and pairs count once for each block of channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kernels import multiscale_roi_align
from kernels.runtime import Launch, record_launches

from .inputs import Inputs
from .predict_work import Axis, gather_work, matrix_chunks, roi_axes
from .sass import Code

# All but the lists issue next to nothing; those about 20 M instructions on each of the workloads, 0.02 ms.
LEFT_OUT = ("roi_geometry_kernel", "group_rois_kernel", "list_rois_kernel")


def _samples(code: Code, launch: Launch, y: Axis, x: Axis) -> int:
    return launch.grid[0] * launch.grid[1] * code.without_masks()


def _matrix(code: Code, launch: Launch, y: Axis, x: Axis) -> int:
    (loop,) = code.loops(1)
    rest = launch.grid[0] * (len(code.instructions) - loop)
    return launch.grid[1] * (rest + loop * matrix_chunks(y, x, launch.meta["ROWS"], launch.meta["BLOCK_CELLS"]))


def _gather(code: Code, launch: Launch, y: Axis, x: Axis) -> int:
    inner, outer = code.loops(2)
    meta = launch.meta
    pairs, chunks = gather_work(y, x, meta["TILE_H"], meta["TILE_W"], meta["BLOCK_BINS"])
    blocks = -(-meta["CHANNELS"] // meta["BLOCK_C"])
    return launch.grid[0] * (len(code.instructions) - outer) + blocks * (pairs * (outer - inner) + chunks * inner)


_MODELS: dict[str, Callable[[Code, Launch, Axis, Axis], int]] = {
    "roi_align_forward_kernel": _samples,
    "roi_align_matrix_kernel": _matrix,
    "roi_align_gather_kernel": _gather,
}
BACKWARD = ("roi_align_gather_kernel",)
MODELS = tuple(_MODELS)


def count(code: Code, launch: Launch, inputs: Inputs) -> tuple[int, int]:
    """Instructions of a warp, all programs together; no program's are so many that it takes longer than the rest."""
    maps, *call = inputs.args
    return _MODELS[launch.kernel.__name__](code, launch, *roi_axes([m.shape for m in maps], *call)), 0


def launches(inputs: Inputs) -> list[Launch]:
    """Of the forward and the backward. The maps are never touched: they take no memory, whatever their size."""
    maps, *call = inputs.args
    leaves = [torch.empty(m.shape, dtype=m.dtype, memory_format=torch.channels_last).requires_grad_() for m in maps]
    with record_launches() as found:
        out = multiscale_roi_align(leaves, *call, backend="triton")
        torch.autograd.grad(out, leaves, torch.empty_like(out))
    return found
