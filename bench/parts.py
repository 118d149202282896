"""The part of a call that is checked: the reference is slow and hungry, so of a batch it sees two images."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels import MaskPool

from .workloads import ROI_OPS, Inputs

BATCHED = {  # ops that are checked on a part of the batch (of pasting: of the masks): which of their arguments have one
    "label_anchors": (1, 2),
    "label_grid_anchors": (1, 2),
    "nms_mask": (0, 1),
    "stable_topk": (0,),
    "decode_proposals": (0, 1, 2, 4),
    "mask_targets": (1, 2, 0),
    "paste_masks": (0, 1),
}


@dataclass(frozen=True)
class Part:
    """The share of a call that is checked: its inputs, and how to find it in whole outputs and gradients."""

    inputs: Inputs
    of_outputs: Callable[[Sequence[Tensor]], list[Tensor]] = list
    of_grads: Callable[[Sequence[Tensor]], list[Tensor]] = list


def listed(output: object) -> list[Tensor]:
    """The tensors of an op's result, which may be one or several."""
    return [output] if isinstance(output, Tensor) else list(output)


def count_images(op: str, inputs: Inputs) -> int:
    """Of which a part can be checked; 0 where an op is checked whole."""
    if op in ROI_OPS:
        return len(listed(inputs.args[0])[0])
    return len(inputs.args[BATCHED[op][0]]) if op in BATCHED else 0


def random_images(count: int) -> list[int]:
    """Two images that no provider can foresee."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(time.time_ns() % 2**31))[:2].sort()[0].tolist()


def part_of(op: str, inputs: Inputs, images: Sequence[int] | None) -> Part:
    """The share of the call that concerns `images`, by default the first and the last; all of it where it has none."""
    if op in ROI_OPS:
        return _roi_part(inputs, images)
    if op not in BATCHED:
        return Part(inputs)
    images = _first_and_last(count_images(op, inputs)) if images is None else list(images)
    args = tuple(_take(a, images) if place in BATCHED[op] else a for place, a in enumerate(inputs.args))
    return Part(Inputs(args), lambda outputs: [o[images] for o in outputs])


def _take(batch: Tensor | MaskPool, images: list[int]) -> Tensor | MaskPool:
    """The rows of some images; of a pool the bitmaps stay where they are."""
    if isinstance(batch, MaskPool):
        rows = {name: getattr(batch, name)[images] for name in ("offset", "extent", "sizes")}
        return replace(batch, **rows)
    return batch[images]


def _roi_part(inputs: Inputs, images: Sequence[int] | None) -> Part:
    features, rois, *rest = inputs.args
    levels, sets = listed(features), listed(rois)
    images = _first_and_last(len(levels[0])) if images is None else list(images)
    chosen = torch.tensor(images, device=sets[0].device)
    rows = [torch.isin(of_set[:, 0].long(), chosen).nonzero()[:, 0] for of_set in sets]
    parts = [level.detach()[images] for level in levels]
    renumbered = [_renumbered(of_set[taken], chosen) for of_set, taken in zip(sets, rows, strict=True)]
    args = [parts if isinstance(features, list) else parts[0], renumbered if isinstance(rois, list) else renumbered[0]]
    return Part(
        Inputs((*args, *rest), tuple(parts)),
        lambda outputs: [o[taken] for o, taken in zip(outputs, rows, strict=True)],
        lambda grads: [g[images] for g in grads],
    )


def _renumbered(rois: Tensor, images: Tensor) -> Tensor:
    """A copy whose images are numbered by their places among `images`."""
    copy = rois.clone()
    copy[:, 0] = torch.searchsorted(images, rois[:, 0].long()).to(rois.dtype)
    return copy


def _first_and_last(count: int) -> list[int]:
    return [0, count - 1] if count > 1 else [0]
