"""Every choice of a training run as frozen dataclasses, with named configurations to start from."""

from .load import config_from_dict, load_config
from .named import CONFIGS
from .schema import Config, DataConfig, ModelConfig, TrainConfig
from .validate import validate

__all__ = [
    "CONFIGS",
    "Config",
    "DataConfig",
    "ModelConfig",
    "TrainConfig",
    "config_from_dict",
    "load_config",
    "validate",
]
