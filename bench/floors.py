"""The least that any implementation must move and compute for one call, counted on the call's own data.

A floor divided by what the machine can do at most (`Ceilings`) is the roof: the shortest time possible. % of roof =
roof / measured time, and it cannot exceed 100:

- Bytes are compulsory: each input element that the result depends on is read once, each output element is written
  once. Every time an element is read again, padding and scratch memory cost time but do not raise the floor.
- Instructions are those of the cheapest known formulation in FP32 units, without a single one for addresses, loads,
  conversions or loops.
- A ceiling is the best that was seen on the machine itself, and the roof takes the slowest of them as if all the
  others were free.

So a row above 100 % means that the model or the measurement is wrong: results cached, work skipped, cold data that was
not cold. Bytes cannot be argued with, and a row that beats them turns red. Instructions can: tensor cores and packed
halves do more with fewer. A row above its roof of instructions keeps its time, and the model has to be mended.

An easier workload does not raise the percentage either: where boxes crowd together, fewer cells are touched and fewer
pairs overlap, and the floor sinks with the time. "All features once" would credit a kernel with cells it never reads.

When the call is cold, writes count in full although the last ones stay in L2: flushing by writing leaves L2 full of
dirty lines, and each line the call writes evicts one of them to memory. A warm call may find, and leave, all in L2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import mask_floors, rpn_floors
from .inputs import Inputs
from .roi_floors import roi_work
from .workloads import ROI_OPS

if TYPE_CHECKING:
    from .ceilings import Ceilings

LANES = 32  # of a warp

# Instructions of one pair of boxes that overlap. Areas are computed once a box. Pairs that do not overlap count
# nothing: a kernel can skip whole tiles of them.
# box_iou: 2 max, 2 min, 2 subtractions, multiply, 2 for the union; reciprocal, product, residual, correction.
IOU = 13
# Its gradient, never rounded in a prescribed way: the same 9 up to the union, reciprocal, IoU, its derivatives by
# union, intersection, area, width and height, and 6 sums: 4 edges, each one box's or the other's, and 2 areas.
IOU_BACKWARD = 22


@dataclass(frozen=True)
class Floor:
    """What one call cannot do without."""

    dram_bytes: int  # read and written, of a call that finds nothing in the caches
    instructions: int  # of a warp: 32 lanes of FP32 arithmetic each


def floor(op: str, direction: str, inputs: Inputs, dtype: torch.dtype) -> Floor:
    """The floor of one forward or backward call of `op` on `inputs`, with features or logits in `dtype`.

    Tensors may be on any device. Features and logits are only asked for their shapes, never read.
    """
    name, backward = "roi_align" if op in ROI_OPS else op, direction == "backward"
    others = rpn_floors.WORK | mask_floors.WORK
    if name in others:
        return Floor(*others[name](backward, dtype, *inputs.args))
    return FLOORS[name](backward, dtype, *inputs.args)


def roof(floor: Floor, ceilings: Ceilings, cold: bool) -> tuple[float, str]:
    """(shortest possible seconds, what bounds them: "DRAM", "L2" or "issue") of a call, L2 flushed before it or not."""
    times = {
        "L2": floor.dram_bytes / ceilings.l2_bytes_per_s,
        "issue": floor.instructions / ceilings.issue_per_s,
    }
    if cold:
        times["DRAM"] = floor.dram_bytes / ceilings.dram_bytes_per_s
    bound = max(times, key=times.__getitem__)
    return times[bound], bound


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _roi_align(
    backward: bool,
    dtype: torch.dtype,
    features: Tensor | list[Tensor],
    rois: Tensor | list[Tensor],
    output_size: int | list[int],
    *options: object,
) -> Floor:
    """Forward: touched cells and RoIs in, bins out. Backward: RoIs and bins in, the gradient of all cells out.

    Of several sets of RoIs on the same maps: a cell that two of them touch is read once, a gradient cell written once.
    """
    maps = [features] if isinstance(features, Tensor) else features
    sets, sizes = ([rois], [output_size]) if isinstance(rois, Tensor) else (rois, output_size)
    channels = maps[0].shape[1]
    work = roi_work([f.shape for f in maps], sets, dtype, sizes, *options)
    if backward:
        elements = channels * work.filled_bins + sum(f.numel() for f in maps)
    else:
        elements = channels * (work.cells + work.bins)
    return Floor(_bytes(*sets) + elements * dtype.itemsize, channels * work.multiply_adds // LANES)


def _box_iou(backward: bool, dtype: torch.dtype, boxes1: Tensor, boxes2: Tensor) -> Floor:
    """Forward: boxes in, matrix out. Backward: boxes, and the gradient where they overlap, in; boxes' gradients out."""
    (n, m), wide = (boxes1.shape[-2], boxes2.shape[-2]), 8 if dtype == torch.float64 else 4
    matrix = boxes1.shape[:-2].numel() * n * m * wide
    boxes = (boxes1.numel() + boxes2.numel()) * dtype.itemsize
    pairs = sum(overlapping_pairs(a, b) for a, b in zip(boxes1.view(-1, n, 4), boxes2.view(-1, m, 4), strict=True))
    if backward:
        return Floor(2 * boxes + pairs * wide, pairs * IOU_BACKWARD // LANES)
    return Floor(boxes + matrix, pairs * IOU // LANES)


FLOORS: dict[str, Callable[..., Floor]] = {
    "roi_align": _roi_align,
    "box_iou": _box_iou,
}


def overlapping_pairs(boxes1: Tensor, boxes2: Tensor) -> int:
    """How many pairs of xyxy boxes, [N, 4] and [M, 4], share a positive area; on the boxes' device."""
    many, few = sorted((_proper(boxes1), _proper(boxes2)), key=len, reverse=True)
    x1, y1, x2, y2 = many.T.contiguous()
    total = torch.zeros((), dtype=torch.int64, device=many.device)
    for left, top, right, bottom in few.tolist():  # one at a time: the matrix may not fit, and a row fits the cache
        total += torch.count_nonzero((x1 < right) & (x2 > left) & (y1 < bottom) & (y2 > top))
    return int(total)


def _proper(boxes: Tensor) -> Tensor:
    """The boxes with a positive area; one without overlaps nothing, wherever it lies."""
    return boxes.detach()[(boxes[:, 2:] > boxes[:, :2]).all(dim=1)]
