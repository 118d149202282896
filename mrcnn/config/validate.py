"""Values that cannot work, found before anything is built or written."""

from __future__ import annotations

from ..errors import ConfigError
from .schema import Config, ModelConfig, TrainConfig

# Integers that may be smaller than 1.
LEAST = {
    "model.num_classes": 2,
    **dict.fromkeys(("model.frozen_stages", "model.sampling_ratio", "model.box_conv_layers"), 0),
    **dict.fromkeys(("data.image_size", "data.max_objects"), 0),
    **dict.fromkeys(("train.warmup_steps", "train.eval_every", "train.workers", "train.seed"), 0),
}


def validate(config: Config) -> Config:
    """Return `config` if a run can start with it; raise ConfigError for the first value that cannot work."""
    for section in ("model", "data", "train"):
        for name, value in vars(getattr(config, section)).items():
            key = f"{section}.{name}"
            least = LEAST.get(key, 1)
            numbers = value if isinstance(value, tuple) else (value,)
            if any(type(number) is int and number < least for number in numbers):
                raise ConfigError(f"{key} must be at least {least}, got {value}")
            if any(type(number) is float and not 0 <= number < float("inf") for number in numbers):
                raise ConfigError(f"{key} must not be negative and must be finite, got {value}")
    _validate_model(config.model)
    _validate_train(config.train)
    for name in ("compile", "cuda_graphs"):
        if getattr(config.train, name) and not config.data.group_by_aspect:
            raise ConfigError(f"train.{name} needs batches of few shapes: set data.group_by_aspect=true")
    if config.data.max_size < config.data.image_size:
        raise ConfigError(
            f"data.max_size {config.data.max_size} must not be below data.image_size {config.data.image_size}"
        )
    return config


def _validate_model(model: ModelConfig) -> None:
    for name in ("rpn_positive_fraction", "roi_positive_fraction"):
        if not 0 < getattr(model, name) <= 1:
            raise ConfigError(f"model.{name} must be in (0, 1], got {getattr(model, name)}")
    if int(model.roi_samples * model.roi_positive_fraction) < 1:
        raise ConfigError("model.roi_samples x model.roi_positive_fraction must be at least 1, or no mask is trained")
    if model.mask_loss == "softmax" and model.num_classes < 3:
        raise ConfigError("model.mask_loss=softmax is identically 0 with one class: take bce or canvas")
    if len(model.anchor_sizes) not in (4, 5):
        raise ConfigError("model.anchor_sizes needs one size a level: four for P2..P5, five for P2..P6")
    for name in ("anchor_scales", "aspect_ratios"):
        values = getattr(model, name)
        if not values or min(values) <= 0:
            raise ConfigError(f"model.{name} needs at least one number, all above 0, got {values}")
    if model.rpn_low_threshold > model.rpn_high_threshold:
        raise ConfigError("model.rpn_low_threshold must not exceed model.rpn_high_threshold")
    if model.frozen_stages > 5:
        raise ConfigError("model.frozen_stages counts the stem and four stages: at most 5")
    if model.weights and model.norm == "gn":
        raise ConfigError("model.weights fit batch norm: set model.norm to bn, frozen_bn or sync_bn, or weights to ''")
    if "gn" in (model.norm, model.fpn_norm, model.head_norm):
        _validate_groups(model)


def _validate_groups(model: ModelConfig) -> None:
    """GroupNorm has 32 groups."""
    channels = {"fpn_channels": model.fpn_norm == "gn" or (model.head_norm == "gn" and model.box_conv_layers > 0)}
    channels["mask_channels"] = model.head_norm == "gn"
    for name, normalised in channels.items():
        if normalised and getattr(model, name) % 32:
            raise ConfigError(f"model.{name} must be a multiple of 32 with GroupNorm, got {getattr(model, name)}")


def _validate_train(train: TrainConfig) -> None:
    if not all(0 <= milestone <= 1 for milestone in train.milestones):
        raise ConfigError(f"train.milestones are parts of the run, in [0, 1], got {train.milestones}")
