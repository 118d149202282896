"""`mrcnn train`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from kernels import use_backend

from ..checkpoint import Checkpoint, load_checkpoint
from ..config import CONFIGS, Config, DataConfig, load_config, validate
from ..config.load import override_config
from ..data.shapes import ShapesDataset
from ..errors import ConfigError, DataError
from ..resume import MAY_CHANGE
from ..train import Dataset, check_output
from ..train import train as train_model
from .common import (
    FROM_CONFIG,
    Data,
    Device,
    DeviceOption,
    Ops,
    OpsOption,
    choose_device,
    coco_dataset,
    console,
    held_out_shapes,
    progress_bar,
)
from .interrupt import stop_signals

RESUME = (
    "Go on with the run in --output from its checkpoint.pt, with its configuration: of other values only "
    f"{', '.join(MAY_CHANGE)} are taken, and train.steps where the schedule is constant (the others depend on it)."
)
COMPILE = "Compile the model: minutes at the start, fewer and larger kernels then. Sets data.group_by_aspect."
CUDA_GRAPHS = "Capture the whole step in a CUDA graph for each shape of batch. Sets data.group_by_aspect."
INIT_FROM = "Start from this checkpoint's weights, those that fit by name and shape, instead of from model.weights."


def train(
    output: Annotated[Path, typer.Option(help="Folder for config.json, metrics.jsonl, checkpoint.pt and best.pt.")],
    images: Annotated[Path | None, typer.Option(help="Folder of the training images.")] = None,
    annotations: Annotated[Path | None, typer.Option(help="Their COCO JSON file.")] = None,
    val_images: Annotated[Path | None, typer.Option(help="Folder of the validation images.")] = None,
    val_annotations: Annotated[Path | None, typer.Option(help="Their COCO JSON file.")] = None,
    data: Annotated[Data, typer.Option(help="coco reads --images and --annotations; shapes is synthetic.")] = Data.coco,
    config: Annotated[
        str | None,
        typer.Option(show_default="torchvision", help=f"{', '.join(CONFIGS)}, or a .toml or .json file."),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one value; may be repeated.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help=RESUME)] = False,
    init_from: Annotated[Path | None, typer.Option(metavar="CHECKPOINT", help=INIT_FROM)] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write losses, learning rate and AP to OUTPUT/tensorboard.")
    ] = False,
    steps: Annotated[int | None, typer.Option(min=1, show_default=FROM_CONFIG, help="Optimizer steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, show_default=FROM_CONFIG, help="Images a step.")] = None,
    lr: Annotated[
        float | None, typer.Option(min=0, show_default=FROM_CONFIG, help="Learning rate after warm-up.")
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(min=0, show_default=FROM_CONFIG, help="Shorter side; 0 keeps the images' size."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, show_default=FROM_CONFIG, help="Processes that load images.")
    ] = None,
    eval_every: Annotated[
        int | None, typer.Option(min=0, show_default=FROM_CONFIG, help="Steps; 0 is at the end only.")
    ] = None,
    compile_: Annotated[
        bool | None, typer.Option("--compile/--no-compile", show_default=FROM_CONFIG, help=COMPILE)
    ] = None,
    cuda_graphs: Annotated[
        bool | None, typer.Option("--cuda-graphs/--no-cuda-graphs", show_default=FROM_CONFIG, help=CUDA_GRAPHS)
    ] = None,
    ops: OpsOption = Ops.auto,
    device: DeviceOption = Device.auto,
    seed: Annotated[
        int | None,
        typer.Option(show_default=FROM_CONFIG, help="Of weights, order, augmentation and sampling."),
    ] = None,
) -> None:
    """Train on COCO-format data, or on synthetic shapes (--data shapes).

    Ctrl-C or SIGTERM: the run saves a checkpoint after its step and exits with status 130; --resume goes on.
    """
    check_output(output, resuming=resume)
    resumed, started_from = _checkpoints(output, resume, init_from)
    given = {
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "workers": workers,
        "eval_every": eval_every,
        "compile": compile_,
        "cuda_graphs": cuda_graphs,
        "seed": seed,
    }
    base = resumed.config if resumed and config is None else load_config(config or "torchvision")
    resolved = _resolve(base, set_ or [], given, image_size)
    if resumed and resolved.data.group_by_aspect and not resumed.config.data.group_by_aspect:
        raise ConfigError(
            "--compile and --cuda-graphs need batches of few shapes (data.group_by_aspect), which the run to resume "
            "has not: resume without them, or start a new run from its weights with --init-from"
        )
    chosen = choose_device(device, ops)
    training, validation = _datasets(data, resolved, images, annotations, val_images, val_annotations)
    _warn(resolved, chosen.type, starts_random=not (resumed or started_from))
    done = resumed.step if resumed else 0
    with progress_bar() as bar, use_backend(ops), stop_signals() as should_stop:
        report = _Report(bar, done, resolved.train.steps)
        train_model(
            training, resolved, output, chosen, validation, report.on_step,
            resume=resumed, init_from=started_from, tensorboard=tensorboard, on_note=report.on_note,
            should_stop=should_stop,
        )  # fmt: skip
    if done == resolved.train.steps:
        console.print(f"the run was complete: it has taken its {done} steps")
    report.summarise(output)


def _checkpoints(output: Path, resume: bool, init_from: Path | None) -> tuple[Checkpoint | None, Checkpoint | None]:
    """(the checkpoint to resume, the checkpoint to start from), of which at most one is asked for."""
    if resume and init_from:
        raise ConfigError("--resume goes on with the weights in --output: it takes no --init-from")
    if resume and not (output / "checkpoint.pt").is_file():
        raise ConfigError(f"nothing to resume: there is no {output / 'checkpoint.pt'}; without --resume a run starts")
    resumed = load_checkpoint(output / "checkpoint.pt", training=True) if resume else None
    return resumed, load_checkpoint(init_from) if init_from else None


def _resolve(base: Config, overrides: list[str], given: dict, image_size: int | None) -> Config:
    """`base` with --set, then the options of a name of their own; raises ConfigError."""
    config = override_config(base, overrides)
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, **{k: v for k, v in given.items() if v is not None}),
        data=config.data if image_size is None else _with_image_size(config, image_size),
    )
    if config.train.compile or config.train.cuda_graphs:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, group_by_aspect=True))
    return validate(config)


def _with_image_size(config: Config, image_size: int) -> DataConfig:
    """The longer side's limit keeps its proportion to the shorter side."""
    data = config.data
    both = image_size and data.image_size
    max_size = round(image_size * data.max_size / data.image_size) if both else data.max_size
    return dataclasses.replace(data, image_size=image_size, max_size=max_size)


