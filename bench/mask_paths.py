"""Training with the ordinary and with the fused mask path, from the same seeds: the runs and what is kept of them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from kernels import launch_counts
from kernels.backend import choose_backend
from mrcnn.config import Config
from mrcnn.data.shapes import ShapesDataset
from mrcnn.inference import autocast, evaluation_loader
from mrcnn.loader import training_batches
from mrcnn.modeling import MaskRCNN
from mrcnn.modeling.roi_heads import RoISample
from mrcnn.step import TrainingStep
from mrcnn.structures import Batch

from .environment import describe_commit, describe_environment
from .mask_study.arms import THRESHOLD, arm_config, held_out_set, training_set
from .mask_study.measure import given_masks
from .mask_study.record import Record, source_hash
from .report import write_whole

RESULTS_FILE = "results.json"
ORDINARY, FUSED, REFERENCE = "ordinary", "fused", "reference"
PATHS = {ORDINARY: "torchvision", FUSED: "triton", REFERENCE: "torch"}
"""Path -> `MaskLoss.backend`. The reference, which gathers first and rounds in yet another order, is the control: how
far runs drift apart that differ by rounding in PyTorch alone."""
KERNEL = "mask_predictor_forward_kernel"  # launched once a step of the fused path, and in no other


class MaskPathsError(Exception):
    """Something that the user can mend; the message is a sentence for them."""


class PathsRecord(Record):
    """The settings and every finished run; a run's `arm` is its path."""

    def save(self, folder: Path) -> None:
        """Write results.json whole or not at all, a line a run."""
        head = json.dumps({"settings": self.settings}, indent=1)
        lines = ",\n".join(json.dumps(run) for run in self.runs)
        write_whole(folder / RESULTS_FILE, f'{head[:-2]},\n "runs": [\n{lines}\n ]\n}}\n'.encode())


def paths_config(seed: int, steps: int) -> Config:
    """The mask study's small model and pictures, with 16 RoIs for masks a step: the interpreter is slow.

    With SGD, not the study's AdamW: the length of Adam's first steps does not depend on the gradient's, so that a
    weight whose gradient is rounding error moves as far as any other, and the paths of a seed part at once.
    """
    config = arm_config("bce", seed, steps)
    return dataclasses.replace(
        config,
        name="mask-paths",
        model=dataclasses.replace(config.model, roi_positive_fraction=0.25, mask_channels=32),
        train=dataclasses.replace(
            config.train, batch_size=2, optimizer="sgd", lr=0.05, momentum=0.9, weight_decay=1e-4, clip_norm=2.0
        ),
    )


def paths_settings(steps: int, images: int, device: str) -> dict[str, Any]:
    """Everything that must be the same for runs to stand in one file; seeds may be added later."""
    config = dataclasses.asdict(paths_config(0, steps))
    del config["train"]["seed"]
    settings = {"paths": PATHS, "steps": steps, "images": images, "device": device, "config": config}
    return json.loads(json.dumps(settings))  # as it comes back from the file: tuples are lists


