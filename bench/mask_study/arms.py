"""What is compared, on what data, and the claims that are tested."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mrcnn.config import CONFIGS, Config
from mrcnn.data.shapes import ShapesDataset

ARMS = {
    "bce": "sigmoid and binary cross-entropy on the ground-truth class's channel",
    "softmax": "softmax over the classes, supervised by the ground-truth class's channel alone",
    "canvas": "softmax over the classes and background, supervised by one canvas that all objects are projected onto",
}
KINDS = 8
HELD_OUT_SEED = 1_000_000  # added to the run's seed: pictures that no run is trained on
SHEET_IMAGES = 6
THRESHOLD = 0.5  # of the probability, above which a pixel is the object's: what users of the model get
THRESHOLDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, THRESHOLD, 0.6, 0.7)
JUMP_WINDOW = 10  # steps before a step, whose median total loss its own is compared with
JUMP_CAP = 1000.0  # stands for a loss that is not finite


@dataclass(frozen=True)
class Metric:
    """A number that every run has; `up` says whether more of it is better, None where neither is."""

    name: str
    title: str
    meaning: str
    up: bool | None


METRICS = (
    Metric("segm_AP", "mask AP", "COCO's, IoU 0.50 to 0.95, on the detections", True),
    Metric("segm_AP50", "mask AP50", "at IoU 0.50", True),
    Metric("segm_AP75", "mask AP75", "at IoU 0.75", True),
    Metric(
        "bbox_AP",
        "box AP",
        "the control: all that differs here is what the mask's gradients do to shared features",
        True,
    ),
    Metric(
        "given_iou", "mask IoU, boxes given", "mean over the objects, each asked for in its own box and class", True
    ),
    Metric("given_object_fill", "the whole box as a mask", "its IoU; it merges every intruder", None),
    Metric("given_fill", "box filled, boxes given", "the share of the box that the mask covers", None),
    Metric("given_merged", "merged, boxes given", "same-class intruders covered, of all there are", False),
    Metric("given_spilled", "spilled, boxes given", "other-class intruders covered, of all there are", False),
    Metric("best_threshold", "best threshold", "of 0.01 to 0.7, by mean mask IoU, boxes given", None),
    Metric("best_iou", "mask IoU, best threshold", "boxes given", True),
    Metric("best_fill", "box filled, best threshold", "boxes given", None),
    Metric("best_merged", "merged, best threshold", "boxes given", False),
    Metric("best_spilled", "spilled, best threshold", "boxes given", False),
    Metric("matched_iou", "mask IoU, matched", "mean over detections of the right class, at a box IoU >= 0.5", True),
    Metric("matched_merged", "merged, matched", "on matched detections, of the intruders in their boxes", False),
    Metric("jump", "largest jump", "of the total loss, over the median of the ten steps before", False),
    Metric("non_finite", "steps not finite", "steps whose loss is infinite or not a number", False),
    Metric("final_mask_loss", "last mask loss", "mean of the last 20 steps; not comparable between the arms", None),
)


@dataclass(frozen=True)
class Claim:
    """`first` has more of `metric` than `second`."""

    name: str
    text: str
    metric: str
    first: str
    second: str


CLAIMS = (
    Claim(
        "1",
        "Binary cross-entropy on the ground-truth channel gives better masks (mask AP) than softmax supervised by the "
        "class channel alone.",
        "segm_AP",
        "bce",
        "softmax",
    ),
    Claim(
        "2",
        "Binary cross-entropy gives better masks (mask AP) than the shared-canvas redesign of softmax.",
        "segm_AP",
        "bce",
        "canvas",
    ),
    Claim(
        "3",
        "The shared canvas merges neighbouring instances of one class (more than binary cross-entropy does).",
        "best_merged",  # at a fixed one, a mask that is left empty merges nothing
        "canvas",
        "bce",
    ),
    Claim(
        "4",
        "Training with softmax is less stable than with binary cross-entropy (largest jump of the total loss).",
        "jump",
        "softmax",
        "bce",
    ),
)


def arm_config(arm: str, seed: int, steps: int) -> Config:
    """`tiny` at 96 pixels without augmentation; arms differ in `model.mask_loss`, and in nothing else."""
    tiny = CONFIGS["tiny"]
    return Config(
        name="mask-study",
        model=dataclasses.replace(
            tiny.model,
            num_classes=KINDS + 1,
            mask_loss=arm,
            # From scratch and in few steps, heads without normalisation learn hardly anything.
            fpn_norm="gn",
            head_norm="gn",
            anchor_sizes=(12, 24, 48, 96, 192),
            canonical_scale=128,  # objects are smaller: all are pooled from P2
            roi_samples=32,
            roi_positive_fraction=0.3,
            mask_layers=2,
        ),
        data=dataclasses.replace(tiny.data, image_size=96, max_size=96, augment=False),
        train=dataclasses.replace(tiny.train, steps=steps, seed=seed, lr=2e-3, warmup_steps=min(30, steps // 4)),
    )


def training_set(config: Config) -> ShapesDataset:
    """A picture for every sample of the run: none is seen twice."""
    train = config.train
    length = train.steps * train.batch_size
    return ShapesDataset(length, config.data.image_size, train.seed, kinds=KINDS, crowded=True)


def held_out_set(config: Config, images: int) -> ShapesDataset:
    """Other pictures, and for every seed others, so that the spread over seeds holds the pictures' too."""
    seed = HELD_OUT_SEED + config.train.seed
    return ShapesDataset(images, config.data.image_size, seed, kinds=KINDS, crowded=True)
