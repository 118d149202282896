"""Mask R-CNN (arXiv:1703.06870) with a ResNet-FPN backbone, batched from the images to the losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ModelConfig
from ..structures import Targets
from .backbone import FPN, ResNet
from .boxes import cell_anchors, grid_anchors
from .detections import Detections, select_boxes, split_masks
from .heads import BoxHead, MaskHead
from .roi_heads import box_loss, mask_loss, pool, pool_rois, positives, sample_rois
from .rpn import RPNHead, propose, rpn_loss

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


class MaskRCNN(nn.Module):
    """images -> backbone -> fpn -> rpn -> proposals -> sample -> box head and mask head -> losses or detections."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = ResNet(config.backbone, config.norm)
        self.fpn = FPN(self.backbone.out_channels, config.fpn_channels)
        self.rpn = RPNHead(config.fpn_channels, len(config.aspect_ratios))
        self.box_head = BoxHead(config.fpn_channels, config.box_pool_size, config.box_channels, config.num_classes)
        self.mask_head = MaskHead(config.fpn_channels, config.mask_channels, config.mask_layers, config.num_classes)
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD).view(3, 1, 1), persistent=False)
        for level, size in enumerate(config.anchor_sizes):
            self.register_buffer(f"cell{level}", cell_anchors(size, config.aspect_ratios), persistent=False)

    def forward(
        self, images: Tensor, sizes: Tensor, targets: Targets | None = None
    ) -> dict[str, Tensor] | list[Detections]:
        """Losses by name where there are targets, else the detections of each image.

        Args:
            images: [B, 3, H, W], uint8 RGB or floats already normalised; H and W divisible by 32.
            sizes: [B, 2] int64, height and width of each image inside its padding.
            targets: ground truth.
        """
        if images.dtype == torch.uint8:
            images = self.normalize(images, sizes)
        features = self.fpn(self.backbone(images))  # P2..P6
        logits, deltas = self.rpn(features)
        anchors, level_sizes = self.anchors(features, images)
        proposals, valid = propose(
            logits, deltas, anchors, level_sizes, sizes, self.config, training=targets is not None
        )
        if targets is None:
            return self.detect(features, proposals, valid, sizes)

        losses = rpn_loss(logits, deltas, anchors, targets, self.config)
        rois = sample_rois(proposals, valid, targets, self.config)
        classes, box_deltas = self.box_head(pool(features, rois.boxes, self.config.box_pool_size, self.config))
        losses |= box_loss(classes, box_deltas, rois, targets)
        rois = positives(rois, self.config)
        mask_logits = self.mask_head(pool(features, rois.boxes, self.config.mask_pool_size, self.config))
        return losses | mask_loss(mask_logits, rois, targets, sizes, tuple(images.shape[-2:]))

    def normalize(self, images: Tensor, sizes: Tensor) -> Tensor:
        """uint8 RGB -> floats with ImageNet's mean and deviation; the padding becomes zero, as in torchvision."""
        y = torch.arange(images.shape[2], device=images.device)[:, None] < sizes[:, 0, None, None, None]
        x = torch.arange(images.shape[3], device=images.device) < sizes[:, 1, None, None, None]
        return torch.where(y & x, (images / 255 - self.mean) / self.std, 0.0)

    def anchors(self, features: Sequence[Tensor], images: Tensor) -> tuple[Tensor, list[int]]:
        """All anchors [A, 4] and how many each level has."""
        cells = [getattr(self, f"cell{level}") for level in range(len(features))]
        grids = [tuple(f.shape[-2:]) for f in features]
        anchors = grid_anchors(grids, tuple(images.shape[-2:]), cells)
        return anchors, [h * w * len(c) for (h, w), c in zip(grids, cells, strict=True)]

    def detect(self, features: Sequence[Tensor], proposals: Tensor, valid: Tensor, sizes: Tensor) -> list[Detections]:
        """Detections of each image from its proposals [B, N, 4]."""
        logits, deltas = self.box_head(pool(features, proposals, self.config.box_pool_size, self.config))
        shape = proposals.shape[:2]
        selected = select_boxes(
            logits.unflatten(0, shape), deltas.unflatten(0, shape), proposals, valid, sizes, self.config
        )
        rois = torch.cat([F.pad(boxes, (1, 0), value=i) for i, (boxes, _, _) in enumerate(selected)])
        pooled = pool_rois(features, rois, self.config.mask_pool_size, self.config)
        return split_masks(self.mask_head(pooled), selected)
