"""A data set that needs no files: coloured, overlapping circles, squares, triangles and more, drawn on demand.

It gives the demo and the tests something that a small network learns within minutes on a CPU, with what makes
instance segmentation harder than classification: several sizes, occlusion, and noise; if wanted, also crowds, in which
objects of one class lie against each other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes

from ..errors import ConfigError
from .rle import mask_api

MIN_OBJECTS, MAX_OBJECTS = 2, 7
MIN_SIZE, MAX_SIZE = 0.12, 0.45  # diameter, as a share of the image side
MIN_VISIBLE_SHARE, MIN_VISIBLE_PIXELS = 0.25, 16

KINDS = ("circle", "square", "triangle", "star", "cross", "ring", "half disc", "bar", "pentagon", "ellipse")
"""What can be drawn; a data set has the first few."""

# In a crowd
CROWD_OBJECTS = (3, 7)  # fewest and most
CROWD_SIZE = (0.28, 0.5)  # diameters
NEIGHBOUR_SHARE = 0.8  # of the shapes after the first: put against one that is there already
SAME_KIND_SHARE = 0.8  # of the neighbours: of its kind
NEIGHBOUR_DISTANCE = (0.7, 1.1)  # between the centres, over the sum of the radii: overlapping to hardly touching
PALETTE = np.array(  # RGB of each kind
    [
        *((230, 60, 50), (60, 180, 75), (60, 90, 230), (240, 200, 40), (200, 60, 210)),
        *((60, 210, 220), (245, 140, 40), (150, 90, 60), (240, 240, 240), (130, 130, 130)),
    ]
)


class ShapesDataset(Dataset):
    """`length` square pictures of 2 to 7 shapes each, or 3 to 7 in a crowd; later shapes hide earlier ones.

    Masks are the visible part of a shape; a shape with less than a quarter or fewer than 16 pixels visible is
    in the picture but not among the objects. A picture depends on (seed, index), kinds and crowded alone.

    Attributes are those of CocoDataset: class_names, category_ids, image_ids (1..length) and max_objects.
    """

    def __init__(
        self,
        length: int,
        image_size: int = 128,
        seed: int = 0,
        transform: Callable | None = None,
        kinds: int = 3,
        crowded: bool = False,
    ) -> None:
        """Describe the data set; pictures are drawn when they are asked for.

        Args:
            length: number of pictures.
            image_size: height and width in pixels, at least 32.
            seed: different seeds give unrelated pictures, e.g. 0 to train and 1 to evaluate.
            transform: called with (image, target), as torchvision.transforms.v2 transforms are.
            kinds: number of classes, the first of `KINDS`.
            crowded: large shapes, most of them put against another one, and most of those of its class and size. The
                colour tells the class, which is then learnt in minutes; what is left is to tell one from its neighbour.

        Raises:
            ConfigError: a length below 1, an image_size below 32, or kinds that there are not.
        """
        if length < 1 or image_size < 32:
            raise ConfigError(f"shapes need length >= 1 and image_size >= 32, got {length} and {image_size}")
        if not 1 <= kinds <= len(KINDS):
            raise ConfigError(f"there are 1 to {len(KINDS)} kinds of shapes, got {kinds}")
        self.length, self.image_size, self.seed, self.transform = length, image_size, seed, transform
        self.crowded = crowded
        self.class_names = ["__background__", *KINDS[:kinds]]
        self.category_ids = list(range(len(self.class_names)))
        self.image_ids = list(range(1, length + 1))
        self.max_objects = CROWD_OBJECTS[1] if crowded else MAX_OBJECTS

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

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of every picture before any transform."""
        return [(self.image_size, self.image_size)] * self.length

    def object_sizes(self) -> Iterator[np.ndarray]:
        """Of every picture, float [n, 2]: more and larger objects than it has, which only drawing it would tell."""
        most = np.full((self.max_objects, 2), float(self.image_size))
        return itertools.repeat(most, self.length)

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
        draw = _draw_crowd if self.crowded else _draw_scattered
        labels, whole = draw(rng, len(self.class_names) - 1, self.image_size)
        owner = np.zeros(picture.shape[:2], dtype=np.int64)  # 0: background, i + 1: shape i is on top
        for i, mask in enumerate(whole):
            picture[mask] = _class_colour(rng, int(labels[i])) if self.crowded else _colour_away_from(rng, ground)
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


