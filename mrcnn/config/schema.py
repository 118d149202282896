"""The keys of a configuration and what they mean.

The model's defaults are those of torchvision's maskrcnn_resnet50_fpn, the training's those of detectron2's 1x schedule.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Normalizer = Literal["sampled", "slots", "positives", "cells"]


@dataclass(frozen=True)
class ModelConfig:
    """The architecture and what its stages keep. Sizes are pixels of the resized image."""

    num_classes: int = 91  # with the background, which is class 0; set from the data when training

    # Backbone and pyramid: C2..C5 -> P2..P5 or P6
    backbone: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet50"
    weights: str = ""  # backbone's to start from, by torchvision's name: DEFAULT, IMAGENET1K_V1, ...; empty: none
    norm: Literal["bn", "frozen_bn", "sync_bn", "gn"] = "bn"  # in the backbone
    frozen_stages: int = 0  # of the backbone, not trained: 1 the stem, 2 also C2, ... 5 all
    fpn_channels: int = 256
    fpn_norm: Literal["none", "bn", "sync_bn", "gn"] = "none"

    # Anchors: every size of a level x aspect ratio, on each of its cells
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)  # one a level, P2..P6; four sizes leave P6 out
    anchor_scales: tuple[float, ...] = (1.0,)  # of the level's size; three with three ratios make nine a cell
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)  # height / width
    round_anchors: bool = True  # to whole pixels, as torchvision does and detectron2 does not

    # RPN: labels, sample, losses, proposals
    rpn_layers: int = 1  # 3x3 convolutions
    objectness: Literal["sigmoid", "softmax"] = "sigmoid"  # one logit an anchor or two
    rpn_high_threshold: float = 0.7
    rpn_low_threshold: float = 0.3
    rpn_low_inclusive: bool = False  # background at an IoU of exactly the low threshold, too
    rpn_require_overlap: bool = False  # an object that overlaps no anchor makes none positive (else, all)
    rpn_samples: int = 256  # anchors an image in the RPN loss
    rpn_positive_fraction: float = 0.5  # of them, at most
    rpn_sampling: Literal["random", "hard"] = "random"  # of the negatives; hard takes those of the highest loss
    rpn_negative_ratio: float = 0.0  # negatives a positive, at most; 0: negatives fill the sample
    rpn_class_normalizer: Normalizer = "sampled"  # N_cls: anchors drawn; slots (B x rpn_samples); positives; cells
    rpn_box_normalizer: Normalizer = "sampled"  # N_reg: likewise; cells: positions of all levels, B x sum of H x W
    rpn_box_beta: float = 1 / 9  # where smooth L1 turns from a parabola to a line; 0 is L1
    rpn_nms_threshold: float = 0.7
    pre_nms_top_n: tuple[int, int] = (2000, 1000)  # a level; in training, in inference
    post_nms_top_n: tuple[int, int] = (2000, 1000)  # an image

    # RoIs: sample, pooling
    roi_samples: int = 512  # RoIs an image in the box loss
    roi_positive_fraction: float = 0.25  # of them with a mask
    roi_threshold: float = 0.5
    canonical_scale: int = 224  # a RoI of this side is pooled from P4
    roi_aligned: bool = False  # RoIAlign's coordinates shifted by half a cell, as detectron2 does
    sampling_ratio: int = 2  # samples a bin and axis, 2 x 2 = 4; 0 adapts to the RoI

    # Box head
    box_pool_size: int = 7
    box_conv_layers: int = 0  # 3x3, with fpn_channels
    box_fc_layers: int = 2
    box_channels: int = 1024
    box_beta: float = 1 / 9

    # Mask head
    mask_pool_size: int = 14  # the masks have twice that side
    mask_layers: int = 4
    mask_channels: int = 256
    mask_loss: Literal["bce", "softmax", "canvas"] = "bce"  # see modeling/mask_losses.py; softmax needs two classes
    mask_target: Literal["soft", "binary"] = "soft"  # torchvision's; detectron2's aligned and thresholded; not canvas
    head_norm: Literal["none", "bn", "sync_bn", "gn"] = "none"  # of the box and mask heads' convolutions

    # Weights of the losses in the total: the paper's lambda is rpn_box_weight
    objectness_weight: float = 1.0
    rpn_box_weight: float = 1.0
    class_weight: float = 1.0
    box_weight: float = 1.0
    mask_weight: float = 1.0

    # Detections
    score_threshold: float = 0.05
    detection_nms_threshold: float = 0.5
    max_detections: int = 100


@dataclass(frozen=True)
class DataConfig:
    """How images reach the model."""

    image_size: int = 800  # shorter side after resizing; 0 keeps the images' size
    max_size: int = 1333  # longer side at most
    max_objects: int = 0  # ground-truth slots an image; 0 takes the data set's largest number
    augment: bool = True
    group_by_aspect: bool = False  # batches of landscape, portrait or square images: 3 shapes, as --compile needs


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation."""

    steps: int = 90000
    batch_size: int = 16
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.02
    momentum: float = 0.9  # of SGD
    weight_decay: float = 1e-4
    norm_weight_decay: float = 1e-4  # of normalisation layers' weights and biases
    bias_weight_decay: float = 1e-4  # of the other biases
    backbone_lr_factor: float = 1.0  # the backbone's learning rate over the rest's
    warmup_steps: int = 1000
    schedule: Literal["multistep", "cosine", "constant"] = "multistep"
    milestones: tuple[float, ...] = (2 / 3, 8 / 9)  # of the steps, where multistep multiplies by lr_gamma
    lr_gamma: float = 0.1
    clip_norm: float = 0.0  # largest gradient norm; 0 does not clip
    skip_limit: int = 10  # steps in a row that are left out for a gradient that is not finite, before the run ends
    compile: bool = False  # forward and losses by torch.compile, their backward with them
    fused_convs: bool = False  # bias, residual and ReLU in the convolution's own pass, by cuDNN; on a GPU
    cuda_graphs: bool = False  # the whole step as one CUDA graph for each of the three shapes of batches
    log_every: int = 20
    eval_every: int = 0  # steps between evaluations; 0 evaluates at the end only
    save_every: int = 1000  # steps between checkpoints; also written at every evaluation and at the end
    workers: int = 4
    seed: int = 0


@dataclass(frozen=True)
class Config:
    """A whole run."""

    name: str = "custom"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
