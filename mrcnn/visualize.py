"""Detections drawn on pictures, and sheets of ground truth beside prediction, for a person to look at."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

# Names are unreadable on pictures smaller than this: they are enlarged by a whole factor first.
MIN_SIDE = 480
MARGIN = 8


def draw_detections(
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    scores: Tensor | None,
    masks: Tensor | None,
    class_names: Sequence[str],
) -> Image.Image:
    """Draw objects on a picture, each in its own colour, with class name and score.

    Args:
        image: uint8 `[3, H, W]` RGB.
        boxes: `[n, 4]` xyxy in pixels.
        labels: `[n]` integers; a label outside class_names is shown as a number.
        scores: `[n]` in 0..1, or None for ground truth.
        masks: `[n, H, W]`, non-zero where the object is, or None.
        class_names: label -> name.

    Returns:
        An RGB picture as large as `image` or a whole multiple of it, so that captions can be read.
        Objects that are much narrower than their caption get none: it would hide their neighbours.
    """
    factor = max(1, math.ceil(MIN_SIDE / max(image.shape[-2:])))
    canvas = _enlarge(image.detach().cpu().as_subclass(Tensor), factor)
    boxes = boxes.detach().cpu().as_subclass(Tensor).float() * factor
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2])
    if len(boxes) == 0:
        return F.to_pil_image(canvas)
    colours = _colours(len(boxes))
    if masks is not None:
        dense = _enlarge(masks.detach().cpu().as_subclass(Tensor).ne(0), factor)
        for mask, colour in zip(dense, colours, strict=True):  # one at a time: torchvision blackens overlaps
            canvas = draw_segmentation_masks(canvas, mask, alpha=0.45, colors=[colour])
    width = max(2, round(max(canvas.shape[-2:]) / 400))
    picture = F.to_pil_image(draw_bounding_boxes(canvas, boxes, colors=colours, width=width))
    _write_captions(picture, boxes.tolist(), _captions(labels, scores, class_names), colours)
    return picture


def draw_sheet(
    rows: Sequence[tuple[Image.Image, Image.Image]],
    path: Path | str,
    titles: tuple[str, str] = ("ground truth", "prediction"),
) -> None:
    """Write a PNG contact sheet: one row per pair, ground truth on the left, prediction on the right.

    Args:
        rows: pairs of pictures of any sizes, which are kept.
        path: of the PNG; its folder is created.
        titles: of the two columns.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("a sheet needs at least one row")
    width = max(picture.width for row in rows for picture in row)
    heights = [max(picture.height for picture in row) for row in rows]
    font = ImageFont.truetype(_font_path(), _font_size(width))
    header = 2 * MARGIN + sum(font.getmetrics())
    size = (3 * MARGIN + 2 * width, header + sum(heights) + len(rows) * MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        left = MARGIN + column * (width + MARGIN)
        draw.text((left, MARGIN), title, fill="black", font=font)
        for line, row in enumerate(rows):
            sheet.paste(row[column], (left, header + sum(heights[:line]) + line * MARGIN))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG")


def _enlarge(picture: Tensor, factor: int) -> Tensor:
    """Repeat every pixel `factor` times in both directions of `[C, H, W]`."""
    return picture.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def _captions(labels: Tensor, scores: Tensor | None, class_names: Sequence[str]) -> list[str]:
    names = [class_names[i] if 0 <= i < len(class_names) else str(i) for i in labels.tolist()]
    if scores is None:
        return names
    return [f"{name} {score:.2f}" for name, score in zip(names, scores.tolist(), strict=True)]


def _write_captions(
    picture: Image.Image, boxes: list[list[float]], captions: list[str], colours: list[tuple[int, int, int]]
) -> None:
    """Write each caption on its colour: above the box, or inside where there is no room above."""
    draw = ImageDraw.Draw(picture)
    font = ImageFont.truetype(_font_path(), _font_size(max(picture.size)))
    for (x0, y0, x1, _), caption, colour in zip(boxes, captions, colours, strict=True):
        if font.getlength(caption) > 1.5 * (x1 - x0):
            continue
        place = (min(x0, picture.width - font.getlength(caption)), max(y0, sum(font.getmetrics())))
        draw.rectangle(draw.textbbox(place, caption, font=font, anchor="ld"), fill=colour)
        draw.text(place, caption, fill="black", font=font, anchor="ld")


def _colours(count: int) -> list[tuple[int, int, int]]:
    """Bright colours (black text is readable on them); the golden ratio keeps successive hues far apart."""
    hues = (i * 0.618034 % 1 for i in range(count))
    return [tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.65, 1.0)) for hue in hues]


def _font_size(side: int) -> int:
    return max(12, side // 45)


def _font_path() -> str:
    """The font that matplotlib brings along: Pillow's own lacks most of the world's letters."""
    import matplotlib

    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
