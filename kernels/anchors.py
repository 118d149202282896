"""The anchors of a feature pyramid, described by what they are made of: cells, extents, strides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_tensor

MOST_ANCHORS = 1 << 24
"""Of an image: kernels get extents as fp32, which holds every whole number up to here. (Triton specialises on whole
numbers in tuples, and would compile anew for many an image size.)"""


@dataclass(frozen=True, eq=False)
class AnchorGrid:
    """Anchors ordered by (level, y, x, anchor of the cell), as torchvision's and detectron2's generators order them.

    Anchor (l, y, x, a) is `cells[l, a]` moved by (x * stride_x, y * stride_y) of its level, in fp32.

    Args:
        cells: [L, k, 4] fp32 xyxy in pixels, relative to the cell's origin, on the device of the other arguments.
        extents: (H_l, W_l) of the L feature maps.
        strides: (stride_y, stride_x) of each level in pixels, whole numbers.

    Raises:
        TypeError, ValueError: wrong type, dtype or shape, or lists that do not fit together.
    """

    cells: Tensor
    extents: Sequence[tuple[int, int]]
    strides: Sequence[tuple[int, int]]

    def __post_init__(self) -> None:
        check_tensor(self.cells, "cells", 3, last=4)
        if self.cells.dtype != torch.float32:
            raise TypeError(f"cells must be float32, got {self.cells.dtype}")
        if len(self.cells) == 0:
            raise ValueError("cells must have at least one level")
        if not len(self.cells) == len(self.extents) == len(self.strides):
            raise ValueError(
                f"cells, extents and strides must have one entry a level, got {len(self.cells)}, {len(self.extents)} "
                f"and {len(self.strides)}"
            )
        for name, pairs in (("extents", self.extents), ("strides", self.strides)):
            if not all(isinstance(pair, Sequence) and len(pair) == 2 for pair in pairs):
                raise ValueError(f"{name} must be pairs, (of y, of x) for each level, got {pairs}")
            if not all(isinstance(n, int | torch.SymInt) and not isinstance(n, bool) for pair in pairs for n in pair):
                raise TypeError(f"{name} must be Python's whole numbers, got {pairs}")
            if any(n < 0 for pair in pairs for n in pair):
                raise ValueError(f"{name} must not be negative, got {pairs}")

    @classmethod
    def of(cls, anchors: Tensor) -> AnchorGrid:
        """Any anchors [A, 4], as the only cell of one level."""
        check_tensor(anchors, "anchors", 2, last=4)
        return cls(anchors[None], ((1, 1),), ((0, 0),))

    @property
    def level_sizes(self) -> list[int]:
        """Number of anchors of each level."""
        return [height * width * self.cells.shape[1] for height, width in self.extents]

    def __len__(self) -> int:
        """Number of anchors, A."""
        return sum(self.level_sizes)

    def flat(self) -> tuple[Tensor, list[int], list[int]]:
        """As torch.library ops take it: cells, then [H_0, W_0, H_1, ...] and the strides in the same order."""
        return self.cells, [n for e in self.extents for n in e], [n for s in self.strides for n in s]

    def anchors(self) -> Tensor:
        """All of them: [A, 4] fp32 xyxy in pixels."""
        levels = []
        for cell, (height, width), (stride_y, stride_x) in zip(self.cells, self.extents, self.strides, strict=True):
            y = torch.arange(height, device=cell.device, dtype=torch.float32) * stride_y
            x = torch.arange(width, device=cell.device, dtype=torch.float32) * stride_x
            y, x = torch.meshgrid(y, x, indexing="ij")
            shifts = torch.stack([x, y, x, y], dim=-1)
            levels.append((shifts[:, :, None] + cell).reshape(-1, 4))
        return torch.cat(levels)


def kernel_arguments(cells: Tensor, extents: list[int], strides: list[int]) -> tuple:
    """What kernels take of a flat grid: cells, anchors a cell, then tuples by level: heights, widths, strides y, x."""
    by_level = (tuple(map(float, numbers)) for numbers in (extents[::2], extents[1::2], strides[::2], strides[1::2]))
    return cells.contiguous(), cells.shape[-2], *by_level
