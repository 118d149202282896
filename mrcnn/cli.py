"""The command `mrcnn`: train, evaluate, predict."""

from __future__ import annotations

import dataclasses
import enum
import json
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kernels import choose_backend, use_backend

from .checkpoint import Checkpoint, load_checkpoint
from .config import Config, DataConfig, load_config, validate
from .data.coco import CocoDataset
from .data.shapes import ShapesDataset
from .errors import CheckpointError, ConfigError, DataError
from .evaluation import detections_to_coco, format_table
from .inference import evaluate as evaluate_model
from .predict import predict as predict_file
from .train import check_output
from .train import train as train_model
from .visualize import draw_detections

app = typer.Typer(
    help="Train, evaluate and use a Mask R-CNN whose detection ops are Triton kernels.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Console(stderr=True)  # stdout is for the numbers

Ops = enum.StrEnum("Ops", ["auto", "triton", "torch", "torchvision"])
Device = enum.StrEnum("Device", ["auto", "cuda", "cpu"])
Data = enum.StrEnum("Data", ["coco", "shapes"])

FROM_CONFIG, FROM_CHECKPOINT = "the configuration's", "the checkpoint's"
OpsOption = Annotated[Ops, typer.Option(help="Implementation of the detection ops; auto is Triton on a GPU.")]
DeviceOption = Annotated[Device, typer.Option(help="auto is cuda where there is a GPU.")]
CheckpointOption = Annotated[Path, typer.Option(help="Written by `mrcnn train`.")]


def main() -> None:
    """Run the command line; an error meant for the user is one line on stderr and exit status 2."""
    try:
        app()
    except (CheckpointError, ConfigError, DataError, FloatingPointError, OSError) as error:
        # From a DataLoader's worker the message is a traceback that ends with the sentence.
        sentence = str(error).strip().splitlines()[-1]
        print(f"error: {sentence.removeprefix(f'{DataError.__module__}.DataError: ')}", file=sys.stderr)
        sys.exit(2)


@app.command()
def train(
    output: Annotated[Path, typer.Option(help="Folder for config.json, metrics.jsonl and checkpoint.pt.")],
    images: Annotated[Path | None, typer.Option(help="Folder of the training images.")] = None,
    annotations: Annotated[Path | None, typer.Option(help="Their COCO JSON file.")] = None,
    val_images: Annotated[Path | None, typer.Option(help="Folder of the validation images.")] = None,
    val_annotations: Annotated[Path | None, typer.Option(help="Their COCO JSON file.")] = None,
    data: Annotated[Data, typer.Option(help="coco reads --images and --annotations; shapes is synthetic.")] = Data.coco,
    config: Annotated[str, typer.Option(help="torchvision, tiny, or a .toml or .json file.")] = "torchvision",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one value; may be repeated.")
    ] = None,
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
    ops: OpsOption = Ops.auto,
    device: DeviceOption = Device.auto,
    seed: Annotated[
        int | None,
        typer.Option(show_default=FROM_CONFIG, help="Of weights, order, augmentation and sampling."),
    ] = None,
) -> None:
    """Train from scratch on COCO-format data, or on synthetic shapes (--data shapes)."""
    resolved = load_config(config, set_ or [])
    given = {
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "workers": workers,
        "eval_every": eval_every,
        "seed": seed,
    }
    resolved = dataclasses.replace(
        resolved,
        train=dataclasses.replace(resolved.train, **{k: v for k, v in given.items() if v is not None}),
        data=resolved.data if image_size is None else _with_image_size(resolved, image_size),
    )
    validate(resolved)
    check_output(output)
    chosen = _device(device, ops)
    training, validation = _training_data(data, resolved, images, annotations, val_images, val_annotations)
    if chosen.type == "cpu" and resolved.model.backbone == "resnet50":
        console.print("this configuration takes minutes a step on a CPU; --config tiny is meant for one")
    total = resolved.train.steps
    with _progress() as bar, use_backend(ops):
        task = bar.add_task("training", total=total, status="")

        damaged = 0

        def on_step(step: int, metrics: dict) -> None:
            nonlocal damaged
            damaged = metrics.get("damaged_images", damaged)
            bar.update(task, completed=step)
            if "evaluation_error" in metrics:
                bar.console.print(f"step {step}: not evaluated: {metrics['evaluation_error']}")
            if "loss" in metrics:
                bar.update(task, status=f"loss {metrics['loss']:.3f}")
            if "segm_AP50" in metrics:
                box, mask = metrics["bbox_AP50"], metrics["segm_AP50"]
                bar.console.print(f"step {step}: box AP50 {box:.3f}, mask AP50 {mask:.3f}")

        train_model(training, resolved, output, chosen, validation, on_step)
    if damaged:
        console.print(f"{damaged} times a damaged image was replaced by the next one; the warnings name the files")
    console.print(f"wrote {output / 'checkpoint.pt'}, config.json and metrics.jsonl")


