"""Checkpoints: one file with the weights and everything needed to use them; never half-written, never code."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .config import Config, config_from_dict
from .errors import CheckpointError, ConfigError
from .files import replacing
from .modeling import MaskRCNN

FORMAT = "triton-mask-rcnn checkpoint 1"


@dataclass
class Checkpoint:
    """A trained model and what its outputs mean."""

    model: MaskRCNN
    config: Config
    class_names: list[str]  # class_names[0] is the background
    category_ids: list[int]  # COCO category of each class
    step: int
    training: dict[str, Any] | None = None  # what it takes to go on: see resume.py; None in a checkpoint to use


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` to `path`, replacing a file there only when the new one is whole.

    Raises:
        CheckpointError: the file cannot be written.
    """
    content: dict[str, Any] = {
        "format": FORMAT,
        "config": dataclasses.asdict(checkpoint.config),
        "class_names": list(checkpoint.class_names),
        "category_ids": list(checkpoint.category_ids),
        "step": checkpoint.step,
        "model": checkpoint.model.state_dict(),
    }
    if checkpoint.training is not None:
        content["training"] = checkpoint.training
    try:
        with replacing(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        raise CheckpointError(f"cannot write the checkpoint {path}: {error}") from error


def load_checkpoint(path: Path, device: torch.device | str = "cpu", training: bool = False) -> Checkpoint:
    """Read a checkpoint written by `save_checkpoint`, with its model in evaluation mode on `device`.

    `training` keeps what the checkpoint has for resuming its run, twice the size of the weights, on the CPU. Weights
    are never downloaded here, whatever the configuration's `model.weights` says.

    The file is read with `weights_only=True`: it can hold tensors and plain values, not code.

    Raises:
        CheckpointError: no such file, not a checkpoint of this project, or weights that do not fit its configuration.
    """
    content = _read(path)
    try:
        config = config_from_dict(content["config"])
        model = MaskRCNN(config.model)
        model.load_state_dict(content["model"])
        names, ids, step = list(content["class_names"]), list(content["category_ids"]), int(content["step"])
        if not len(names) == len(ids) == config.model.num_classes:
            raise ValueError(
                f"{len(names)} class names and {len(ids)} categories for {config.model.num_classes} classes"
            )
    except (KeyError, TypeError, ConfigError, RuntimeError, ValueError, AttributeError) as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[:2])
        raise CheckpointError(f"{path} is a damaged checkpoint or one of another version: {reason}") from None
    return Checkpoint(model.to(device).eval(), config, names, ids, step, content.get("training") if training else None)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # whatever the unpickler stumbles over in a file of another kind
        raise CheckpointError(f"{path} cannot be read as a checkpoint: damaged, or a file of another kind") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this project; `mrcnn train` writes them")
    return content
