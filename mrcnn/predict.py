"""Detecting objects in image files: pictures and JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision import tv_tensors

from .checkpoint import Checkpoint
from .data.augment import build_transform
from .data.coco import read_image
from .data.collate import Collate
from .inference import detect


def predict(checkpoint: Checkpoint, paths: Sequence[Path]) -> Iterator[tuple[Path, Tensor, dict[str, Tensor]]]:
    """(path, image uint8 [3, h, w], detections on it) for each file, one at a time.

    Raises:
        DataError: a file is absent or is no image.
    """
    data = checkpoint.config.data
    resize = build_transform(False, data.image_size, data.max_size)
    collate = Collate(1)
    for i, path in enumerate(paths):
        image = read_image(path)
        batch = collate([resize(image, _no_objects(i, image))])
        ((_, detections),) = detect(checkpoint.model, batch)
        yield path, image, detections


def _no_objects(image_id: int, image: Tensor) -> dict:
    size = tuple(image.shape[-2:])
    return {
        "boxes": tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=size),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": tv_tensors.Mask(torch.zeros(0, *size, dtype=torch.uint8)),
        "image_id": image_id,
        "original_size": size,
    }
