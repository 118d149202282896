"""Anchors: the boxes that the RPN classifies and moves (arXiv:1506.01497)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

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
        for level, size in enumerate(config.anchor_sizes):
            sizes = [size * scale for scale in config.anchor_scales]
            cell = cell_anchors(sizes, config.aspect_ratios, config.round_anchors)
            self.register_buffer(f"cell{level}", cell, persistent=False)
        self.per_cell = len(config.anchor_scales) * len(config.aspect_ratios)

    def forward(self, features: Sequence[Tensor], image_size: tuple[int, int]) -> tuple[Tensor, list[int]]:
        """Anchors of all levels and how many each has.

        Args:
            features: P2..P5 or P6, [B, C, H_l, W_l].
            image_size: (H, W) of the padded images; a level's stride is H // H_l.

        Returns:
            [A, 4] fp32 xyxy in pixels, ordered by (level, y, x, anchor of the cell), with A = sum of H_l * W_l * k, and
            the terms of that sum.
        """
        levels = []
        for level, feature in enumerate(features):
            cell = getattr(self, f"cell{level}")
            height, width = feature.shape[-2:]
            y = torch.arange(height, device=cell.device, dtype=torch.float32) * (image_size[0] // height)
            x = torch.arange(width, device=cell.device, dtype=torch.float32) * (image_size[1] // width)
            y, x = torch.meshgrid(y, x, indexing="ij")
            shifts = torch.stack([x, y, x, y], dim=-1)
            levels.append((shifts[:, :, None] + cell).reshape(-1, 4))
        return torch.cat(levels), [len(anchors) for anchors in levels]
