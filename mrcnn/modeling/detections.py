"""From proposals to detections: decode, threshold, NMS by class, the best of an image. Fixed shapes throughout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernels import mask_windows, nms_mask, paste_masks, stable_topk
from kernels.boxes import clip, decode, take

from ..config import ModelConfig
from .mask_runs import paste_as_rle
from .roi_heads import BOX_WEIGHTS

MIN_SIZE = 1e-2  # pixels; smaller detections are dropped

CANDIDATES = 4096
"""So many boxes of an image, the best of all proposals and classes, go into NMS; max_detections, if that is more.

Greedy NMS decides about a box by better ones alone: its survivors among the best boxes are the first of all survivors.
So the result is that of all boxes wherever max_detections of the best survive, or no more than 4096 are above the score
threshold; else there are fewer detections. A GPU can afford them: 2 MiB an image of bits that say who suppresses whom,
and by the figures of kernels/nms/NOTES.md (predictions) 0.16 ms for 16 images on an H200 where all boxes are above the
threshold, 0.05 ms where hardly any are. Up to 4096 values torch.topk sorts in place, in one launch.
"""


@dataclass
class ImageDetections:
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
        boxes = self.boxes * self.boxes.new_tensor(_ratios(size, original_size))
        if rle:
            windows = mask_windows(self.masks, boxes, original_size).cpu()
            masks = paste_as_rle(self.masks, boxes, original_size, threshold, windows)
        else:
            masks = paste_masks(self.masks, boxes, original_size, threshold)
        return {"boxes": boxes, "labels": self.labels, "scores": self.scores, "masks": masks}


@dataclass
class Detections:
    """What was found in each of B images: D slots, best first, of which `count` are meant. The others hold zeros."""

    boxes: Tensor  # [B, D, 4] xyxy in pixels of the resized images
    labels: Tensor  # [B, D] int64, 1..K-1; 0 in empty slots
    scores: Tensor  # [B, D]
    masks: Tensor  # [B, D, M, M] probabilities inside the box
    count: Tensor  # [B] int32

    def by_image(self) -> list[ImageDetections]:
        """Each image's, without empty slots; waits for the device, once."""
        fields = self.boxes, self.labels, self.scores, self.masks
        return [ImageDetections(*(field[i, :n] for field in fields)) for i, n in enumerate(self.count.tolist())]

    def on_originals(
        self,
        sizes: Sequence[tuple[int, int]],
        original_sizes: Sequence[tuple[int, int]],
        threshold: float = 0.5,
        rle: bool = False,
    ) -> Iterator[dict[str, Any]]:
        """`ImageDetections.on_original` of one image after the other, on the CPU.

        All but the masks' pixels is copied there at once, and the host waits for the device that one time, and for the
        pixels of each image.
        """
        ratios = torch.tensor([_ratios(*pair) for pair in zip(sizes, original_sizes, strict=True)])
        boxes = self.boxes * ratios.to(self.boxes.device, non_blocking=True)[:, None]
        table = torch.cat([boxes, self.scores[..., None], self.labels[..., None].float()], dim=2).cpu()
        for i, (rows, size) in enumerate(zip(table, original_sizes, strict=True)):
            labels = rows[:, 5].long()  # which fp32 holds up to 16,777,216
            n = int((labels > 0).sum())
            own, masks = rows[:n, :4], self.masks[i, :n]
            if rle:  # the windows are found on the CPU, where they are wanted, by the same arithmetic
                windows = mask_windows(own.new_empty(masks.shape), own, size)
                found = paste_as_rle(masks, boxes[i, :n], size, threshold, windows)
            else:
                found = paste_masks(masks, boxes[i, :n], size, threshold).cpu()
            yield {"boxes": own, "labels": labels[:n], "scores": rows[:n, 4], "masks": found}


torch.export.register_dataclass(Detections, serialized_type_name="mrcnn.Detections")  # as a program's output


def _ratios(size: tuple[int, int], original_size: tuple[int, int]) -> list[float]:
    """What x, y, x and y of a box are multiplied by."""
    y, x = (original / resized for original, resized in zip(original_size, size, strict=True))
    return [x, y, x, y]


class BoxSelection(nn.Module):
    """Softmax, decoding, score threshold, NMS within each class, the best of an image: torchvision's RoIHeads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    @torch.no_grad()
    def forward(
        self, logits: Tensor, deltas: Tensor, proposals: Tensor, valid: Tensor, sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The best boxes of each image; of equal scores the first proposal's comes first, then the first class's.

        Args:
            logits, deltas: [B, N, K] and [B, N, K, 4] from the box head.
            proposals, valid: [B, N, 4] and [B, N].
            sizes: [B, 2] heights and widths of the images.

        Returns:
            boxes [B, D, 4], labels [B, D], scores [B, D] and count int32 [B], with D = max_detections, or N * (K - 1)
            where that is less. Slots beyond the count hold zeros.
        """
        config, classes = self.config, logits.shape[2] - 1  # without the background
        scores = logits.float().softmax(-1)[..., 1:]
        scores = torch.where(valid[..., None] & (scores > config.score_threshold), scores, -1.0).flatten(1)
        best = stable_topk(scores, max(CANDIDATES, config.max_detections))
        scores, row, label = scores.gather(1, best), best // classes, best % classes + 1
        own = take(deltas.flatten(1, 2), row * (classes + 1) + label)  # of the chosen pairs alone
        boxes = clip(decode(own, take(proposals, row), BOX_WEIGHTS), sizes)
        found = (scores >= 0) & (boxes[..., 2:] - boxes[..., :2] >= MIN_SIZE).all(-1)
        keep = nms_mask(boxes, found, config.detection_nms_threshold, groups=label)
        scores = torch.where(keep, scores, -1.0)
        best = stable_topk(scores, config.max_detections)
        scores = scores.gather(1, best)
        full = scores >= 0
        return (
            torch.where(full[..., None], take(boxes, best), 0.0),
            torch.where(full, label.gather(1, best), 0),
            torch.where(full, scores, 0.0),
            full.sum(dim=1, dtype=torch.int32),
        )
