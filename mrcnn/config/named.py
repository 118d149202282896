"""The named configurations: three that people compare with, one to learn from, one for a CPU.

What each of them changes against the defaults of `schema.py` is all that is written here.
"""

from __future__ import annotations

from .schema import Config, DataConfig, ModelConfig, TrainConfig

TORCHVISION = Config(
    # maskrcnn_resnet50_fpn with weights_backbone: frozen batch norm, stem and C2 not trained.
    name="torchvision",
    model=ModelConfig(weights="IMAGENET1K_V1", norm="frozen_bn", frozen_stages=2),
)

TORCHVISION_V2 = Config(
    # maskrcnn_resnet50_fpn_v2 (arXiv:2111.11429): from scratch; batch norm in pyramid and heads, more convolutions.
    name="torchvision_v2",
    model=ModelConfig(fpn_norm="bn", head_norm="bn", rpn_layers=2, box_conv_layers=4, box_fc_layers=1),
)

DETECTRON2 = Config(
    # COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.
    name="detectron2",
    model=ModelConfig(
        num_classes=81,
        weights="IMAGENET1K_V1",
        norm="frozen_bn",
        frozen_stages=2,
        round_anchors=False,
        rpn_class_normalizer="slots",
        rpn_box_normalizer="slots",
        rpn_box_beta=0.0,
        box_beta=0.0,
        post_nms_top_n=(1000, 1000),
        roi_aligned=True,
        sampling_ratio=0,
        mask_target="binary",
    ),
    train=TrainConfig(norm_weight_decay=0.0),
)

TUTORIAL = Config(
    # The five classes of the tutorial (ResNet-50, FPN, RPN head, box head, mask head) and the rules it states.
    name="tutorial",
    model=ModelConfig(
        num_classes=81,
        weights="IMAGENET1K_V1",
        anchor_sizes=(32, 64, 128, 256),  # P2..P5
        anchor_scales=(0.5, 1.0, 2.0),  # nine a cell; 16 to 512 pixels, so that nothing is lost with P6
        objectness="softmax",
        rpn_low_inclusive=True,
        rpn_class_normalizer="slots",
        rpn_box_normalizer="slots",  # the paper's lambda / N_reg = 10 / 2400 is 1 / 240: the same
        rpn_box_beta=1.0,
        box_beta=1.0,
        post_nms_top_n=(1000, 300),
    ),
)

TINY = Config(
    # What two CPU cores train in minutes.
    name="tiny",
    model=ModelConfig(
        backbone="resnet18",
        norm="gn",
        fpn_channels=64,
        anchor_sizes=(16, 32, 64, 128, 256),
        rpn_samples=128,
        pre_nms_top_n=(200, 100),
        post_nms_top_n=(100, 50),
        canonical_scale=96,
        roi_samples=64,
        roi_positive_fraction=0.25,
        box_channels=256,
        mask_channels=64,
    ),
    data=DataConfig(image_size=128, max_size=256),
    train=TrainConfig(
        steps=500,
        batch_size=4,
        optimizer="adamw",
        lr=1e-3,
        weight_decay=1e-2,
        norm_weight_decay=0.0,
        bias_weight_decay=0.0,
        warmup_steps=50,
        schedule="cosine",
        clip_norm=10.0,
        workers=0,
    ),
)

CONFIGS = {config.name: config for config in (TORCHVISION, TORCHVISION_V2, DETECTRON2, TUTORIAL, TINY)}
"""Named configurations."""
