"""Mask R-CNN (arXiv:1703.06870) with a ResNet-FPN backbone, batched from the images to the losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..structures import Targets
from .anchors import Anchors
from .backbone import ResNet
from .detections import BoxSelection, Detections
from .fpn import FPN
from .heads import BoxHead, MaskHead
from .mask_losses import MaskLoss, mask_probabilities
from .roi_heads import BoxLoss, RoIPool, RoISampler
from .rpn import Proposals, RPNHead, RPNLoss

BUILT_BY = {
    *("num_classes", "backbone", "weights", "norm", "frozen_stages", "fpn_channels", "fpn_norm"),
    *("anchor_sizes", "anchor_scales", "aspect_ratios", "round_anchors", "rpn_layers", "objectness"),
    *("box_pool_size", "box_conv_layers", "box_fc_layers", "box_channels"),
    *("mask_pool_size", "mask_layers", "mask_channels", "head_norm"),
}
"""Keys of the configuration that only construction reads."""

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


class MaskRCNN(nn.Module):
    """images -> backbone -> fpn -> rpn -> proposals -> sample -> pool -> box and mask head -> losses or detections.

    Every stage is a module, those without weights too, so that PyTorch's forward hooks see what enters and leaves it.
    No weights are downloaded here: see `backbone.load_pretrained`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.normalize = Normalize()
        self.backbone = ResNet(config.backbone, config.norm, config.frozen_stages)
        levels = len(config.anchor_sizes)
        self.fpn = FPN(self.backbone.out_channels, config.fpn_channels, config.fpn_norm, levels)
        self.anchors = Anchors(config)
        self.rpn = RPNHead(config, self.anchors.per_cell)
        self.rpn_loss = RPNLoss(config)
        self.proposals = Proposals(config)
        self.roi_sampler = RoISampler(config)
        self.pooler = RoIPool(config)
        self.box_head = BoxHead(config)
        self.box_loss = BoxLoss(config)
        self.mask_head = MaskHead(config)
        self.mask_loss = MaskLoss(config)
        self.box_selection = BoxSelection(config)

    def configure(self, **changes: Any) -> None:
        """Change values of the configuration in all stages: thresholds, numbers, weights of losses.

        Raises:
            ValueError: a value that the model was built by.
        """
        if fixed := sorted(changes.keys() & BUILT_BY):
            raise ValueError(f"{', '.join(fixed)} cannot change once the model is built: build another MaskRCNN")
        config = dataclasses.replace(self.config, **changes)
        for module in self.modules():
            if isinstance(getattr(module, "config", None), ModelConfig):
                module.config = config

    def forward(self, images: Tensor, sizes: Tensor, targets: Targets | None = None) -> dict[str, Tensor] | Detections:
        """Losses by name where there are targets, else the detections of all images, in fixed shapes.

        Args:
            images: [B, 3, H, W], uint8 RGB or floats already normalised; H and W divisible by 32.
            sizes: [B, 2] int64, height and width of each image inside its padding.
            targets: ground truth.
        """
        if images.dtype == torch.uint8:
            images = self.normalize(images, sizes)
        features = self.fpn(self.backbone(images))  # P2..P5 or P6
        logits, deltas = self.rpn(features)
        anchors = self.anchors(features, tuple(images.shape[-2:]))
        proposals, valid = self.proposals(logits, deltas, anchors, sizes, training=targets is not None)
        if targets is None:
            return self.detect(features, proposals, valid, sizes)

        losses = self.rpn_loss(logits, deltas, anchors, targets)
        rois = self.roi_sampler(proposals, valid, targets)
        positives = rois.positives(int(self.config.roi_samples * self.config.roi_positive_fraction))
        sizes_pooled = [self.config.box_pool_size, self.config.mask_pool_size]
        pooled, pooled_positives = self.pooler(features, [rois.boxes, positives.boxes], sizes_pooled)
        losses |= self.box_loss(*self.box_head(pooled), rois, targets)
        return losses | self.mask_loss(self.mask_head(pooled_positives), self.mask_head, positives, targets)

    def detect(self, features: Sequence[Tensor], proposals: Tensor, valid: Tensor, sizes: Tensor) -> Detections:
        """Detections from the images' proposals [B, N, 4]. Empty slots go through the mask branch too: fixed shapes."""
        (pooled,) = self.pooler(features, [proposals], [self.config.box_pool_size])
        logits, deltas = self.box_head(pooled)
        shape = proposals.shape[:2]
        selected = self.box_selection(logits.unflatten(0, shape), deltas.unflatten(0, shape), proposals, valid, sizes)
        boxes, labels, scores, count = selected
        (pooled,) = self.pooler(features, [boxes], [self.config.mask_pool_size])
        masks = mask_probabilities(self.mask_head, self.mask_head(pooled), labels.flatten(), self.config.mask_loss)
        masks = torch.where(labels[..., None, None] > 0, masks.unflatten(0, labels.shape), 0.0)
        return Detections(boxes, labels, scores, masks, count)


class Normalize(nn.Module):
    """uint8 RGB -> floats with ImageNet's mean and deviation."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor, sizes: Tensor) -> Tensor:
        """[B, 3, H, W] -> the same shape; the padding beyond sizes [B, 2] becomes zero, as in torchvision."""
        y = torch.arange(images.shape[2], device=images.device)[:, None] < sizes[:, 0, None, None, None]
        x = torch.arange(images.shape[3], device=images.device) < sizes[:, 1, None, None, None]
        return torch.where(y & x, (images / 255 - self.mean) / self.std, 0.0)