def _class_colour(rng: np.random.Generator, label: int) -> np.ndarray:
    """The colour of a class, lighter or darker."""
    return np.clip(PALETTE[label - 1] * rng.uniform(0.65, 1.0) + rng.uniform(-20, 20, 3), 0, 255)


def _draw_scattered(rng: np.random.Generator, kinds: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels [n] and whole masks, bool [n, S, S], of shapes anywhere, at least half of each inside the picture."""
    labels = rng.integers(1, kinds + 1, rng.integers(MIN_OBJECTS, MAX_OBJECTS + 1))
    masks = []
    for label in labels:
        radius = rng.uniform(MIN_SIZE, MAX_SIZE) * side / 2
        centre = rng.uniform(radius / 2, side - radius / 2, 2)
        masks.append(_shape_mask(rng, label, centre, radius, side))
    return labels, np.stack(masks)


def _draw_crowd(rng: np.random.Generator, kinds: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Likewise, most shapes put against an earlier one, and most of those of its kind and about its size."""
    labels, masks, places = [], [], []
    for _ in range(rng.integers(CROWD_OBJECTS[0], CROWD_OBJECTS[1] + 1)):
        label = int(rng.integers(1, kinds + 1))
        radius = rng.uniform(*CROWD_SIZE) * side / 2
        centre = rng.uniform(radius / 2, side - radius / 2, 2)
        if places and rng.random() < NEIGHBOUR_SHARE:
            other = int(rng.integers(len(places)))
            if rng.random() < SAME_KIND_SHARE:
                label = labels[other]
                radius = places[other][1] * rng.uniform(0.8, 1.2)
            distance = rng.uniform(*NEIGHBOUR_DISTANCE) * (radius + places[other][1])
            around = places[other][0] + distance * _on_circle(rng.uniform(0, 2 * math.pi, 8))
            inside = np.abs(around - side / 2).max(axis=1) <= side / 2 - radius / 2
            centre = around[inside.argmax()] if inside.any() else centre
        labels.append(label)
        places.append((centre, radius))
        masks.append(_shape_mask(rng, label, centre, radius, side))
    return np.array(labels), np.stack(masks)


def _shape_mask(rng: np.random.Generator, label: int, centre: np.ndarray, radius: float, side: int) -> np.ndarray:
    """Bool [S, S] mask of one shape, turned at random where that can be seen."""
    canvas = Image.new("1", (side, side))
    draw = ImageDraw.Draw(canvas)
    kind = KINDS[label - 1]
    if kind in ("circle", "ring"):
        draw.ellipse([*(centre - radius), *(centre + radius)], fill=1)
        if kind == "ring":
            draw.ellipse([*(centre - radius / 2), *(centre + radius / 2)], fill=0)
    else:
        angle = rng.uniform(0, 2 * math.pi)
        if kind in REGULAR:
            points = centre + radius * _on_circle(angle + np.arange(REGULAR[kind]) * 2 * math.pi / REGULAR[kind])
        else:
            turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
            points = centre + radius * OUTLINES[kind] @ turn
        draw.polygon([tuple(point) for point in points.tolist()], fill=1)
    return np.array(canvas)


def _on_circle(angles: np.ndarray) -> np.ndarray:
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


REGULAR = {"square": 4, "triangle": 3, "pentagon": 5}
"""Corners of the regular polygons."""

_ARM = 0.33  # half the width of the cross's arms
OUTLINES = {
    "star": _on_circle(np.arange(10) * math.pi / 5) * np.where(np.arange(10) % 2, 0.42, 1.0)[:, None],
    "cross": np.array(
        [
            *((_ARM, 1), (_ARM, _ARM), (1, _ARM), (1, -_ARM), (_ARM, -_ARM), (_ARM, -1)),
            *((-_ARM, -1), (-_ARM, -_ARM), (-1, -_ARM), (-1, _ARM), (-_ARM, _ARM), (-_ARM, 1)),
        ]
    ),
    "half disc": _on_circle(np.linspace(0, math.pi, 24)) - [0, 0.4],
    "bar": np.array([(1, 0.25), (1, -0.25), (-1, -0.25), (-1, 0.25)]),
    "ellipse": _on_circle(np.linspace(0, 2 * math.pi, 40, endpoint=False)) * [1, 0.55],
}
"""Corners of the others, in radii from the centre."""