def _warn(config: Config, device: str, starts_random: bool) -> None:
    """Say what works and is hardly meant."""
    model = config.model
    if device == "cpu" and model.backbone in ("resnet50", "resnet101"):
        console.print("this configuration takes minutes a step on a CPU; --config tiny is meant for one")
    if not starts_random or model.weights:
        return
    if model.frozen_stages > 0:
        console.print(
            f"warning: model.frozen_stages={model.frozen_stages} freezes layers with random weights: "
            "set model.weights or --init-from, or model.frozen_stages=0"
        )
    if model.norm == "frozen_bn":
        console.print(
            "warning: model.norm=frozen_bn with random weights normalises nothing: set model.weights or --init-from, "
            "or a norm that learns (bn, sync_bn, gn)"
        )


class _Report:
    """Progress of a run on the terminal."""

    def __init__(self, bar: Progress, done: int, steps: int) -> None:
        self.bar, self.task = bar, bar.add_task("training", total=steps, completed=done, status="")
        self.last: dict = {}  # value of every metric when it was last there

    def on_note(self, sentence: str) -> None:
        """Print a sentence as it is, beside the bar."""
        self.bar.console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    def on_step(self, step: int, metrics: dict) -> None:
        """Move the bar; print evaluations."""
        self.last |= metrics
        self.bar.update(self.task, completed=step)
        if "evaluation_error" in metrics:
            self.bar.console.print(f"step {step}: not evaluated: {metrics['evaluation_error']}")
        if "loss" in metrics:
            self.bar.update(self.task, status=f"loss {metrics['loss']:.4g}")
        if "segm_AP50" in metrics:
            box, mask = metrics["bbox_AP50"], metrics["segm_AP50"]
            self.bar.console.print(f"step {step}: box AP50 {box:.3f}, mask AP50 {mask:.3f}")

    def summarise(self, output: Path) -> None:
        """Print what the run leaves behind."""
        damaged = self.last.get("damaged_images")
        if damaged:
            console.print(f"{damaged} times a damaged image was replaced by the next one; the warnings name the files")
        skipped = self.last.get("skipped_steps")
        if skipped:
            console.print(f"{skipped} steps changed nothing: their gradient was not finite")
        if "best_step" in self.last:
            best = f"mask AP {self.last['best_segm_AP']:.3f} at step {self.last['best_step']}"
            console.print(f"best {best}: {output / 'best.pt'}", soft_wrap=True)
        console.print(f"wrote {output / 'checkpoint.pt'}, config.json and metrics.jsonl", soft_wrap=True)


def _datasets(data: Data, config: Config, *files: Path | None) -> tuple[Dataset, Dataset | None]:
    """(training set, validation set or None)."""
    images, annotations, val_images, val_annotations = files
    if data is Data.shapes:
        if any(files):
            raise ConfigError("--data shapes takes no images or annotations")
        return ShapesDataset(2000, config.data.image_size, seed=config.train.seed), held_out_shapes(config)
    training = coco_dataset(images, annotations, "--images", "--annotations", skip_broken=True)
    if training.skipped or training.crowds:
        console.print(training.skipped_summary())
    validation = None
    if val_images or val_annotations:
        validation = coco_dataset(val_images, val_annotations, "--val-images", "--val-annotations")
        if validation.category_ids != training.category_ids:
            raise DataError(f"{annotations} and {val_annotations} have different categories")
    return training, validation
