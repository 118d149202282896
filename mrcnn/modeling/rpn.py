"""Region proposal network (arXiv:1506.01497): head, loss, and proposals with fixed shapes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from kernels import AnchorGrid, decode_proposals, label_grid_anchors, nms_mask, rpn_loss, stable_topk
from kernels.boxes import take

from ..config import ModelConfig
from ..structures import Targets
from .joined import Joined
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
        self.joined = Joined()
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """P2..P5 or P6 -> logits [B, A] and deltas [B, A, 4] in the order of `Anchors`, as the convolutions give them.

        Where an anchor has two logits (background, object), the one returned is their difference, of half types in
        fp32: its sigmoid is their softmax, and binary cross-entropy on it is cross-entropy on the two.
        """
        levels = [self.joined(self.convs(f), self.objectness, self.deltas) for f in features]
        logits = torch.cat([_by_anchor(logits, self.logits_per_anchor) for logits, _ in levels], dim=1)
        deltas = torch.cat([_by_anchor(deltas, 4) for _, deltas in levels], dim=1)
        if self.logits_per_anchor == 1:
            return logits[..., 0], deltas
        wide = torch.promote_types(logits.dtype, torch.float32)
        logits, deltas = logits.to(wide), deltas.to(wide)
        return logits[..., 1] - logits[..., 0], deltas


def _by_anchor(x: Tensor, values: int) -> Tensor:
    """[B, a * values, H, W] -> [B, H * W * a, values]."""
    batch = len(x)
    return x.unflatten(1, (-1, values)).permute(0, 3, 4, 1, 2).reshape(batch, -1, values)


class RPNLoss(nn.Module):
    """Anchors labelled, a sample of them drawn, their objectness and the deltas of the positive ones compared."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, logits: Tensor, deltas: Tensor, anchors: AnchorGrid, targets: Targets) -> dict[str, Tensor]:
        """loss_objectness = weight / N_cls * sum of BCE, loss_rpn_box = lambda / N_reg * sum of smooth L1.

        Args:
            logits, deltas: [B, A] and [B, A, 4] from the head.
            anchors: the A anchors.
            targets: ground truth.
        """
        config = self.config
        labels, matched = label_grid_anchors(
            anchors,
            targets.boxes,
            targets.count,
            config.rpn_high_threshold,
            config.rpn_low_threshold,
            low_inclusive=config.rpn_low_inclusive,
            require_overlap=config.rpn_require_overlap,
        )
        index, drawn, positive = self.sample(labels, logits)
        objectness, box = rpn_loss(
            logits, deltas, anchors, targets.boxes, matched, index, drawn, positive, config.rpn_box_beta
        )
        cells = sum(height * width for height, width in anchors.extents)
        n_cls = self.number(config.rpn_class_normalizer, drawn, positive, cells)
        n_reg = self.number(config.rpn_box_normalizer, drawn, positive, cells)
        return {
            "loss_objectness": objectness * (config.objectness_weight / n_cls),
            "loss_rpn_box": box * (config.rpn_box_weight / n_reg),
        }

    def number(self, normalizer: str, drawn: Tensor, positive: Tensor, cells: int) -> Tensor | int:
        """What a loss is divided by, from drawn and positive [B, S]; a count on the device stays there.

        `cells` are the positions of all levels in an image, sum of H_l * W_l.
        """
        if normalizer == "slots":  # what was asked for, also where an image has fewer anchors than that
            return len(drawn) * self.config.rpn_samples
        if normalizer == "cells":
            return len(drawn) * cells
        return (drawn if normalizer == "sampled" else positive).sum().clamp(min=1)

    @torch.no_grad()
    def sample(self, labels: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The configured draw from labels [B, A]; the loss of a negative with logit z is log(1 + exp(z))."""
        config = self.config
        hardness = F.softplus(logits.float()).nan_to_num() if config.rpn_sampling == "hard" else None
        return sample(labels, config.rpn_samples, config.rpn_positive_fraction, hardness, config.rpn_negative_ratio)


class Proposals(nn.Module):
    """The best boxes of each image after NMS within each level."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    @torch.no_grad()
    def forward(
        self, logits: Tensor, deltas: Tensor, anchors: AnchorGrid, sizes: Tensor, training: bool
    ) -> tuple[Tensor, Tensor]:
        """Keep the best of each level, decode, clip, suppress, keep the best of each image.

        Equal scores keep their order, so that two runs and two devices agree: of bf16 scores many are equal.

        Args:
            logits, deltas: [B, A] and [B, A, 4] from the head.
            anchors: the A anchors.
            sizes: [B, 2] heights and widths of the images.
            training: which of the configured numbers to take.

        Returns:
            boxes [B, N, 4], best first, and valid bool [B, N], with N = post_nms_top_n, or fewer where there are not
            as many candidates.
        """
        mode = 0 if training else 1
        if logits.dtype == torch.float64:  # boxes are fp32; half types are widened where they are read
            logits, deltas = logits.float(), deltas.float()
        index = best_of_levels(logits, anchors.level_sizes, self.config.pre_nms_top_n[mode])  # [B, L, n]
        boxes, scores = decode_proposals(logits, deltas, index.flatten(1), anchors, sizes, MIN_SIZE)
        of_level = boxes.view(-1, index.shape[2], 4), (scores >= 0).view(-1, index.shape[2])
        keep = nms_mask(*of_level, self.config.rpn_nms_threshold).view_as(scores)
        scores = torch.where(keep, scores, -1.0)
        best = stable_topk(scores, self.config.post_nms_top_n[mode])
        return take(boxes, best), scores.gather(1, best) >= 0


def best_of_levels(logits: Tensor, level_sizes: Sequence[int], top_n: int) -> Tensor:
    """Index [B, L, n] of the `top_n` best anchors of each level, best first, -1 in slots left over."""
    levels = []
    offset, width = 0, min(top_n, max(level_sizes))
    for count in level_sizes:
        index = stable_topk(logits[:, offset : offset + count], top_n) + offset
        levels.append(F.pad(index, (0, width - index.shape[1]), value=-1))
        offset += count
    return torch.stack(levels, dim=1)
