"""A small data set of JPEG files in COCO's format, made up: what a loader reads where no photographs are at hand.

Pictures of COCO's usual size, two of three 640 x 480 and the third 480 x 640, at JPEG quality 90. They are smooth
fields under a fine grain, about as many bytes a pixel as a photograph, with 4 to 12 blobs of one colour each; three of
four blobs are described by polygons, the others by run lengths. What a model learns from them is of no interest.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from mrcnn.data.rle import mask_api, segmentation_to_rle

LANDSCAPE, PORTRAIT = (640, 480), (480, 640)  # width, height
QUALITY = 90
OBJECTS = (4, 12)  # fewest and most
CLASSES = 5
GRAIN = 9.0  # standard deviation, of 255: decoding takes longer the more detail there is


def write_jpeg_set(folder: Path, images: int, seed: int = 0) -> tuple[Path, Path]:
    """Write `images` pictures and their annotations into `folder`, which is made where it is not there.

    Returns:
        The folder of the pictures and the path of the JSON, as `CocoDataset` takes them; the same for the same seed.

    Raises:
        ValueError: no images are asked for.
        OSError: the folder cannot be written.
    """
    if images < 1:
        raise ValueError(f"a data set has at least 1 image, got {images}")
    pictures = folder / "images"
    pictures.mkdir(parents=True, exist_ok=True)
    listed, annotations = [], []
    for number in range(1, images + 1):
        rng = np.random.default_rng((seed, number))
        size = PORTRAIT if number % 3 == 0 else LANDSCAPE
        name = f"{number:06d}.jpg"
        polygons = [_blob(rng, size) for _ in range(rng.integers(OBJECTS[0], OBJECTS[1] + 1))]
        _picture(rng, size, polygons).save(pictures / name, quality=QUALITY)
        listed.append({"id": number, "file_name": name, "width": size[0], "height": size[1]})
        for polygon in polygons:
            annotations.append(_annotation(rng, len(annotations) + 1, number, polygon, size))
    categories = [{"id": i, "name": f"blob {i}"} for i in range(1, CLASSES + 1)]
    path = folder / "instances.json"
    path.write_text(json.dumps({"images": listed, "annotations": annotations, "categories": categories}))
    return pictures, path


def _blob(rng: np.random.Generator, size: tuple[int, int]) -> list[float]:
    """The corners x0, y0, x1, y1, ... of a rough ellipse; sides from a tenth to half of the picture's, as COCO's."""
    corners = int(rng.integers(8, 40))
    angle = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    radius = rng.uniform(0.7, 1.0, corners)
    half = np.exp(rng.uniform(np.log(0.05), np.log(0.25), 2)) * size
    centre = rng.uniform(half, np.array(size) - half)
    points = centre + half * radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return points.round(2).flatten().tolist()


def _picture(rng: np.random.Generator, size: tuple[int, int], polygons: list[list[float]]) -> Image.Image:
    """The polygons before a smooth field, all under one grain."""
    field = Image.fromarray(rng.integers(40, 215, (6, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(field)
    for polygon in polygons:
        draw.polygon(polygon, fill=tuple(rng.integers(0, 256, 3).tolist()))
    grain = rng.normal(0, GRAIN, (size[1], size[0], 1))  # of the brightness: JPEG keeps little of the colours' detail
    return Image.fromarray((np.asarray(field) + grain).clip(0, 255).astype(np.uint8))


def _annotation(
    rng: np.random.Generator, number: int, image_id: int, polygon: list[float], size: tuple[int, int]
) -> dict:
    rle = segmentation_to_rle([polygon], size[1], size[0])
    as_runs = number % 4 == 0
    return {
        "id": number,
        "image_id": image_id,
        "category_id": int(rng.integers(1, CLASSES + 1)),
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()} if as_runs else [polygon],
        "bbox": mask_api().toBbox(rle).tolist(),
        "area": int(mask_api().area(rle)),
        "iscrowd": 0,
    }
