"""The mask head's loss, and the probabilities that belong to it, in three forms.

`bce` (the paper's): the ground-truth class's channel alone is a binary classifier of each pixel; the other channels
take no part. Which class it is was decided by the box head.

`softmax`: the channels compete for each pixel, but only the ground-truth class's channel is supervised, by the object's
mask: categorical cross-entropy with a target that is one-hot where the mask is 1 and zero elsewhere. Pixels outside
the mask teach nothing. With one class it is identically 0.

`canvas`: what softmax needs to make sense. All objects of the image that reach into the RoI are projected onto one
canvas, overlaps resolved (the object with the smaller extent lies on top), so that each pixel has one class, background
included, and cross-entropy has a target everywhere. Objects of one class that touch become one region.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import mask_bce_loss

from ..config import ModelConfig
from ..structures import Targets
from .mask_targets import canvas_targets, mask_targets
from .roi_heads import RoISample


class MaskLoss(nn.Module):
    """The configured form, averaged over pixels and over positive RoIs."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, logits: Tensor, rois: RoISample, targets: Targets, sizes: Tensor, padded_size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Logits [B * S, K, M, M] of RoIs whose label is a class or -1 -> loss_mask, a scalar.

        Args:
            logits: from the mask head.
            rois: S an image.
            targets: ground truth.
            sizes: [B, 2] height and width of each image inside its padding.
            padded_size: (H, W) of the padded images.
        """
        config, labels, side = self.config, rois.labels.flatten(), logits.shape[-1]
        if config.mask_loss == "canvas":
            loss = canvas_loss(logits, labels, canvas_targets(targets, rois.boxes, side, padded_size).flatten(0, 1))
        else:
            aligned = config.mask_target == "binary"
            wanted = mask_targets(targets, rois.boxes, rois.matched, side, sizes, padded_size, aligned).flatten(0, 1)
            wanted = (wanted >= 0.5).to(wanted.dtype) if aligned else wanted
            loss = (mask_bce_loss if config.mask_loss == "bce" else class_channel_loss)(logits, labels, wanted)
        return {"loss_mask": loss * config.mask_weight}


def class_channel_loss(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Categorical cross-entropy over the classes' channels, supervised by the label's channel alone.

    Args:
        logits: [N, K, M, M]; channel 0, the background's, stays out.
        labels: [N] int64 in 1..K-1, or negative for an empty slot.
        targets: [N, M, M] in [0, 1].

    Returns:
        Scalar, fp32: mean over pixels of -target * log softmax(logits)[label], mean over RoIs.
    """
    occupied = labels > 0
    classes = torch.where(occupied[:, None, None, None], logits[:, 1:], 0).float()
    rows = torch.arange(len(labels), device=labels.device)
    own = classes.log_softmax(dim=1)[rows, (labels - 1).clamp(min=0)]
    loss = -(targets * own).mean(dim=(1, 2))
    return (loss * occupied).sum() / occupied.sum().clamp(min=1)


def canvas_loss(logits: Tensor, labels: Tensor, canvas: Tensor) -> Tensor:
    """Cross-entropy of every pixel's class: logits [N, K, M, M], labels [N] (< 0 empty), canvas int64 [N, M, M]."""
    occupied = labels > 0
    logits = torch.where(occupied[:, None, None, None], logits, 0).float()
    loss = F.cross_entropy(logits, canvas, reduction="none").mean(dim=(1, 2))
    return (loss * occupied).sum() / occupied.sum().clamp(min=1)


def mask_probabilities(logits: Tensor, labels: Tensor, mask_loss: str) -> Tensor:
    """Logits [N, K, M, M] and labels [N] in 1..K-1 -> the probability of that class at each pixel, [N, M, M] fp32."""
    logits = logits.float()
    own = logits[torch.arange(len(labels), device=labels.device), labels]
    if mask_loss == "bce":
        return own.sigmoid()
    rivals = logits if mask_loss == "canvas" else logits[:, 1:]
    return torch.exp(own - rivals.logsumexp(dim=1))
