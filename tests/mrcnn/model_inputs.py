"""Small inputs that the model's tests share."""

import dataclasses

import torch

from mrcnn.config import CONFIGS
from mrcnn.data.collate import Collate
from mrcnn.data.shapes import ShapesDataset

TINY = dataclasses.replace(CONFIGS["tiny"].model, num_classes=4)
FEW = dataclasses.replace(TINY, roi_samples=8, pre_nms_top_n=(20, 20), post_nms_top_n=(16, 16))
"""For the interpreter, whose cost is per RoI."""


def random_boxes(*shape: int, side: float = 100) -> torch.Tensor:
    """[*shape, 4] xyxy, at least one pixel wide and high."""
    corner = torch.rand(*shape, 2) * side
    return torch.cat([corner, corner + 1 + torch.rand(*shape, 2) * side / 2], dim=-1)


def shapes_batch(number: int = 2):
    """Pictures of 64 x 64."""
    dataset = ShapesDataset(number, 64, seed=5)
    return Collate(dataset.max_objects)([dataset[i] for i in range(number)])
