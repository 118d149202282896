"""From proposals to detections: decode, threshold, NMS by class, masks of the predicted class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from kernels import mask_windows, paste_mask_crops, paste_masks
from kernels.boxes import clip, decode

from ..config import ModelConfig
from ..data.rle import crop_runs, runs_to_rle
from .roi_heads import BOX_WEIGHTS

MIN_SIZE = 1e-2  # pixels; smaller detections are dropped

PIXELS_AT_ONCE = 1 << 24
"""Of masks on their way to run lengths, or one column: memory does not grow with the image or with their number."""


@dataclass
class Detections:
    """What was found in one image, best first."""

    boxes: Tensor  # [n, 4] xyxy in pixels of the resized image
    labels: Tensor  # [n] int64, 1..K-1
    scores: Tensor  # [n]
    masks: Tensor  # [n, M, M] probabilities inside the box

    def on_original(
        self, size: tuple[int, int], original_size: tuple[int, int], threshold: float = 0.5, rle: bool = False
    ) -> dict[str, Any]:
        """Boxes scaled from an image of `size` (height, width) to `original_size`, masks pasted there.

        Returns:
            boxes [n, 4], labels [n], scores [n], and masks: bool [n, H, W], or with `rle` a list of n COCO RLE
            dictionaries, for which no mask is pasted beyond its box, and few of them at a time.
        """
        ratio = [o / s for o, s in zip(original_size, size, strict=True)]
        boxes = self.boxes * self.boxes.new_tensor([ratio[1], ratio[0], ratio[1], ratio[0]])
        paste = _paste_as_rle if rle else paste_masks
        masks = paste(self.masks, boxes, original_size, threshold)
        return {"boxes": boxes, "labels": self.labels, "scores": self.scores, "masks": masks}


def _paste_as_rle(masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float) -> list[dict]:
    """Probabilities [n, M, M] in their boxes [n, 4] -> n COCO RLE dictionaries of an image of `size`."""
    owners, strips = _strips(mask_windows(masks, boxes, size).cpu(), PIXELS_AT_ONCE)
    runs: list[list[np.ndarray]] = [[] for _ in masks]
    for owner, windows in _chunks(owners, strips, PIXELS_AT_ONCE):
        index = owner.to(masks.device, non_blocking=True)
        pixels = paste_mask_crops(masks[index], boxes[index], size, threshold, windows=windows).pixels
        found = crop_runs(pixels.cpu().numpy(), windows.numpy(), size[0])
        for i, run in zip(owner.tolist(), found, strict=True):
            runs[i].append(run)
    return [runs_to_rle(run, size) for run in runs]


def _strips(windows: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Windows [n, 4] (x, y, width, height) cut from left to right into strips of at most so many pixels, or a column.

    Returns:
        owners [k], the window that each strip is of, in order, and the strips [k, 4]; none of empty windows.
    """
    rows = [
        (i, first, y, min(step, x + width - first), height)
        for i, (x, y, width, height) in enumerate(windows.tolist())
        for step in [max(most // max(height, 1), 1)]
        for first in range(x, x + width, step)
    ]
    table = torch.tensor(rows, dtype=torch.int64).view(-1, 5)
    return table[:, 0], table[:, 1:]


def _chunks(owners: Tensor, strips: Tensor, most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Consecutive strips, together at most so many pixels, or a single one."""
    begin = held = 0
    for i, pixels in enumerate((strips[:, 2] * strips[:, 3]).tolist()):
        if i > begin and held + pixels > most:
            yield owners[begin:i], strips[begin:i]
            begin, held = i, 0
        held += pixels
    if len(strips):
        yield owners[begin:], strips[begin:]


class BoxSelection(nn.Module):
    """Softmax, decoding, score threshold, NMS within each class, the best of an image: torchvision's RoIHeads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, logits: Tensor, deltas: Tensor, proposals: Tensor, valid: Tensor, sizes: Tensor
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(boxes [n, 4], labels [n], scores [n]) of each image, best first.

        Args:
            logits, deltas: [B, N, K] and [B, N, K, 4] from the box head.
            proposals, valid: [B, N, 4] and [B, N].
            sizes: [B, 2] heights and widths of the images.
        """
        config = self.config
        scores = torch.where(valid[..., None], logits.softmax(-1), 0.0)
        boxes = clip(decode(deltas, proposals[:, :, None], BOX_WEIGHTS), sizes)
        big_enough = (boxes[..., 2:] - boxes[..., :2] >= MIN_SIZE).all(-1)
        candidate = (scores > config.score_threshold) & big_enough
        candidate[..., 0] = False  # background
        results = []
        for image_boxes, image_scores, image_candidate in zip(boxes, scores, candidate, strict=True):
            row, label = image_candidate.nonzero(as_tuple=True)
            found, score = image_boxes[row, label], image_scores[row, label]
            keep = batched_nms(found, score, label, config.detection_nms_threshold)[: config.max_detections]
            results.append((found[keep], label[keep], score[keep]))
        return results
