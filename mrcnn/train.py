"""Training: optimizer, schedule, the step, metrics and checkpoints."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .checkpoint import Checkpoint, save_checkpoint
from .config import Config, TrainConfig, validate
from .data.augment import build_transform
from .data.coco import CocoDataset
from .data.collate import Collate
from .data.shapes import ShapesDataset
from .errors import ConfigError, DataError
from .inference import autocast, evaluate
from .modeling import MaskRCNN
from .structures import Batch

Dataset = CocoDataset | ShapesDataset


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, or AdamW, which here leaves biases and normalisation parameters undecayed."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, config.lr, momentum=0.9, weight_decay=config.weight_decay)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, config.lr)


SCHEDULES: dict[str, Callable[[float], float]] = {
    "multistep": lambda done: 0.1 ** ((done >= 2 / 3) + (done >= 8 / 9)),
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * min(done, 1.0))),
    "constant": lambda done: 1.0,
}
"""Factor of the learning rate by the part of the run that is done."""


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """What the learning rate is multiplied by at `step`: linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    return SCHEDULES[config.schedule](step / config.steps)


def training_batches(dataset: Dataset, config: Config) -> Iterator[Batch]:
    """The run's batches, all of the configured size; a small data set is drawn from again within a batch."""
    train, data = config.train, config.data
    dataset = copy.copy(dataset)  # the caller's may be in use elsewhere, with another transform
    dataset.transform = build_transform(True, data.image_size, data.max_size, data.augment)
    order = torch.Generator().manual_seed(train.seed)
    loader = DataLoader(
        dataset,
        batch_size=train.batch_size,
        # One epoch of the sampler is the whole run: workers start once, and no epoch ends in a smaller batch.
        sampler=_ShuffledPasses(len(dataset), train.steps * train.batch_size, order),
        num_workers=train.workers,
        collate_fn=Collate(data.max_objects or dataset.max_objects),
        pin_memory=torch.cuda.is_available(),
        generator=order,
    )
    yield from loader


class _ShuffledPasses(torch.utils.data.Sampler[int]):
    """`total` indices: shuffled passes over the data set, one after another."""

    def __init__(self, size: int, total: int, generator: torch.Generator) -> None:
        self.size, self.total, self.generator = size, total, generator

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        for start in range(0, self.total, self.size):
            yield from torch.randperm(self.size, generator=self.generator)[: self.total - start].tolist()


def training_step(
    model: MaskRCNN, batch: Batch, optimizer: torch.optim.Optimizer, clip_norm: float = 0.0
) -> dict[str, Tensor]:
    """One optimizer step; returns the losses, detached and still on the device."""
    with autocast(batch.images.device):
        losses = model(batch.images, batch.sizes, batch.targets)
    optimizer.zero_grad(set_to_none=True)
    sum(losses.values()).backward()
    if clip_norm > 0:
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    return {name: loss.detach() for name, loss in losses.items()}


def train(
    dataset: Dataset,
    config: Config,
    output: Path,
    device: torch.device,
    validation: Dataset | None = None,
    on_step: Callable[[int, dict], None] = lambda step, metrics: None,
) -> Checkpoint:
    """Train a model from scratch, writing config.json, metrics.jsonl and checkpoint.pt to `output`.

    `metrics.jsonl` gets one JSON object every `log_every` steps and one an evaluation. `on_step` is called after
    every step, with the metrics where they were read from the device and {} elsewhere.

    Raises:
        DataError: the data set is empty, or none of its images can be read.
        ConfigError: a value that cannot work, or `output` holds a checkpoint already.
        FloatingPointError: a loss or a weight is no longer finite; the last checkpoint is kept.
    """
    if len(dataset) == 0:
        raise DataError("the training set has no images")
    check_output(output)
    settings = config.train
    torch.manual_seed(settings.seed)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=len(dataset.class_names)))
    validate(config)
    model = MaskRCNN(config.model).to(device)
    if device.type == "cuda":  # on a CPU channels_last convolutions are slower
        model = model.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, settings))
    batches = training_batches(dataset, config)
    checkpoint = Checkpoint(model, config, dataset.class_names, dataset.category_ids, 0)

    output.mkdir(parents=True, exist_ok=True)
    run = dataclasses.asdict(config) | {"class_names": dataset.class_names}
    (output / "config.json").write_text(json.dumps(run, indent=2) + "\n")
    start, replaced = time.perf_counter(), 0
    with (output / "metrics.jsonl").open("w") as log:
        for step, batch in enumerate(batches, 1):
            losses = training_step(model.train(), batch.to(device, True), optimizer, settings.clip_norm)
            replaced += batch.replaced
            last = step == settings.steps
            evaluating = last or bool(settings.eval_every and step % settings.eval_every == 0)
            saving = evaluating or step % settings.save_every == 0
            metrics: dict = {}
            if saving or step % settings.log_every == 0:
                metrics = _read_metrics(step, losses, schedule.get_last_lr()[0], start)
                metrics["damaged_images"] = replaced
                _write_line(log, metrics)
            schedule.step()
            if saving:
                _check_weights(model, step)
                checkpoint.step = step
                save_checkpoint(output / "checkpoint.pt", checkpoint)
            if evaluating and validation is not None:
                metrics |= _evaluate(model, validation, config, step, log)
            on_step(step, metrics)
    model.eval()
    return checkpoint


def check_output(output: Path) -> None:
    """Raise ConfigError unless a run can write to the folder `output`, which need not exist."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output {output} is a file; a folder is wanted")
    if (output / "checkpoint.pt").exists():
        raise ConfigError(f"{output} already holds a checkpoint.pt, and runs cannot be resumed: choose another folder")


def _evaluate(model: MaskRCNN, validation: Dataset, config: Config, step: int, log: TextIO) -> dict:
    """Metrics on the validation set; a damaged image there is reported, and does not end the run."""
    try:
        results = evaluate(model, validation, config, config.model.max_detections)
    except DataError as error:
        _write_line(log, {"step": step, "evaluation_error": str(error)})
        return {"evaluation_error": str(error)}
    _write_line(log, {"step": step, "evaluation": results})
    return {f"{kind}_{name}": value for kind, values in results.items() for name, value in values.items()}


def _check_weights(model: MaskRCNN, step: int) -> None:
    """A checkpoint of weights that are not finite would replace a good one."""
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise FloatingPointError(f"the weights are not finite after step {step}; lower --lr or raise train.clip_norm")


def _read_metrics(step: int, losses: dict[str, Tensor], lr: float, start: float) -> dict[str, float]:
    """Losses as numbers, which waits for the device."""
    values = dict(zip(losses, torch.stack(list(losses.values())).tolist(), strict=True))
    total = sum(values.values())
    if not math.isfinite(total):
        raise FloatingPointError(
            f"the loss is not finite at step {step}: {values}; lower --lr or raise train.clip_norm"
        )
    return {"step": step, "loss": total, **values, "lr": lr, "seconds": time.perf_counter() - start}


def _write_line(file: TextIO, values: dict) -> None:
    file.write(json.dumps(values) + "\n")
    file.flush()
