"""Configurations from names, files and `section.key=value` overrides."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..errors import ConfigError
from .named import CONFIGS
from .schema import Config


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
    return override_config(config, overrides)


def override_config(config: Config, overrides: Iterable[str]) -> Config:
    """`config` with `section.key=value` overrides; raises ConfigError."""
    for override in overrides:
        key, separator, text = override.partition("=")
        section, dot, name = key.strip().partition(".")
        if not separator or not dot:
            raise ConfigError(f"--set wants section.key=value (as in model.backbone=resnet18), got {override!r}")
        config = _replace(config, {section: {name: _parse(text.strip())}}, "--set")
    return config


def config_from_dict(values: dict[str, Any]) -> Config:
    """A Config from nested dictionaries, as `dataclasses.asdict` makes them; raises ConfigError."""
    values = {key: value for key, value in values.items() if key != "class_names"}  # a run's config.json has them too
    base = values.pop("base", "torchvision")
    name = values.pop("name", base)
    if not isinstance(base, str) or base not in CONFIGS:
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
    elif get_origin(wanted) is Literal:
        if value in get_args(wanted):
            return value
        raise ConfigError(f"unknown {name} {value!r}; choose one of {', '.join(get_args(wanted))}")
    elif wanted is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif type(value) is wanted:
        return value
    raise ConfigError(f"{name} must be {wanted if get_args(wanted) else wanted.__name__}, got {value!r}")
