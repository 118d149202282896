"""Taking up a run where its last checkpoint left it, and starting one from another run's weights."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import nn

from .checkpoint import Checkpoint
from .config import Config
from .data.coco import CocoDataset
from .data.shapes import ShapesDataset
from .errors import CheckpointError, ConfigError, DataError
from .optim import Update

# What a run reports and saves, and how fast it is; everything else decides what is learnt.
MAY_CHANGE = (
    *("train.workers", "train.log_every", "train.eval_every", "train.save_every"),
    *("train.skip_limit", "train.compile", "train.fused_convs", "train.cuda_graphs"),
)


def training_state(update: Update, device: torch.device) -> dict:
    """What a checkpoint needs beside the weights and the step to go on: tensors and plain values.

    The data needs no more than the step (see loader.py), nor does the schedule; nothing in training draws from Python's
    or numpy's generators.
    """
    gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return update.state_dict() | {"rng": {"cpu": torch.get_rng_state(), "cuda": gpu}}


def describe_data(dataset: CocoDataset | ShapesDataset) -> dict:
    """What `check_resumable` knows a training set by: its size, and a digest of its pictures and objects.

    Of files the digest takes what the annotations say (ids, names, sizes, boxes and labels), not folders or pixels:
    data may be moved.
    """
    if isinstance(dataset, ShapesDataset):
        content = [[dataset.length, dataset.image_size, dataset.seed, dataset.class_names, dataset.crowded]]
    else:
        records = dataset._records  # as they are in memory: ground_truth() would build a copy of all masks
        content = ([r.image_id, r.file_name, r.height, r.width, r.boxes, r.labels] for r in records)
    digest = hashlib.sha256()
    for part in content:
        digest.update(json.dumps(part).encode())
    return {"images": len(dataset), "data": digest.hexdigest()}


def restore(state: dict, update: Update, device: torch.device) -> None:
    """Put `training_state` back, into an update of the same configuration.

    The state may be that of parameters in another memory layout, as of a GPU's run that goes on without one.

    Raises:
        CheckpointError: the state does not fit.
    """
    try:
        update.load_state_dict(state)
        torch.set_rng_state(state["rng"]["cpu"])
        if device.type == "cuda" and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"], device)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"the checkpoint's training state is damaged or of another version: {error}") from None


def check_resumable(checkpoint: Checkpoint, config: Config, dataset: CocoDataset | ShapesDataset) -> None:
    """Raise unless training with `config` on `dataset` is the run that `checkpoint` was written by.

    The configuration must be the run's but for MAY_CHANGE and, where the schedule is constant, train.steps: the other
    schedules are functions of the part of the run that is done, so that a longer run has other steps from the start.

    Raises:
        CheckpointError: the checkpoint holds no training state.
        ConfigError: a value of the configuration differs; it is named.
        DataError: another data set.
    """
    if checkpoint.training is None:
        raise CheckpointError(
            "the checkpoint holds weights alone (no optimizer, no random state): --init-from starts a new run from it"
        )
    before = list(zip(checkpoint.category_ids, checkpoint.class_names, strict=True))[1:]
    now = list(zip(dataset.category_ids, dataset.class_names, strict=True))[1:]
    if before != now:
        raise DataError(f"the run to resume has the categories {before}, the data has {now}")
    if len(dataset) != checkpoint.training.get("images"):
        raise DataError(
            f"the run to resume has {checkpoint.training.get('images')} training images, the data has {len(dataset)}"
        )
    for section in ("model", "data", "train"):
        old, new = vars(getattr(checkpoint.config, section)), vars(getattr(config, section))
        for key in old:
            if old[key] != new[key]:
                _check_change(f"{section}.{key}", old[key], new[key], checkpoint)
    described = describe_data(dataset)["data"]
    if checkpoint.training.get("data", described) != described:
        raise DataError(
            "the data has as many images as that of the run to resume, but others: their ids, names, sizes or objects "
            "differ; --init-from starts a new run from the checkpoint's weights"
        )


def _check_change(name: str, old: object, new: object, checkpoint: Checkpoint) -> None:
    constant = checkpoint.config.train.schedule == "constant"
    if name == "train.steps" and constant:
        if new < checkpoint.step:
            raise ConfigError(f"train.steps {new} is below the {checkpoint.step} steps that the run has done")
    elif name not in MAY_CHANGE:
        why = f"the {checkpoint.config.train.schedule} schedule depends on it" if name == "train.steps" else ""
        why = why or f"only {', '.join(MAY_CHANGE)} may change"
        raise ConfigError(f"{name} is {old} in the run to resume and cannot become {new}: {why}")


def initialise(model: nn.Module, checkpoint: Checkpoint) -> list[str]:
    """Copy from `checkpoint` what fits `model` by name and shape; the rest of `model` stays as it is.

    With another number of classes the last layers, whose channels are classes, do not fit, and stay.

    Returns:
        Sentences for the user: how many tensors were taken, and each that was not.

    Raises:
        ConfigError: no parameter fits.
    """
    wanted, given = model.state_dict(), checkpoint.model.state_dict()
    fits = {name: v for name, v in given.items() if name in wanted and v.shape == wanted[name].shape}
    if not fits.keys() & dict(model.named_parameters()).keys():
        raise ConfigError("nothing in the checkpoint to start from fits the model: its architecture is another one")
    model.load_state_dict(fits, strict=False)
    lines = [f"took {len(fits)} of the model's {len(wanted)} tensors from the checkpoint of step {checkpoint.step}"]
    for name in [name for name in wanted if name not in fits]:
        there = f"{tuple(given[name].shape)} in the checkpoint" if name in given else "not in the checkpoint"
        lines.append(f"  fresh: {name} {tuple(wanted[name].shape)}, {there}")
    lines += [f"  unused: {name} {tuple(v.shape)}, not in the model" for name, v in given.items() if name not in wanted]
    return lines
