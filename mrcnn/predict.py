"""Detecting objects in image files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torchvision import tv_tensors

from .checkpoint import Checkpoint
from .data.augment import build_transform
from .data.coco import read_image
from .data.collate import Collate
from .inference import detect


def predict(checkpoint: Checkpoint, path: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """The image of a file (uint8 [3, h, w]) and the detections on it: boxes, labels, scores, bool masks [n, h, w].

    Raises:
        DataError: the file is absent or is no image.
    """
    data = checkpoint.config.data
    image = read_image(path)
    resized = build_transform(False, data.image_size, data.max_size)(image, _no_objects(image))
    ((_, detections),) = detect(checkpoint.model, Collate(1)([resized]))
    return image, detections


def _no_objects(image: Tensor) -> dict:
    size = tuple(image.shape[-2:])
    return {
        "boxes": tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=size),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": tv_tensors.Mask(torch.zeros(0, *size, dtype=torch.uint8)),
        "image_id": 0,
        "original_size": size,
    }
