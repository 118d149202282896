"""A data set that needs no files: coloured, overlapping circles, squares and triangles, drawn on demand.

It gives the demo and the tests something that a small network learns within minutes on a CPU, with what makes
instance segmentation harder than classification: several sizes, occlusion, and noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes

from ..errors import ConfigError
from .coco import mask_api

MIN_OBJECTS, MAX_OBJECTS = 2, 7
MIN_SIZE, MAX_SIZE = 0.12, 0.45  # diameter, as a share of the image side
MIN_VISIBLE_SHARE, MIN_VISIBLE_PIXELS = 0.25, 16


class ShapesDataset(Dataset):
    """`length` square pictures of 2 to 7 shapes each; later shapes hide earlier ones.

    Masks are the visible part of a shape; a shape with less than a quarter or fewer than 16 pixels visible is
    in the picture but not among the objects. A picture depends on (seed, index) alone.

    Attributes are those of CocoDataset: class_names, category_ids, image_ids (1..length) and max_objects.
    """

    class_names = ("__background__", "circle", "square", "triangle")

    def __init__(self, length: int, image_size: int = 128, seed: int = 0, transform: Callable | None = None) -> None:
        """Describe the data set; pictures are drawn when they are asked for.

        Args:
            length: number of pictures.
            image_size: height and width in pixels, at least 32.
            seed: different seeds give unrelated pictures, e.g. 0 to train and 1 to evaluate.
            transform: called with (image, target), as torchvision.transforms.v2 transforms are.

        Raises:
            ConfigError: a length below 1 or an image_size below 32.
        """
        if length < 1 or image_size < 32:
            raise ConfigError(f"shapes need length >= 1 and image_size >= 32, got {length} and {image_size}")
        self.length, self.image_size, self.seed, self.transform = length, image_size, seed, transform
        self.class_names = list(type(self).class_names)
        self.category_ids = list(range(len(self.class_names)))
        self.image_ids = list(range(1, length + 1))
        self.max_objects = MAX_OBJECTS

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, dict]:
        """Draw a picture: an image and a target of the types and shapes of CocoDataset.__getitem__."""
        index = range(self.length)[index]
        image, labels, masks = self._draw(index)
        masks = torch.from_numpy(masks)
        size = (self.image_size, self.image_size)
        boxes = masks_to_boxes(masks)
        boxes[:, 2:] += len(masks) > 0  # torchvision's ends are inclusive, a box's are not
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            "labels": torch.from_numpy(labels),
            "masks": tv_tensors.Mask(masks),
            "image_id": self.image_ids[index],
            "original_size": size,
        }
        image = tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1).contiguous())
        return self.transform(image, target) if self.transform else (image, target)

    def ground_truth(self) -> dict:
        """Every picture's objects as a COCO dict with RLE masks, at the size before any transform."""
        api = mask_api()
        annotations = []
        for image_id, (_, labels, masks) in zip(self.image_ids, map(self._draw, range(self.length)), strict=True):
            for label, mask in zip(labels.tolist(), masks, strict=True):
                rle = api.encode(np.asfortranarray(mask))
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": label,
                        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                        "area": int(mask.sum()),
                        "bbox": api.toBbox(rle).tolist(),
                        "iscrowd": 0,
                    }
                )
        side = self.image_size
        return {
            "images": [{"id": i, "file_name": f"{i}.png", "height": side, "width": side} for i in self.image_ids],
            "annotations": annotations,
            "categories": [{"id": i, "name": name} for i, name in enumerate(self.class_names) if i],
        }

    def _draw(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """uint8 [S, S, 3] picture, int64 [n] labels, uint8 [n, S, S] visible masks."""
        rng = np.random.default_rng((self.seed, index))
        picture, ground = _background(rng, self.image_size)
        labels = rng.integers(1, len(self.class_names), rng.integers(MIN_OBJECTS, MAX_OBJECTS + 1))
        whole = np.stack([_shape_mask(rng, label, self.image_size) for label in labels])
        owner = np.zeros(picture.shape[:2], dtype=np.int64)  # 0: background, i + 1: shape i is on top
        for i, mask in enumerate(whole):
            picture[mask] = _colour_away_from(rng, ground)
            owner[mask] = i + 1
        picture += rng.normal(0, rng.uniform(4, 12), picture.shape)
        visible = owner == np.arange(1, len(labels) + 1)[:, None, None]
        pixels, total = visible.sum((1, 2)), whole.sum((1, 2))
        kept = (pixels >= MIN_VISIBLE_PIXELS) & (pixels >= MIN_VISIBLE_SHARE * total)
        return picture.clip(0, 255).astype(np.uint8), labels[kept], visible[kept].astype(np.uint8)


def _background(rng: np.random.Generator, side: int) -> tuple[np.ndarray, np.ndarray]:
    """A gradient between two similar colours: float [S, S, 3], and its mean colour [3]."""
    ends = np.clip(rng.uniform(40, 215, 3) + rng.uniform(-30, 30, (2, 3)), 0, 255)
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[:side, :side] / side - 0.5
    share = np.clip(0.5 + x * math.cos(angle) + y * math.sin(angle), 0, 1)[..., None]
    return ends[0] * (1 - share) + ends[1] * share, ends.mean(0)


def _colour_away_from(rng: np.random.Generator, ground: np.ndarray) -> np.ndarray:
    """A random colour that a person can tell from `ground`."""
    while True:
        colour = rng.uniform(0, 255, 3)
        if np.abs(colour - ground).max() > 70:
            return colour


def _shape_mask(rng: np.random.Generator, label: int, side: int) -> np.ndarray:
    """Bool [S, S] mask of one shape at a random place, at least half of it inside the picture."""
    radius = rng.uniform(MIN_SIZE, MAX_SIZE) * side / 2
    centre = rng.uniform(radius / 2, side - radius / 2, 2)
    canvas = Image.new("1", (side, side))
    draw = ImageDraw.Draw(canvas)
    if label == 1:
        draw.ellipse([*(centre - radius), *(centre + radius)], fill=1)
    else:
        corners = {2: 4, 3: 3}[int(label)]
        angles = rng.uniform(0, 2 * math.pi) + np.arange(corners) * 2 * math.pi / corners
        points = centre + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        draw.polygon([tuple(point) for point in points.tolist()], fill=1)
    return np.array(canvas)
