"""Seconds of our own ops at a step's sizes: what `bench.predict` counts in their machine code.

| op | model |
| --- | --- |
| RoIAlign, anchor labels, NMS, RPN loss, mask loss, mask targets | of each kernel the slower of issue and bytes |
| RoIAlign's backward, box and mask RoIs in one call | the instructions of both, the features' gradient written once |
| the rest (top-k, decoding, proposals' labels, NMS of detections) | no model: their bytes, as any kernel's |

On boxes drawn as the studies draw them, clustered around `objects` objects an image, every positive slot filled.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from kernels.runtime import INTERPRETED
from mrcnn.config import ModelConfig

from .inputs import Sizes
from .predict import Prediction, PredictionError, predict
from .workloads import Workload

ANCHORS, LEVELS = 3, 5  # of a cell, of the pyramid: what the workloads have


@dataclass(frozen=True)
class OwnTime:
    """Of one call."""

    seconds: float
    kernels: int
    issue_s: float
    dram_s: float


def own_times(
    config: ModelConfig, size: tuple[int, int], batch: int, objects: int, training: bool
) -> tuple[dict[str, list[OwnTime]], str]:
    """(times by op in the order of their calls, a sentence on where they come from)."""
    if INTERPRETED:
        return {}, "Our ops by their bytes alone: under TRITON_INTERPRET=1 there is no machine code to count."
    found: dict[str, list[OwnTime]] = {}
    lost = []
    for family in (_roi_align, _proposals, _losses):
        try:
            found |= family(config, Sizes(batch, size, objects=objects), training)
        except PredictionError as error:
            lost.append(str(error))
    note = f"Our ops ({', '.join(found)}) by the instructions in their machine code; the others by their bytes."
    return found, note + (f" By their bytes for want of a model: {'; '.join(lost)}." if lost else "")


def _roi_align(config: ModelConfig, sizes: Sizes, training: bool) -> dict[str, list[OwnTime]]:
    sizes = replace(sizes, channels=config.fpn_channels, sampling_ratio=config.sampling_ratio)
    number = (config.roi_samples, int(config.roi_samples * config.roi_positive_fraction))
    if not training:
        number = (config.post_nms_top_n[1], config.max_detections)
    sides = (config.box_pool_size, config.mask_pool_size)
    box, mask = (
        _predict("multiscale_roi_align", replace(sizes, rois=n, output_size=side))
        for n, side in zip(number, sides, strict=True)
    )
    forward = [_total(p for p in of if p.direction == "forward") for of in (box, mask)]
    if not training:
        return {"roi_align_forward": forward}
    back = [p for p in (*box, *mask) if p.direction == "backward"]
    issue, dram = sum(p.issue_s for p in back), max(p.dram_s for p in back)
    joined = OwnTime(sum(t.seconds for t in forward), sum(t.kernels for t in forward),
                     sum(t.issue_s for t in forward), sum(t.dram_s for t in forward))  # fmt: skip
    return {"roi_align_forward": [joined], "roi_align_backward": [OwnTime(max(issue, dram), 1, issue, dram)]}


def _proposals(config: ModelConfig, sizes: Sizes, training: bool) -> dict[str, list[OwnTime]]:
    if len(config.anchor_sizes) != LEVELS or len(config.anchor_scales) * len(config.aspect_ratios) != ANCHORS:
        raise PredictionError("anchor labels, NMS and the RPN's loss: the workloads' grids have five levels of three")
    top = replace(sizes, rois=config.pre_nms_top_n[0 if training else 1])
    found = {"nms_mask": [_total(_predict("nms_mask", top))]}
    if not training:
        return found
    loss = _predict("rpn_loss", replace(sizes, slots=config.rpn_samples))
    return found | {
        "label_grid_anchors": [_total(_predict("label_grid_anchors", sizes))],
        "rpn_loss_rows": [_total(p for p in loss if p.direction == "forward")],
        "rpn_loss_rows_backward": [_total(p for p in loss if p.direction == "backward")],
    }


def _losses(config: ModelConfig, sizes: Sizes, training: bool) -> dict[str, list[OwnTime]]:
    if not training:
        return {}
    if config.mask_loss != "bce":
        raise PredictionError("mask loss: the workloads have bce alone")
    positives = int(config.roi_samples * config.roi_positive_fraction)
    side = 2 * config.mask_pool_size
    sizes = replace(sizes, mask_size=side, classes=config.num_classes, rois=positives)
    loss = _predict(
        "mask_predictor_loss", replace(sizes, masks=sizes.images * positives, channels=config.mask_channels)
    )
    weight = [p for p in loss if p.kernel.startswith("mask_predictor_weight")]
    features = [p for p in loss if p.direction == "backward" and p not in weight]
    return {
        "mask_targets": [_total(_predict("mask_targets", sizes))],
        "mask_predictor_forward": [_total(p for p in loss if p.direction == "forward")],
        "mask_predictor_features": [_total(features)],
        "mask_predictor_weight": [_total(weight)],
    }


def _predict(op: str, sizes: Sizes) -> list[Prediction]:
    """Of the suite that has one dtype: bf16, or fp32 where an op knows no other."""
    return list(predict([Workload(op, "step", "sweep", sizes)]))


def _total(predictions: Iterable[Prediction]) -> OwnTime:
    """One kernel after the other."""
    of = list(predictions)
    seconds = sum(max(p.issue_s, p.dram_s) for p in of)
    return OwnTime(seconds, len(of), sum(p.issue_s for p in of), sum(p.dram_s for p in of))
