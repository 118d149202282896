"""The padded, batched containers that flow through the model: no lists of per-image tensors.

Fixed shapes are what a training step without host synchronisations and graph breaks is made of, so an image
with few objects carries empty slots (`count` says how many are real) instead of a shorter tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kernels import MaskPool


class _Movable:
    """`.to()` and `.pin_memory()` over every tensor (or container) of a dataclass."""

    def _map(self, function):  # noqa: ANN001
        return type(self)(**{f.name: function(getattr(self, f.name)) for f in fields(self)})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> _Movable:
        """Copy with every tensor on `device`."""
        return self._map(lambda v: v.to(device, non_blocking=non_blocking) if hasattr(v, "to") else v)

    def pin_memory(self) -> _Movable:
        """Copy in page-locked memory; the DataLoader calls this when `pin_memory=True`."""
        return self._map(lambda v: v.pin_memory() if hasattr(v, "pin_memory") else v)


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
