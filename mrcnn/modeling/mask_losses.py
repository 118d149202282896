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

from kernels import mask_predictor_loss, mask_targets

from ..config import ModelConfig
from ..structures import Targets
from .canvas import canvas_targets
from .heads import MaskHead
from .roi_heads import RoISample

STYLES = {"soft": "torchvision", "binary": "detectron2"}  # of mask_target


class MaskLoss(nn.Module):
    """The configured form, averaged over pixels and over positive RoIs.

    `backend`, of `kernels.BACKENDS`, is that of `bce`: "torchvision" is the ordinary path through K channels.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backend = "auto"

    def forward(self, features: Tensor, head: MaskHead, rois: RoISample, targets: Targets) -> dict[str, Tensor]:
        """Features [B * S, C, M, M] of RoIs whose label is a class or -1 -> loss_mask, a scalar.

        Args:
            features: from the mask head.
            head: the mask head, for the layer that makes logits of them.
            rois: S an image.
            targets: ground truth.
        """
        config, labels, side = self.config, rois.labels.flatten(), features.shape[-1]
        if config.mask_loss == "canvas":
            canvas = canvas_targets(targets, rois.boxes, side).flatten(0, 1)
            return {"loss_mask": canvas_loss(head.all_logits(features), labels, canvas) * config.mask_weight}
        wanted = mask_targets(targets.masks, rois.boxes, rois.matched, side, STYLES[config.mask_target]).flatten(0, 1)
        if config.mask_loss == "softmax":
            loss = class_channel_loss(head.all_logits(features), labels, wanted)
        else:
            weight, bias = head.logits.weight, head.logits.bias
            loss = mask_predictor_loss(features, weight, bias, labels, wanted, relu=True, backend=self.backend)
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


def mask_probabilities(head: MaskHead, features: Tensor, labels: Tensor, mask_loss: str) -> Tensor:
    """Features [N, C, M, M] and labels [N] in 1..K-1 -> probability of that class at each pixel, [N, M, M] fp32."""
    if mask_loss == "bce":
        return head.class_logits(features, labels).float().sigmoid()
    logits = head.all_logits(features).float()
    own = logits[torch.arange(len(labels), device=labels.device), labels]
    rivals = logits if mask_loss == "canvas" else logits[:, 1:]
    return torch.exp(own - rivals.logsumexp(dim=1))
