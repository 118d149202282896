"""`label_anchors`: argument checks, backends, and the two kernels as one torch.library op."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..backend import choose_backend
from ..checks import check_same_device, check_tensor
from ..runtime import NAMESPACE, launch, next_power_of_2, tile
from . import reference


def label_anchors(
    anchors: Tensor,
    gt_boxes: Tensor,
    gt_count: Tensor,
    high_threshold: float = 0.7,
    low_threshold: float = 0.3,
    allow_low_quality_matches: bool = True,
    *,
    low_inclusive: bool = False,
    require_overlap: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Label anchors against each image's objects, bit-equal to torchvision's box_iou + Matcher.

    An anchor is positive where its best IoU is at least `high_threshold`, background where it is below
    `low_threshold`, else ignored. With `allow_low_quality_matches` every anchor whose IoU with some object
    *equals* that object's best one is positive too, matched to its own best object. Torchvision's edges hold: an
    object that overlaps no anchor at all makes every anchor positive (unless `require_overlap`); IoU 0/0 counts as
    positive; ties go to the first object. Thresholds are rounded to fp32, as PyTorch does to compare.

    The Triton kernels never form the [A, G] matrix. Autocast changes nothing: fp32 in, fp32 computed.

    Args:
        anchors: [A, 4] fp32 xyxy, shared by the images.
        gt_boxes: [B, G, 4] fp32 xyxy, padded; a box that is not finite is no object (torchvision would make every
            anchor positive).
        gt_count: [B] integers: slots 0..count-1 hold boxes. Clamped to G.
        high_threshold, low_threshold: with low <= high.
        low_inclusive: an IoU of exactly `low_threshold` is background, not ignored (some implementations write
            "IoU <= 0.3"); where both thresholds are one number it is positive either way.
        require_overlap: the low-quality rule holds only for objects whose best IoU is above 0, as in NVIDIA's Mask
            R-CNN of DeepLearningExamples; torchvision and detectron2 do without.
        backend: see `BACKENDS`. On a CPU "auto" is the PyTorch reference.

    Returns:
        labels int8 [B, A] in {1 positive, 0 background, -1 ignored}, and matched_idx int32 [B, A], the object with the
        best IoU, 0 where the image has none.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device, or thresholds out of order.
    """
    check_tensor(anchors, "anchors", 2, last=4)
    check_tensor(gt_boxes, "gt_boxes", 3, last=4)
    if anchors.dtype != torch.float32 or gt_boxes.dtype != torch.float32:
        raise TypeError(f"anchors and gt_boxes must be float32, got {anchors.dtype} and {gt_boxes.dtype}")
    if not isinstance(gt_count, Tensor) or gt_count.dtype not in (torch.int32, torch.int64):
        raise TypeError("gt_count must be an int32 or int64 tensor")
    if gt_count.shape != gt_boxes.shape[:1]:
        raise ValueError(f"gt_count must have shape [{gt_boxes.shape[0]}], got {tuple(gt_count.shape)}")
    check_same_device(anchors=anchors, gt_boxes=gt_boxes, gt_count=gt_count)
    if not low_threshold <= high_threshold:
        raise ValueError(f"low_threshold {low_threshold} must not exceed high_threshold {high_threshold}")

    backend = choose_backend(backend, anchors)
    arguments = (
        anchors,
        gt_boxes,
        gt_count,
        float(high_threshold),
        float(low_threshold),
        allow_low_quality_matches,
        low_inclusive,
        require_overlap,
    )
    if backend == "triton":
        return _label(*arguments)
    if backend == "torchvision":
        return _torchvision(*arguments)
    return reference.label_anchors(*arguments)


