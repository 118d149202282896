"""Anchors: the boxes that the RPN classifies and moves (arXiv:1506.01497)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kernels import AnchorGrid

from ..config import ModelConfig


def cell_anchors(sizes: Sequence[float], aspect_ratios: Sequence[float], rounded: bool = True) -> Tensor:
    """Anchors of one cell, centred on 0: [sizes * ratios, 4] xyxy in pixels, ordered by (ratio, size) as torchvision's.

    Each has the area size**2 and height / width = ratio; `rounded` moves the corners to whole pixels.
    """
    root = torch.sqrt(torch.tensor(aspect_ratios, dtype=torch.float32))
    size = torch.tensor(sizes, dtype=torch.float32)
    half = torch.stack([((1 / root)[:, None] * size).flatten(), (root[:, None] * size).flatten()], dim=1) / 2
    anchors = torch.cat([-half, half], dim=1)
    return anchors.round() if rounded else anchors


class Anchors(nn.Module):
    """The anchors of every level's cells."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        cells = [
            cell_anchors([size * scale for scale in config.anchor_scales], config.aspect_ratios, config.round_anchors)
            for size in config.anchor_sizes
        ]
        self.register_buffer("cells", torch.stack(cells), persistent=False)  # [L, k, 4]
        self.per_cell = self.cells.shape[1]

    def forward(self, features: Sequence[Tensor], image_size: tuple[int, int]) -> AnchorGrid:
        """Cells, extents and strides of all levels; no anchor is made here.

        Args:
            features: P2..P5 or P6, [B, C, H_l, W_l].
            image_size: (H, W) of the padded images; a level's stride is H // H_l.
        """
        extents = [tuple(f.shape[-2:]) for f in features]
        strides = [(image_size[0] // height, image_size[1] // width) for height, width in extents]
        return AnchorGrid(self.cells, extents, strides)
