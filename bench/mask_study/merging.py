"""Merged instances, counted: whether a mask takes a neighbour's pixels for its own object's.

An *intruder* in a box is another visible object of the picture with at least 16 pixels, and at least a quarter of all
its visible pixels, inside the box. A mask *covers* it if it contains at least half of those pixels in the box. Covered
intruders of the object's own class are merged instances, those of another class spilled ones; both are counted over
the intruders that there were to cover. Masks of different objects share no pixel, so a perfect mask covers none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou

MIN_PIXELS, MIN_SHARE, MIN_COVER = 16, 0.25, 0.5
MATCH_IOU = 0.5


@dataclass
class Tally:
    """Sums over masks, each of which stands for one object."""

    masks: int = 0
    iou: float = 0.0
    fill: float = 0.0  # the mask's share of the box
    object_fill: float = 0.0  # the object's
    same: int = 0  # intruders of the object's class
    merged: int = 0  # of them covered
    other: int = 0
    spilled: int = 0

    def add(self, mask: Tensor, box: Tensor, own: int, labels: Tensor, truth: Tensor) -> None:
        """Count one mask.

        Args:
            mask: bool [H, W], what was predicted.
            box: [4] xyxy in which it was predicted.
            own: the object that it stands for.
            labels: [n] of the objects.
            truth: bool [n, H, W], their visible masks.
        """
        x0, y0, x1, y1 = _pixels(box, mask.shape)
        area = max(1, (x1 - x0) * (y1 - y0))
        inside = truth[:, y0:y1, x0:x1]
        covered = (inside & mask[y0:y1, x0:x1]).sum((1, 2))
        pixels, total = inside.sum((1, 2)), truth.sum((1, 2))
        intruder = (pixels >= MIN_PIXELS) & (pixels >= MIN_SHARE * total)
        intruder[own] = False
        taken = intruder & (covered >= MIN_COVER * pixels)
        same = labels == labels[own]
        self.masks += 1
        self.iou += float((mask & truth[own]).sum() / (mask | truth[own]).sum().clamp(min=1))
        self.fill += float(mask[y0:y1, x0:x1].sum()) / area
        self.object_fill += float(pixels[own]) / area
        self.same += int((intruder & same).sum())
        self.merged += int((taken & same).sum())
        self.other += int((intruder & ~same).sum())
        self.spilled += int((taken & ~same).sum())

    def means(self) -> dict[str, float | None]:
        """What the sums come to; None where there was nothing to count."""
        return {
            "iou": _ratio(self.iou, self.masks),
            "fill": _ratio(self.fill, self.masks),
            "object_fill": _ratio(self.object_fill, self.masks),
            "merged": _ratio(self.merged, self.same),
            "spilled": _ratio(self.spilled, self.other),
        }


def match(boxes: Tensor, labels: Tensor, truth_boxes: Tensor, truth_labels: Tensor) -> list[tuple[int, int]]:
    """(detection, object) pairs: the best-scored detection first, the object of its class that it overlaps most.

    Detections are sorted by score; an object is matched once, at a box IoU of at least 0.5.
    """
    iou = box_iou(boxes.float(), truth_boxes.float())
    iou = torch.where(labels[:, None] == truth_labels, iou, 0.0)
    pairs = []
    for row, values in enumerate(iou):
        if len(values) and float(values.max()) >= MATCH_IOU:
            column = int(values.argmax())
            pairs.append((row, column))
            iou[:, column] = 0.0
    return pairs


def _pixels(box: Tensor, shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """The whole pixels that a box touches, inside the picture."""
    x0, y0 = (max(0, int(v)) for v in box[:2].floor().tolist())
    x1, y1 = (int(v) for v in box[2:].ceil().tolist())
    return x0, y0, min(x1, shape[1]), min(y1, shape[0])


def _ratio(value: float, count: int) -> float | None:
    return value / count if count else None
