"""Anchor labelling in plain PyTorch, an image at a time: forms the IoU matrix [G, A]."""

import torch
from torch import Tensor

from ..box_iou.reference import box_iou


def label_anchors(
    anchors: Tensor,
    gt_boxes: Tensor,
    gt_count: Tensor,
    high_threshold: float,
    low_threshold: float,
    allow_low_quality_matches: bool,
    low_inclusive: bool,
    require_overlap: bool,
) -> tuple[Tensor, Tensor]:
    """See `op.label_anchors`, anchors [B, A, 4]; box_iou followed by the rules of torchvision's Matcher."""
    options = (high_threshold, low_threshold, allow_low_quality_matches, low_inclusive, require_overlap)
    results = [_label_image(*image, *options) for image in zip(anchors, gt_boxes, gt_count, strict=True)]
    if not results:
        empty = torch.empty(anchors.shape[:2], device=anchors.device)
        return empty.to(torch.int8), empty.to(torch.int32)
    labels, matched_idx = zip(*results, strict=True)
    return torch.stack(labels), torch.stack(matched_idx)


def _label_image(
    anchors: Tensor,
    gt_boxes: Tensor,
    count: Tensor,
    high: float,
    low: float,
    low_quality: bool,
    low_inclusive: bool,
    require_overlap: bool,
) -> tuple[Tensor, Tensor]:
    slot = torch.arange(len(gt_boxes), device=gt_boxes.device)
    is_object = (slot < count) & gt_boxes.isfinite().all(dim=1)
    # -1 is below every threshold and every IoU: an empty slot is never anybody's best match.
    iou = torch.where(is_object[:, None], box_iou(gt_boxes, anchors), -1.0)
    iou = torch.cat([iou, iou.new_full((1, len(anchors)), -1.0)])  # so that G = 0 has a maximum too
    best, matched_idx = iou.max(dim=0)
    labels = torch.where(best > low if low_inclusive else best >= low, -1, 0)
    labels.masked_fill_(
        (best >= high) | best.isnan(), 1
    )  # NaN (0/0) compares false with both thresholds in Matcher: positive
    if low_quality and len(anchors) > 0:
        best_of_gt = iou[:-1].max(dim=1, keepdim=True).values
        claims = is_object[:, None] & (best_of_gt > 0) if require_overlap else is_object[:, None]
        labels.masked_fill_(((iou[:-1] == best_of_gt) & claims).any(dim=0), 1)
    matched_idx = torch.where(labels == 1, matched_idx, 0)
    return labels.to(torch.int8), matched_idx.to(torch.int32)