def _torchvision(
    anchors: Tensor,
    gt_boxes: Tensor,
    gt_count: Tensor,
    high: float,
    low: float,
    low_quality: bool,
    low_inclusive: bool,
    require_overlap: bool,
) -> tuple[Tensor, Tensor]:
    """The way torchvision's RPN does it: an image at a time, the whole matrix, then Matcher."""
    from torchvision.models.detection._utils import Matcher
    from torchvision.ops import box_iou

    if low_inclusive:  # Matcher's background is `iou < low`, in fp32: the next number lets `low` itself in
        low = min(float(np.nextafter(np.float32(low), np.float32(np.inf))), high)
    matcher = Matcher(high, low, allow_low_quality_matches=low_quality and not require_overlap)
    claimer = Matcher(high, low, allow_low_quality_matches=True)
    labels = torch.zeros(len(gt_boxes), len(anchors), dtype=torch.int8, device=anchors.device)
    matched_idx = torch.zeros_like(labels, dtype=torch.int32)
    for i, (boxes, count) in enumerate(zip(gt_boxes, gt_count.tolist(), strict=True)):
        boxes = boxes[:count]
        finite = boxes.isfinite().all(dim=1).nonzero().squeeze(1)
        if len(finite) == 0 or len(anchors) == 0:
            continue  # Matcher refuses an empty matrix; everything is background
        iou = box_iou(boxes[finite], anchors)
        match = matcher(iou)
        labels[i] = torch.where(match >= 0, 1, torch.where(match == Matcher.BETWEEN_THRESHOLDS, -1, 0)).to(torch.int8)
        if low_quality and require_overlap:
            overlapping = iou[iou.amax(dim=1) > 0]
            if len(overlapping) > 0:
                labels[i][claimer(overlapping) >= 0] = 1
        matched_idx[i] = finite[iou.max(dim=0).indices].to(torch.int32)  # Matcher forgets it where not positive
    return labels, matched_idx


@torch.library.custom_op(f"{NAMESPACE}::label_anchors", mutates_args=())
def _label(
    anchors: Tensor,
    gt_boxes: Tensor,
    gt_count: Tensor,
    high_threshold: float,
    low_threshold: float,
    low_quality: bool,
    low_inclusive: bool,
    require_overlap: bool,
) -> tuple[Tensor, Tensor]:
    from .kernel import best_iou_of_gt_kernel, label_anchors_kernel

    anchors, gt_boxes = anchors.contiguous(), gt_boxes.contiguous()
    gt_count = gt_count.to(torch.int32).contiguous()
    batch, num_gt = gt_boxes.shape[:2]
    num_anchors = len(anchors)
    labels = anchors.new_empty(batch, num_anchors, dtype=torch.int8)
    matched_idx = anchors.new_empty(batch, num_anchors, dtype=torch.int32)

    best_of_gt = gt_boxes.new_empty(batch, num_gt)
    if low_quality and num_gt > 0 and num_anchors > 0:
        # Enough splits to fill a GPU with one image of few objects; a maximum does not depend on their order.
        per_split = tile(8192, 1 << 20)
        splits = -(-num_anchors // per_split)
        block_g = min(next_power_of_2(num_gt), tile(8, 64))
        partial = gt_boxes.new_empty(batch, num_gt, splits)
        grid = (batch * -(-num_gt // block_g), splits)
        launch(
            best_iou_of_gt_kernel, grid, anchors, gt_boxes, gt_count, partial, num_anchors, num_gt, per_split,
            BLOCK_G=block_g, BLOCK_A=tile(256, 4096), device=anchors.device,
        )  # fmt: skip
        best_of_gt = partial.amax(dim=2)
    block_a = tile(512, 1 << 16)
    launch(
        label_anchors_kernel, (-(-num_anchors // block_a), batch), anchors, gt_boxes, gt_count, best_of_gt,
        labels, matched_idx, num_anchors, num_gt, high_threshold, low_threshold,
        LOW_QUALITY=low_quality, LOW_INCLUSIVE=low_inclusive, REQUIRE_OVERLAP=require_overlap and low_quality,
        BLOCK_A=block_a, device=anchors.device,
    )  # fmt: skip
    return labels, matched_idx


@_label.register_fake
def _label_fake(
    anchors: Tensor,
    gt_boxes: Tensor,
    gt_count: Tensor,
    high_threshold: float,
    low_threshold: float,
    low_quality: bool,
    low_inclusive: bool,
    require_overlap: bool,
) -> tuple[Tensor, Tensor]:
    shape = (gt_boxes.shape[0], anchors.shape[0])
    return anchors.new_empty(shape, dtype=torch.int8), anchors.new_empty(shape, dtype=torch.int32)
