"""Training: optimizer, schedule, the step, metrics and checkpoints."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .checkpoint import Checkpoint, save_checkpoint
from .config import Config, TrainConfig
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
    """SGD with momentum 0.9, or AdamW, which here leaves biases and normalisation parameters undecayed.

    Raises:
        ConfigError: unknown optimizer.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, config.lr, momentum=0.9, weight_decay=config.weight_decay)
    if config.optimizer == "adamw":
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, config.lr)
    raise ConfigError(f"unknown optimizer {config.optimizer!r}; choose sgd or adamw")


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
        sampler=_EndlessSampler(len(dataset), train.steps * train.batch_size, order),
        num_workers=train.workers,
        collate_fn=Collate(data.max_objects or dataset.max_objects),
        pin_memory=torch.cuda.is_available(),
        generator=order,
    )
    yield from loader


class _EndlessSampler(torch.utils.data.Sampler[int]):
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
    on_step: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
) -> Checkpoint:
    """Train a model from scratch, writing config.json, metrics.jsonl and checkpoint.pt to `output`.

    `metrics.jsonl` gets one JSON object every `log_every` steps and one an evaluation. `on_step` is called after
    every step, with the metrics where they were read from the device and {} elsewhere.

    Raises:
        DataError: the data set is empty.
        ConfigError: a value that cannot work.
        FloatingPointError: the loss is no longer finite; the last checkpoint is kept.
    """
    if len(dataset) == 0:
        raise DataError("the training set has no images")
    if config.train.schedule not in SCHEDULES:
        raise ConfigError(f"unknown schedule {config.train.schedule!r}; choose one of {', '.join(SCHEDULES)}")
    torch.manual_seed(config.train.seed)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=len(dataset.class_names)))
    model = _build(config).to(device)
    if device.type == "cuda":  # on a CPU channels_last convolutions are slower
        model = model.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, config.train)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: learning_rate_factor(s, config.train))
    checkpoint = Checkpoint(model, config, dataset.class_names, dataset.category_ids, 0)

    output.mkdir(parents=True, exist_ok=True)
    run = dataclasses.asdict(config) | {"class_names": dataset.class_names}
    (output / "config.json").write_text(json.dumps(run, indent=2) + "\n")
    with (output / "metrics.jsonl").open("w") as log:
        start = time.perf_counter()
        for step, batch in enumerate(training_batches(dataset, config), 1):
            losses = training_step(model.train(), batch.to(device, True), optimizer, config.train.clip_norm)
            metrics: dict[str, float] = {}
            last = step == config.train.steps
            if last or step % config.train.log_every == 0:
                metrics = _read_metrics(step, losses, schedule.get_last_lr()[0], start)
                _write_line(log, metrics)
            schedule.step()
            checkpoint.step = step
            if last or (config.train.eval_every and step % config.train.eval_every == 0):
                save_checkpoint(output / "checkpoint.pt", checkpoint)
                if validation is not None:
                    results = evaluate(model, validation, config, config.model.max_detections)
                    metrics |= {f"{kind}_{k}": v for kind, r in results.items() for k, v in r.items()}
                    _write_line(log, {"step": step, "evaluation": results})
            on_step(step, metrics)
    model.eval()
    return checkpoint


def _build(config: Config) -> MaskRCNN:
    try:
        return MaskRCNN(config.model)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _read_metrics(step: int, losses: dict[str, Tensor], lr: float, start: float) -> dict[str, float]:
    """Losses as numbers: the one place where training waits for the device."""
    values = dict(zip(losses, torch.stack(list(losses.values())).tolist(), strict=True))
    total = sum(values.values())
    if not math.isfinite(total):
        raise FloatingPointError(
            f"the loss is not finite at step {step}: {values}; lower --lr or raise train.clip_norm"
        )
    return {"step": step, "loss": total, **values, "lr": lr, "seconds": time.perf_counter() - start}


def _write_line(file, values: dict) -> None:  # noqa: ANN001
    file.write(json.dumps(values) + "\n")
    file.flush()