@app.command()
def evaluate(
    checkpoint: CheckpointOption,
    images: Annotated[Path | None, typer.Option(help="Folder of images.")] = None,
    annotations: Annotated[Path | None, typer.Option(help="Their COCO JSON file.")] = None,
    data: Annotated[Data, typer.Option(help="shapes evaluates on 64 held-out synthetic images.")] = Data.coco,
    max_dets: Annotated[int, typer.Option(min=1, help="Detections an image, taken and counted.")] = 100,
    output: Annotated[Path | None, typer.Option(help="JSON file for the numbers.")] = None,
    min_mask_ap50: Annotated[float | None, typer.Option(help="Exit with status 1 below this mask AP50.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, show_default=FROM_CHECKPOINT)] = None,
    workers: Annotated[int | None, typer.Option(min=0, show_default=FROM_CHECKPOINT)] = None,
    ops: OpsOption = Ops.auto,
    device: DeviceOption = Device.auto,
) -> None:
    """Print COCO box and mask AP."""
    loaded = load_checkpoint(checkpoint, _device(device, ops))
    if data is Data.shapes:
        dataset = _held_out_shapes(loaded.config)
    else:
        dataset = _coco(images, annotations, "--images", "--annotations")
    _check_same_classes(loaded, dataset)
    given = {"batch_size": batch_size, "workers": workers}
    settings = dataclasses.replace(loaded.config.train, **{k: v for k, v in given.items() if v is not None})
    loaded.config = dataclasses.replace(loaded.config, train=settings)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
    loaded.model.config = dataclasses.replace(loaded.model.config, max_detections=max_dets)
    with _progress() as bar, use_backend(ops):
        task = bar.add_task("evaluating", total=len(dataset), status="")
        results = evaluate_model(loaded.model, dataset, loaded.config, max_dets, lambda n: bar.advance(task, n))
    console.print(format_table(results))
    text = json.dumps({"checkpoint": str(checkpoint), "step": loaded.step, "max_dets": max_dets, **results}, indent=2)
    if output is None:
        print(text)
    else:
        output.write_text(text + "\n")
    if min_mask_ap50 is not None and results["segm"]["AP50"] < min_mask_ap50:
        print(f"error: mask AP50 {results['segm']['AP50']:.3f} is below {min_mask_ap50}", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def predict(
    image: Annotated[list[Path], typer.Argument(help="Image files.")],
    checkpoint: CheckpointOption,
    output: Annotated[Path, typer.Option(help="Folder for the pictures and predictions.json.")],
    score_threshold: Annotated[float, typer.Option(min=0, max=1, help="Show detections above this score.")] = 0.5,
    ops: OpsOption = Ops.auto,
    device: DeviceOption = Device.auto,
) -> None:
    """Draw boxes, masks and names on images, and write the detections as COCO results."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output {output} is a file; a folder is wanted")
    missing = [str(path) for path in image if not path.is_file()]
    if missing:
        raise DataError(f"no such image file: {', '.join(missing)}")
    loaded = load_checkpoint(checkpoint, _device(device, ops))
    output.mkdir(parents=True, exist_ok=True)
    results, failed = [], 0
    with _progress() as bar, use_backend(ops):
        task = bar.add_task("predicting", total=len(image), status="")
        for number, path in enumerate(image):
            try:
                pixels, found = predict_file(loaded, path)
            except DataError as error:  # the other files are still wanted
                failed += 1
                print(f"error: {error}", file=sys.stderr)
                continue
            shown = {name: value[found["scores"] > score_threshold] for name, value in found.items()}
            picture = draw_detections(pixels, **shown, class_names=loaded.class_names)
            picture.save(output / f"{number:04d}_{path.stem}.png")
            for entry in detections_to_coco(number, shown, loaded.category_ids):
                results.append({"file_name": str(path), "category": _name(loaded, entry), **entry})
            bar.advance(task)
    (output / "predictions.json").write_text(json.dumps(results) + "\n")
    console.print(
        f"{len(results)} detections with a score above {score_threshold} (--score-threshold) in "
        f"{len(image) - failed} images; wrote {output}"
    )
    if failed:
        raise typer.Exit(1)


def _check_same_classes(checkpoint: Checkpoint, dataset: CocoDataset | ShapesDataset) -> None:
    known = list(zip(checkpoint.category_ids, checkpoint.class_names, strict=True))[1:]
    wanted = list(zip(dataset.category_ids, dataset.class_names, strict=True))[1:]
    if known != wanted:
        raise DataError(f"the checkpoint knows the categories {known}, the data has {wanted}")


def _name(checkpoint: Checkpoint, entry: dict) -> str:
    return checkpoint.class_names[checkpoint.category_ids.index(entry["category_id"], 1)]


def _with_image_size(config: Config, image_size: int) -> DataConfig:
    """The longer side's limit keeps its proportion to the shorter side."""
    data = config.data
    max_size = round(image_size * data.max_size / data.image_size) if data.image_size else data.max_size
    return dataclasses.replace(data, image_size=image_size, max_size=max_size)


def _training_data(data: Data, config: Config, *files: Path | None) -> tuple:
    """(training set, validation set or None)."""
    images, annotations, val_images, val_annotations = files
    if data is Data.shapes:
        if any(files):
            raise ConfigError("--data shapes takes no images or annotations")
        return ShapesDataset(2000, config.data.image_size, seed=config.train.seed), _held_out_shapes(config)
    training = _coco(images, annotations, "--images", "--annotations", skip_broken=True)
    if training.skipped or training.crowds:
        console.print(training.skipped_summary())
    validation = None
    if val_images or val_annotations:
        validation = _coco(val_images, val_annotations, "--val-images", "--val-annotations")
        if validation.category_ids != training.category_ids:
            raise DataError(f"{annotations} and {val_annotations} have different categories")
    return training, validation


def _held_out_shapes(config: Config) -> ShapesDataset:
    return ShapesDataset(64, config.data.image_size, seed=config.train.seed + 1_000_000)


def _coco(
    images: Path | None, annotations: Path | None, images_option: str, option: str, **options: bool
) -> CocoDataset:
    if images is None or annotations is None:
        raise ConfigError(f"COCO data needs both {images_option} and {option} (or use --data shapes)")
    return CocoDataset(images, annotations, **options)


def _device(device: Device, ops: Ops) -> torch.device:
    """The device to run on, once it is clear that the ops can run there."""
    if device is Device.cuda and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch sees no GPU")
    chosen = torch.device("cuda" if device is not Device.cpu and torch.cuda.is_available() else "cpu")
    try:
        choose_backend(ops, torch.empty(0, device=chosen))
    except RuntimeError as error:
        raise ConfigError(f"--ops {ops}: {error}") from None
    return chosen


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
        console=console,
    )
