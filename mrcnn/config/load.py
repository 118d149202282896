"""Every choice of a training run as frozen dataclasses, with named configurations to start from.

`torchvision` is torchvision's `maskrcnn_resnet50_fpn` with its defaults; `tiny` is the one a CPU can train.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from .errors import ConfigError


@dataclass(frozen=True)
class ModelConfig:
    """The architecture and what its stages keep. Sizes are pixels of the resized image."""

    num_classes: int = 91  # with the background, which is class 0; set from the data when training
    backbone: str = "resnet50"  # resnet18 or resnet50
    norm: str = "bn"  # bn, frozen_bn or gn, in the backbone
    fpn_channels: int = 256
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)  # one a level, P2..P6
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)  # height / width

    rpn_high_threshold: float = 0.7
    rpn_low_threshold: float = 0.3
    rpn_samples: int = 256  # anchors an image in the RPN loss
    rpn_positive_fraction: float = 0.5
    rpn_nms_threshold: float = 0.7
    pre_nms_top_n: tuple[int, int] = (2000, 1000)  # a level; in training, in inference
    post_nms_top_n: tuple[int, int] = (2000, 1000)  # an image

    canonical_scale: int = 224  # a RoI of this side is pooled from P4
    roi_samples: int = 512  # RoIs an image in the box loss
    roi_positive_fraction: float = 0.25  # of them with a mask
    roi_threshold: float = 0.5
    box_pool_size: int = 7
    box_channels: int = 1024
    mask_pool_size: int = 14
    mask_channels: int = 256
    mask_layers: int = 4

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


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation."""

    steps: int = 90000
    batch_size: int = 16
    optimizer: str = "sgd"  # sgd (momentum 0.9) or adamw
    lr: float = 0.02
    weight_decay: float = 1e-4
    warmup_steps: int = 1000
    schedule: str = "multistep"  # multistep (x 0.1 at 2/3 and 8/9 of the steps), cosine or constant
    clip_norm: float = 0.0  # largest gradient norm; 0 does not clip
    log_every: int = 20
    eval_every: int = 0  # steps between evaluations; 0 evaluates at the end only
    save_every: int = 1000  # steps between checkpoints; also written at every evaluation and at the end
    workers: int = 4
    seed: int = 0


@dataclass(frozen=True)
class Config:
    """A whole run."""

    name: str = "torchvision"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


CONFIGS = {
    "torchvision": Config(),
    "tiny": Config(
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
            warmup_steps=50,
            schedule="cosine",
            clip_norm=10.0,
            workers=0,
        ),
    ),
}
"""Named configurations."""


def load_config(name_or_file: str, overrides: Iterable[str] = ()) -> Config:
    """The named configuration, or one from a TOML or JSON file, with `section.key=value` overrides.

    A file holds any of the sections model, data and train; its top-level `base` names the configuration it changes
    (default `torchvision`). Values are written as in TOML; tuples as arrays.

    Raises:
        ConfigError: no such configuration, file, section or key, or a value of the wrong type.
    """
    if name_or_file in CONFIGS:
        config = CONFIGS[name_or_file]
    else:
        config = config_from_dict(_read(name_or_file))
    for override in overrides:
        key, separator, text = override.partition("=")
        section, dot, name = key.strip().partition(".")
        if not separator or not dot:
            raise ConfigError(f"--set wants section.key=value (as in model.backbone=resnet18), got {override!r}")
        config = _replace(config, {section: {name: _parse(text.strip())}}, "--set")
    return config


CHOICES = {
    "model": {"backbone": ("resnet18", "resnet50"), "norm": ("bn", "frozen_bn", "gn")},
    "train": {"optimizer": ("sgd", "adamw"), "schedule": ("multistep", "cosine", "constant")},
}
# Numbers that may be smaller than 1.
LEAST = {"model.num_classes": 2, "data.image_size": 0, "data.max_objects": 0, "train.warmup_steps": 0}
LEAST |= {"train.eval_every": 0, "train.workers": 0, "train.seed": 0}


def validate(config: Config) -> Config:
    """Return `config` if a run can start with it; raise ConfigError for the first value that cannot work."""
    for section in ("model", "data", "train"):
        for name, value in vars(getattr(config, section)).items():
            least = LEAST.get(f"{section}.{name}", 1)
            numbers = [v for v in (value if isinstance(value, tuple) else (value,)) if type(v) is int]
            if any(number < least for number in numbers):
                raise ConfigError(f"{section}.{name} must be at least {least}, got {value}")
            choices = CHOICES.get(section, {}).get(name)
            if choices and value not in choices:
                raise ConfigError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}")
    model, data, train = config.model, config.data, config.train
    for name in ("rpn_positive_fraction", "roi_positive_fraction"):
        if not 0 < getattr(model, name) <= 1:
            raise ConfigError(f"model.{name} must be in (0, 1], got {getattr(model, name)}")
    if len(model.anchor_sizes) != 5 or not all(ratio > 0 for ratio in model.aspect_ratios):
        raise ConfigError("model.anchor_sizes needs five sizes, one a level P2..P6, and aspect_ratios positive ones")
    if data.max_size < data.image_size:
        raise ConfigError(f"data.max_size {data.max_size} must not be below data.image_size {data.image_size}")
    if min(train.lr, train.weight_decay, train.clip_norm) < 0:
        raise ConfigError("train.lr, weight_decay and clip_norm must not be negative")
    return config


def config_from_dict(values: dict[str, Any]) -> Config:
    """A Config from nested dictionaries, as `dataclasses.asdict` makes them; raises ConfigError."""
    values = {key: value for key, value in values.items() if key != "class_names"}  # a run's config.json has them too
    base = values.pop("base", "torchvision")
    name = values.pop("name", base)
    if base not in CONFIGS:
        raise ConfigError(f"unknown base configuration {base!r}; choose one of {', '.join(CONFIGS)}")
    return dataclasses.replace(_replace(CONFIGS[base], values, "configuration"), name=str(name))


def _read(path: str) -> dict[str, Any]:
    file = Path(path)
    if file.suffix not in (".toml", ".json"):
        raise ConfigError(f"unknown configuration {path!r}; choose {', '.join(CONFIGS)} or a .toml or .json file")
    try:
        text = file.read_text()
        values = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid {file.suffix[1:].upper()}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold the sections model, data and train")
    return values


def _parse(text: str) -> Any:
    """A TOML value; a bare word is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _replace(config: Config, sections: dict[str, Any], source: str) -> Config:
    for section, values in sections.items():
        current = getattr(config, section, None)
        if not dataclasses.is_dataclass(current):
            raise ConfigError(f"{source}: unknown section {section!r}; the sections are model, data and train")
        if not isinstance(values, dict):
            raise ConfigError(f"{source}: section {section!r} must be a table of keys and values")
        hints = get_type_hints(type(current))
        for name, value in values.items():
            if name not in hints:
                raise ConfigError(f"{source}: unknown key {section}.{name}; the keys are {', '.join(hints)}")
            current = dataclasses.replace(current, **{name: _typed(value, hints[name], f"{section}.{name}")})
        config = dataclasses.replace(config, **{section: current})
    return config


def _typed(value: Any, wanted: Any, name: str) -> Any:
    if get_origin(wanted) is tuple and isinstance(value, (list, tuple)):
        element, *rest = get_args(wanted)
        if rest == [Ellipsis] or len(rest) + 1 == len(value):
            return tuple(_typed(v, element, name) for v in value)
    elif wanted is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif type(value) is wanted:
        return value
    raise ConfigError(f"{name} must be {getattr(wanted, '__name__', wanted)}, got {value!r}")
