"""From proposals to the second stage's losses: match, sample, pool, classify, segment. Fixed shapes throughout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import box_iou, mask_bce_loss, multiscale_roi_align

from ..config import ModelConfig
from ..structures import Targets
from .boxes import encode, take
from .mask_targets import mask_targets
from .sampling import sample

BOX_WEIGHTS = (10.0, 5.0)  # of the deltas (dx, dy) and (dw, dh)
STRIDES = (4, 8, 16, 32)  # P2..P5, the levels that RoIs are pooled from


@dataclass
class RoISample:
    """S RoIs of each image, positives first."""

    boxes: Tensor  # [B, S, 4] xyxy
    labels: Tensor  # [B, S] int64: class, 0 background, -1 empty slot
    matched: Tensor  # [B, S] int64: the object a positive RoI belongs to


@torch.no_grad()
def sample_rois(proposals: Tensor, valid: Tensor, targets: Targets, config: ModelConfig) -> RoISample:
    """Match proposals [B, N, 4] (and the objects themselves) to the objects, and draw a sample of them."""
    boxes = torch.cat([proposals, targets.boxes], dim=1)
    valid = torch.cat([valid, targets.valid], dim=1)
    iou = torch.where(targets.valid[:, :, None], box_iou(targets.boxes, boxes), -1.0)  # [B, G, N + G]
    best, matched = iou.max(dim=1)
    labels = torch.where(best >= config.roi_threshold, targets.labels.gather(1, matched), 0)
    index, drawn, _ = sample(torch.where(valid, labels, -1), config.roi_samples, config.roi_positive_fraction)
    return RoISample(take(boxes, index), torch.where(drawn, labels.gather(1, index), -1), matched.gather(1, index))


def pool(features: Sequence[Tensor], boxes: Tensor, size: int, config: ModelConfig) -> Tensor:
    """RoIAlign of boxes [B, S, 4] on P2..P5: [B * S, C, size, size]."""
    image = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)[:, None, None]
    rois = torch.cat([image.expand(-1, boxes.shape[1], 1), boxes], dim=-1).flatten(0, 1)
    return pool_rois(features, rois, size, config)


def pool_rois(features: Sequence[Tensor], rois: Tensor, size: int, config: ModelConfig) -> Tensor:
    """RoIAlign of rois [K, 5] (image, x1, y1, x2, y2) on P2..P5: [K, C, size, size]."""
    scales = [1.0 / s for s in STRIDES]
    return multiscale_roi_align(features[:4], rois, size, scales, 2, canonical_scale=config.canonical_scale)


def box_loss(logits: Tensor, deltas: Tensor, rois: RoISample, targets: Targets) -> dict[str, Tensor]:
    """Cross-entropy of the classes [B * S, K], smooth L1 of the labelled class's deltas [B * S, K, 4]."""
    labels = rois.labels.flatten()
    drawn, positive = labels >= 0, labels > 0
    number = drawn.sum().clamp(min=1)
    labels = labels.clamp(min=0)
    # Replaced before the losses: NaN in an empty slot times a zero gradient is still NaN.
    logits, deltas = torch.where(drawn[:, None], logits, 0), torch.where(drawn[:, None, None], deltas, 0)
    entropy = F.cross_entropy(logits, labels, reduction="none")
    wanted = encode(take(targets.boxes, rois.matched), rois.boxes, BOX_WEIGHTS).flatten(0, 1)
    own = deltas[torch.arange(len(labels), device=labels.device), labels]
    error = F.smooth_l1_loss(own, wanted, beta=1 / 9, reduction="none").sum(-1)
    return {
        "loss_class": (entropy * drawn).sum() / number,
        "loss_box": (error * positive).sum() / number,
    }


def positives(rois: RoISample, config: ModelConfig) -> RoISample:
    """The slots that positives can occupy, with label -1 where there is none: these get masks."""
    slots = min(int(config.roi_samples * config.roi_positive_fraction), rois.boxes.shape[1])
    labels = rois.labels[:, :slots]
    return RoISample(rois.boxes[:, :slots], torch.where(labels > 0, labels, -1), rois.matched[:, :slots])


def mask_loss(
    logits: Tensor, rois: RoISample, targets: Targets, sizes: Tensor, padded_size: tuple[int, int]
) -> dict[str, Tensor]:
    """Binary cross-entropy of the labelled class's mask: logits [B * S, K, M, M]."""
    wanted = mask_targets(targets, rois.boxes, rois.matched, logits.shape[-1], sizes, padded_size)
    return {"loss_mask": mask_bce_loss(logits, rois.labels.flatten(), wanted.flatten(0, 1))}
