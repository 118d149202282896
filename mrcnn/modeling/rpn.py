"""Region proposal network (arXiv:1506.01497): head, loss, and proposals with fixed shapes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from kernels import label_anchors, nms_mask

from ..config import ModelConfig
from ..structures import Targets
from .boxes import clip, decode, encode, take
from .sampling import sample

MIN_SIZE = 1e-3  # pixels; smaller proposals are dropped


class RPNHead(nn.Module):
    """3x3 convolutions shared by the levels, then objectness and deltas of the cell's anchors."""

    def __init__(self, config: ModelConfig, anchors_per_cell: int) -> None:
        super().__init__()
        channels = config.fpn_channels
        self.logits_per_anchor = 2 if config.objectness == "softmax" else 1
        self.convs = nn.Sequential(
            *(Conv2dNormActivation(channels, channels, 3, norm_layer=None) for _ in range(config.rpn_layers))
        )
        self.objectness = nn.Conv2d(channels, anchors_per_cell * self.logits_per_anchor, 1)
        self.deltas = nn.Conv2d(channels, anchors_per_cell * 4, 1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """P2..P5 or P6 -> logits [B, A] and deltas [B, A, 4], fp32, in the order of `Anchors`.

        Where an anchor has two logits (background, object), the one returned is their difference: its sigmoid is their
        softmax, and binary cross-entropy on it is cross-entropy on the two.
        """
        hidden = [self.convs(f) for f in features]
        logits = torch.cat([_by_anchor(self.objectness(h), self.logits_per_anchor) for h in hidden], dim=1).float()
        deltas = torch.cat([_by_anchor(self.deltas(h), 4) for h in hidden], dim=1).float()
        return logits[..., -1] - logits[..., 0] if self.logits_per_anchor == 2 else logits[..., 0], deltas


def _by_anchor(x: Tensor, values: int) -> Tensor:
    """[B, a * values, H, W] -> [B, H * W * a, values]."""
    batch, _, height, width = x.shape
    return x.view(batch, -1, values, height, width).permute(0, 3, 4, 1, 2).reshape(batch, -1, values)


class RPNLoss(nn.Module):
    """Anchors labelled, a sample of them drawn, their objectness and the deltas of the positive ones compared."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, logits: Tensor, deltas: Tensor, anchors: Tensor, targets: Targets, cells: int
    ) -> dict[str, Tensor]:
        """loss_objectness = weight / N_cls * sum of BCE, loss_rpn_box = lambda / N_reg * sum of smooth L1.

        Args:
            logits, deltas: [B, A] and [B, A, 4] from the head.
            anchors: [A, 4].
            targets: ground truth.
            cells: positions of all levels in an image, sum of H_l * W_l.
        """
        config = self.config
        labels, matched = label_anchors(
            anchors,
            targets.boxes,
            targets.count,
            config.rpn_high_threshold,
            config.rpn_low_threshold,
            low_inclusive=config.rpn_low_inclusive,
            require_overlap=config.rpn_require_overlap,
        )
        index, drawn, positive = self.sample(labels, logits)
        # Replaced before the losses: NaN in a slot that does not count times a zero gradient is still NaN.
        logits = torch.where(drawn, logits.gather(1, index), 0)
        deltas = torch.where(positive[..., None], take(deltas, index), 0)
        objectness = F.binary_cross_entropy_with_logits(logits, positive.float(), reduction="none")
        wanted = encode(take(targets.boxes, matched.long().gather(1, index)), anchors[index])
        error = F.smooth_l1_loss(deltas, wanted, beta=config.rpn_box_beta, reduction="none").sum(-1)
        n_cls = self.number(config.rpn_class_normalizer, drawn, positive, cells)
        n_reg = self.number(config.rpn_box_normalizer, drawn, positive, cells)
        return {
            "loss_objectness": (objectness * drawn).sum() * (config.objectness_weight / n_cls),
            "loss_rpn_box": (error * positive).sum() * (config.rpn_box_weight / n_reg),
        }

    def number(self, normalizer: str, drawn: Tensor, positive: Tensor, cells: int) -> Tensor | int:
        """What a loss is divided by, from drawn and positive [B, S]; a count on the device stays there."""
        if normalizer == "slots":  # what was asked for, also where an image has fewer anchors than that
            return len(drawn) * self.config.rpn_samples
        if normalizer == "cells":
            return len(drawn) * cells
        return (drawn if normalizer == "sampled" else positive).sum().clamp(min=1)

    @torch.no_grad()
    def sample(self, labels: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The configured draw from labels [B, A]; the loss of a negative with logit z is log(1 + exp(z))."""
        config = self.config
        hardness = F.softplus(logits).nan_to_num() if config.rpn_sampling == "hard" else None
        return sample(labels, config.rpn_samples, config.rpn_positive_fraction, hardness, config.rpn_negative_ratio)


class Proposals(nn.Module):
    """The best boxes of each image after NMS within each level."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    @torch.no_grad()
    def forward(
        self,
        logits: Tensor,
        deltas: Tensor,
        anchors: Tensor,
        level_sizes: Sequence[int],
        sizes: Tensor,
        training: bool,
    ) -> tuple[Tensor, Tensor]:
        """Decode, clip, keep the best of each level, suppress, keep the best of each image.

        Args:
            logits, deltas: [B, A] and [B, A, 4] from the head.
            anchors: [A, 4].
            level_sizes: number of anchors of each level, summing to A.
            sizes: [B, 2] heights and widths of the images.
            training: which of the configured numbers to take.

        Returns:
            boxes [B, N, 4], best first, and valid bool [B, N], with N = post_nms_top_n, or fewer where there are not
            as many candidates.
        """
        mode = 0 if training else 1
        boxes, scores = self.best_of_levels(logits, deltas, anchors, level_sizes, self.config.pre_nms_top_n[mode])
        boxes = clip(boxes, sizes)
        valid = (scores >= 0) & (boxes[..., 2:] - boxes[..., :2] >= MIN_SIZE).all(-1)
        boxes = torch.where(valid[..., None], boxes, 0.0)  # a diverged model's NaN must not reach an index
        keep = nms_mask(boxes.flatten(0, 1), valid.flatten(0, 1), self.config.rpn_nms_threshold).view_as(valid)

        scores = torch.where(keep, scores, -1.0).flatten(1)
        scores, index = scores.sort(dim=1, descending=True, stable=True)
        index = index[:, : self.config.post_nms_top_n[mode]]
        return take(boxes.flatten(1, 2), index), scores[:, : index.shape[1]] >= 0

    @staticmethod
    def best_of_levels(
        logits: Tensor, deltas: Tensor, anchors: Tensor, level_sizes: Sequence[int], top_n: int
    ) -> tuple[Tensor, Tensor]:
        """Boxes [B, L, n, 4] and scores [B, L, n] (-1 in empty slots) of each level's n best anchors, best first."""
        batch, levels, width = len(logits), len(level_sizes), min(top_n, max(level_sizes))
        scores = logits.new_full((batch, levels, width), -1.0)
        boxes = logits.new_zeros(batch, levels, width, 4)
        offsets = [sum(level_sizes[:i]) for i in range(levels)]
        for level, (offset, count) in enumerate(zip(offsets, level_sizes, strict=True)):
            # A stable sort, not topk: equal scores keep their order, so that two runs and two devices agree.
            order = logits[:, offset : offset + count].sort(dim=1, descending=True, stable=True).indices
            index = order[:, :top_n] + offset
            found = index.shape[1]
            scores[:, level, :found] = logits.gather(1, index).sigmoid()
            boxes[:, level, :found] = decode(take(deltas, index), anchors[index])
        return boxes, scores
