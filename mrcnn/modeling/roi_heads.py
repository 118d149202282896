"""From proposals to the box head's loss: match, sample, pool, compare. Fixed shapes throughout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import joint_multiscale_roi_align, label_anchors
from kernels.boxes import encode, take

from ..config import ModelConfig
from ..structures import Targets
from .sampling import sample

BOX_WEIGHTS = (10.0, 5.0)  # of the deltas (dx, dy) and (dw, dh)
STRIDES = (4, 8, 16, 32)  # P2..P5, the levels that RoIs are pooled from


@dataclass
class RoISample:
    """S RoIs of each image, positives first."""

    boxes: Tensor  # [B, S, 4] xyxy
    labels: Tensor  # [B, S] int64: class, 0 background, -1 empty slot
    matched: Tensor  # [B, S] int64: the object a positive RoI belongs to

    def positives(self, slots: int) -> RoISample:
        """The first `slots`, with label -1 where the RoI is not positive: these get masks."""
        labels = self.labels[:, :slots]
        labels = torch.where(labels > 0, labels, -1)
        return RoISample(self.boxes[:, :slots], labels, self.matched[:, :slots]).repeated()

    def repeated(self) -> RoISample:
        """Boxes and matches of empty slots replaced by those of the image's other RoIs, in turn; labels stay -1.

        They take no part in a loss, but batch norm in a head takes its statistics over all rows.
        """
        number = (self.labels >= 0).sum(dim=1, keepdim=True).clamp(min=1)
        index = torch.arange(self.labels.shape[1], device=self.labels.device) % number
        return RoISample(take(self.boxes, index), self.labels, self.matched.gather(1, index))


class RoISampler(nn.Module):
    """Proposals, and the objects themselves, matched to the objects, and a sample of them drawn."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    @torch.no_grad()
    def forward(self, proposals: Tensor, valid: Tensor, targets: Targets) -> RoISample:
        """Proposals [B, N, 4] and valid [B, N] -> roi_samples RoIs an image, or N + G where there are fewer.

        Matching is torchvision's, where an IoU of 0/0, of two boxes without area, is positive.
        """
        config = self.config
        boxes = torch.cat([proposals, targets.boxes], dim=1)
        valid = torch.cat([valid, targets.valid], dim=1)
        threshold = config.roi_threshold
        found, matched = label_anchors(
            boxes, targets.boxes, targets.count, threshold, threshold, allow_low_quality_matches=False
        )
        matched = matched.long()
        labels = torch.where(found == 1, targets.labels.gather(1, matched), 0)
        index, drawn, _ = sample(torch.where(valid, labels, -1), config.roi_samples, config.roi_positive_fraction)
        labels = torch.where(drawn, labels.gather(1, index), -1)
        return RoISample(take(boxes, index), labels, matched.gather(1, index)).repeated()


class RoIPool(nn.Module):
    """RoIAlign of each box on the level of the pyramid that fits its size, P2..P5."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, features: Sequence[Tensor], boxes: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """P2..P6 and sets of boxes -> [N, C, size, size] for each set.

        A set is [B, S, 4], of which N = B * S, or rows [N, 5] of (image, x1, y1, x2, y2). Sets that are known together
        are pooled in one call: their gradient is then written once.
        """
        config = self.config
        return joint_multiscale_roi_align(
            features[: len(STRIDES)],
            [_rows(b) for b in boxes],
            sizes,
            [1.0 / s for s in STRIDES],
            config.sampling_ratio,
            config.roi_aligned,
            config.canonical_scale,
        )


def _rows(boxes: Tensor) -> Tensor:
    """[B, S, 4] or [N, 5] -> [N, 5]."""
    if boxes.ndim == 2:
        return boxes
    image = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)[:, None, None]
    return torch.cat([image.expand(-1, boxes.shape[1], 1), boxes], dim=-1).flatten(0, 1)


class BoxLoss(nn.Module):
    """Cross-entropy of the classes, smooth L1 of the labelled class's deltas, both over the number of RoIs drawn."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, logits: Tensor, deltas: Tensor, rois: RoISample, targets: Targets) -> dict[str, Tensor]:
        """Logits [B * S, K] and deltas [B * S, K, 4] -> loss_class and loss_box, scalars."""
        labels = rois.labels.flatten()
        drawn, positive = labels >= 0, labels > 0
        number = drawn.sum().clamp(min=1)
        labels = labels.clamp(min=0)
        # Replaced before the losses: NaN in an empty slot times a zero gradient is still NaN.
        logits, deltas = torch.where(drawn[:, None], logits, 0), torch.where(drawn[:, None, None], deltas, 0)
        entropy = F.cross_entropy(logits, labels, reduction="none")
        wanted = encode(take(targets.boxes, rois.matched), rois.boxes, BOX_WEIGHTS).flatten(0, 1)
        own = deltas[torch.arange(len(labels), device=labels.device), labels]
        error = F.smooth_l1_loss(own, wanted, beta=self.config.box_beta, reduction="none").sum(-1)
        return {
            "loss_class": (entropy * drawn).sum() / number * self.config.class_weight,
            "loss_box": (error * positive).sum() / number * self.config.box_weight,
        }
