"""From proposals to detections: decode, threshold, NMS by class, masks of the predicted class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import batched_nms

from kernels.boxes import clip, decode

from ..config import ModelConfig
from ..data.rle import masks_to_rle
from .mask_losses import mask_probabilities
from .roi_heads import BOX_WEIGHTS

MIN_SIZE = 1e-2  # pixels; smaller detections are dropped


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
            dictionaries, for which one full-size mask exists at a time.
        """
        ratio = [o / s for o, s in zip(original_size, size, strict=True)]
        boxes = self.boxes * self.boxes.new_tensor([ratio[1], ratio[0], ratio[1], ratio[0]])
        if rle:
            masks: Any = []
            for mask, box in zip(self.masks.split(1), boxes.split(1), strict=True):
                masks += masks_to_rle(_paste(mask, box, original_size) > threshold)
        else:
            masks = _paste(self.masks, boxes, original_size) > threshold
        return {"boxes": boxes, "labels": self.labels, "scores": self.scores, "masks": masks}


def _paste(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Probabilities [n, M, M] in their boxes [n, 4] -> [n, H, W]."""
    return paste_masks_in_image(masks[:, None], boxes, size)[:, 0]


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


def split_masks(
    mask_logits: Tensor, selected: Sequence[tuple[Tensor, Tensor, Tensor]], mask_loss: str
) -> list[Detections]:
    """Detections with the mask of their own class, from logits [sum of n, K, M, M] in the order of `selected`."""
    probabilities = mask_probabilities(mask_logits, torch.cat([s[1] for s in selected]), mask_loss)
    masks = probabilities.split([len(s[1]) for s in selected])
    return [Detections(*s, m) for s, m in zip(selected, masks, strict=True)]