def load_paths(folder: Path, settings: dict[str, Any] | None = None) -> PathsRecord:
    """The record in `folder`, or a new one.

    Raises:
        MaskPathsError: it cannot be read, is missing where no settings are given, or was made with others.
    """
    file = folder / RESULTS_FILE
    if not file.exists():
        if settings is None:
            raise MaskPathsError(f"{folder} holds no {RESULTS_FILE}")
        return PathsRecord(settings)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        record = PathsRecord(dict(values["settings"]), list(values["runs"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MaskPathsError(f"{file} cannot be read ({error}): mend it or choose another folder") from None
    different = [key for key in settings or {} if record.settings.get(key) != settings[key]]
    if different:
        raise MaskPathsError(
            f"{file} was made with other settings ({', '.join(different)}): use the same, or another folder"
        )
    return record


def run_paths(
    out: Path, seeds: int, steps: int, images: int, device: torch.device, commit: str | None, console: Console
) -> PathsRecord:
    """Run what is missing, all paths of a seed before the next seed; returns the record with all runs.

    Raises:
        MaskPathsError: `out` holds runs with other settings, a number is too small, or the kernels cannot run.
    """
    if min(seeds, steps, images) < 1:
        raise MaskPathsError(f"seeds, steps and images must be at least 1, got {seeds}, {steps} and {images}")
    try:
        choose_backend(PATHS[FUSED], torch.empty(0, device=device))
    except RuntimeError as error:
        raise MaskPathsError(f"the fused path cannot run: {error}") from None
    record = load_paths(out, paths_settings(steps, images, device.type))
    missing = [(seed, path) for seed in range(seeds) for path in PATHS if record.run(path, seed) is None]
    if kept := len(PATHS) * seeds - len(missing):
        console.print(f"kept from before: {kept} of {len(PATHS) * seeds} runs")
    made_by = _made_by(commit)  # now: a file that changes while this runs is not what was imported
    record.save(out)  # an unwritable folder is found before the work
    _run_missing(record, missing, out, device, made_by, console)
    return record


def _run_missing(
    record: PathsRecord,
    missing: Sequence[tuple[int, str]],
    out: Path,
    device: torch.device,
    made_by: dict[str, Any],
    console: Console,
) -> None:
    steps, images = record.settings["steps"], record.settings["images"]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
        warnings.catch_warnings(),
    ):
        # The interpreter computes the 0/0 of masked-out lanes with numpy, which warns.
        warnings.filterwarnings("ignore", ".*encountered in", RuntimeWarning)
        everything = progress.add_task("all steps", total=len(missing) * steps)
        for seed, path in missing:
            progress.update(everything, description=f"seed {seed}, {path}")
            run = run_path(paths_config(seed, steps), path, images, device, lambda: progress.advance(everything))
            record.runs.append({"arm": path, "seed": seed, **run, **made_by})
            record.save(out)
            console.print(describe(record.runs[-1]))


def describe(run: dict[str, Any]) -> str:
    """One line about a finished run."""
    loss, iou = run["metrics"]["mask_loss"], run["metrics"]["given_iou"]
    held_out = f"held-out mask loss {'not finite' if loss is None else f'{loss:.4f}'}, mask IoU {iou:.3f}"
    return f"seed {run['seed']} {run['arm']:9s} {held_out}; {run['seconds']:.0f} s"


def run_path(
    config: Config, path: str, images: int, device: torch.device, on_step: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Train and measure one run: its curves, what the first step's gradients differ by, the held-out metrics."""
    start, launched = time.perf_counter(), launch_counts[KERNEL]
    model, curves = _train(config, path, device, on_step)
    launches = launch_counts[KERNEL] - launched
    if launches != (config.train.steps if path == FUSED else 0):
        raise RuntimeError(f"{KERNEL} was launched {launches} times in {config.train.steps} steps of path {path!r}")
    gradient = None
    if path != ORDINARY:
        gradient = gradient_difference(*(first_gradients(config, p, device) for p in (path, ORDINARY)))
    return {
        "metrics": held_out_metrics(model, config, held_out_set(config, images)),
        "curves": curves,
        "gradient": gradient,
        "launches": launches,
        "seconds": round(time.perf_counter() - start, 1),
    }


def _model(config: Config, path: str, device: torch.device) -> MaskRCNN:
    """Weights, and the random numbers that are drawn later, come from the seed alone."""
    torch.manual_seed(config.train.seed)
    model = MaskRCNN(config.model).to(device).train()
    if device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)  # as in `mrcnn.train`
    model.mask_loss.backend = PATHS[path]
    return model


def _train(
    config: Config, path: str, device: torch.device, on_step: Callable[[], None]
) -> tuple[MaskRCNN, dict[str, list[float | None]]]:
    """The model, and the mask and the total loss of every step; None where one is not finite."""
    model = _model(config, path, device)
    step = TrainingStep(model, config.train)
    masks, totals = [], []
    for batch in training_batches(training_set(config), config):
        losses = step(batch.to(device, non_blocking=True))
        masks.append(losses["loss_mask"])
        totals.append(sum(losses.values()))
        on_step()
    return model, {"mask": [_number(v) for v in masks], "total": [_number(v) for v in totals]}


def first_gradients(config: Config, path: str, device: torch.device) -> dict[str, Tensor]:
    """Of every parameter in the first step, before clipping."""
    model = _model(config, path, device)
    (batch,) = itertools.islice(training_batches(training_set(config), config), 1)
    batch = batch.to(device)
    with autocast(device):
        losses = model(batch.images, batch.sizes, batch.targets)
    sum(losses.values()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def gradient_difference(ours: dict[str, Tensor], ordinary: dict[str, Tensor]) -> dict[str, Any]:
    """Norm of the difference over that of the ordinary gradient: of all parameters, and of the worst."""
    if ours.keys() != ordinary.keys():
        raise ValueError(f"gradients of other parameters: {sorted(ours.keys() ^ ordinary.keys())}")
    squares = {n: ((ours[n] - g).double().square().sum(), g.double().square().sum()) for n, g in ordinary.items()}
    ratios = {name: (d / g.clamp(min=1e-24)).sqrt() for name, (d, g) in squares.items()}
    worst = max(ratios, key=lambda name: torch.nan_to_num(ratios[name], nan=torch.inf).item())
    whole = (sum(d for d, _ in squares.values()) / sum(g for _, g in squares.values())).sqrt()
    return {"whole": _number(whole), "largest": _number(ratios[worst]), "parameter": worst, "count": len(ratios)}


@torch.no_grad()
def held_out_metrics(model: MaskRCNN, config: Config, dataset: ShapesDataset) -> dict[str, float | None]:
    """Mask loss and mask IoU over the objects, each asked for in its own box and class; one judge for all paths."""
    model.eval()
    model.mask_loss.backend = PATHS[ORDINARY]
    device = next(model.parameters()).device
    losses, ious, objects = [], [], 0
    for batch in evaluation_loader(dataset, config):
        number = int(batch.targets.count.sum())
        losses.append(_given_loss(model, batch.to(device)).double() * number)
        objects += number
        for i, masks in enumerate(given_masks(model, batch)):
            height, width = batch.sizes[i].tolist()
            truth = batch.targets.masks.dense(i)[: int(batch.targets.count[i]), :height, :width].bool()
            found = masks[THRESHOLD]
            union = (found | truth).sum(dim=(1, 2)).clamp(min=1)
            ious += ((found & truth).sum(dim=(1, 2)) / union).tolist()
    return {
        "mask_loss": _number(sum(losses) / max(objects, 1)),
        "given_iou": _number(torch.tensor(ious).mean()),
        "objects": objects,
    }


def _given_loss(model: MaskRCNN, batch: Batch) -> Tensor:
    """The mask loss with the objects' own boxes as RoIs."""
    targets = batch.targets
    labels = torch.where(targets.valid, targets.labels, -1)
    matched = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    with autocast(batch.images.device):
        features = model.fpn(model.backbone(model.normalize(batch.images, batch.sizes)))
        (pooled,) = model.pooler(features, [targets.boxes], [model.config.mask_pool_size])
        rois = RoISample(targets.boxes, labels, matched)
        return model.mask_loss(model.mask_head(pooled), model.mask_head, rois, targets)["loss_mask"]


def _number(value: Tensor) -> float | None:
    """Nine digits, which tell fp32 numbers apart; None of what is not finite, which JSON cannot hold."""
    return float(f"{value.item():.9g}") if value.isfinite() else None


def _made_by(commit: str | None) -> dict[str, Any]:
    """Where and from what a run was made."""
    environment, found = describe_environment(), describe_commit()
    return {
        "source": source_hash(),
        "commit": commit or found["id"][:12] + (" and uncommitted changes" if found["dirty"] else ""),
        "gpu": (environment["gpu"] or {}).get("name"),
        "cpu": environment["cpu_name"],
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": environment["versions"] | {"Python": environment["python"]},
    }
