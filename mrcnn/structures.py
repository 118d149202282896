"""The padded, batched containers that flow through the model: no lists of per-image tensors.

Fixed shapes are what a training step without host synchronisations and graph breaks is made of, so an image
with few objects carries empty slots (`count` says how many are real) instead of a shorter tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from kernels import MaskPool


class _Movable:
    """What can be done to all tensors of a dataclass, those of its containers too."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Copy with `function` applied to every tensor."""
        return dataclasses.replace(self, **{name: _map(value, function) for name, value in vars(self).items()})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Copy with every tensor on `device`."""
        return self.map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Copy in page-locked memory; the DataLoader calls this when `pin_memory=True`."""
        return self.map(Tensor.pin_memory)


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    return value.map(function) if isinstance(value, (_Movable, MaskPool)) else value


@dataclass
class Targets(_Movable):
    """Ground truth of a batch: B images, G >= 1 slots each.

    Masks are bits of the objects' own rectangles, not maps of the image's size: see `kernels.MaskPool`.
    """

    boxes: Tensor  # [B, G, 4] float32, xyxy in pixels of the (resized) image; zeros in empty slots
    labels: Tensor  # [B, G] int64, 1..K-1; 0 in empty slots
    count: Tensor  # [B] int32, number of real objects: slots 0..count-1
    masks: MaskPool

    @property
    def valid(self) -> Tensor:
        """[B, G] bool: which slots hold an object."""
        return torch.arange(self.boxes.shape[1], device=self.count.device) < self.count[:, None]


@dataclass
class Batch(_Movable):
    """Images padded at the bottom and right to one size, with what is needed to map results back."""

    images: Tensor  # [B, 3, H, W] uint8 RGB, zero-padded; H and W divisible by 32
    sizes: Tensor  # [B, 2] int64: height, width of the valid part
    image_ids: list[int]
    original_sizes: list[tuple[int, int]]  # (height, width) before resizing
    targets: Targets | None = None
    replaced: int = 0  # damaged images that others stand for
