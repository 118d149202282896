"""What the commands share: the options, the console, the device, the data."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kernels import choose_backend

from ..config import Config
from ..data.coco import CocoDataset
from ..data.shapes import ShapesDataset
from ..errors import ConfigError

console = Console(stderr=True)  # stdout is for the numbers

Ops = enum.StrEnum("Ops", ["auto", "triton", "torch", "torchvision"])
Device = enum.StrEnum("Device", ["auto", "cuda", "cpu"])
Data = enum.StrEnum("Data", ["coco", "shapes"])

FROM_CONFIG, FROM_CHECKPOINT = "the configuration's", "the checkpoint's"
OpsOption = Annotated[Ops, typer.Option(help="Implementation of the detection ops; auto is Triton on a GPU.")]
DeviceOption = Annotated[Device, typer.Option(help="auto is cuda where there is a GPU.")]
CheckpointOption = Annotated[Path, typer.Option(help="Written by `mrcnn train`.")]


def held_out_shapes(config: Config) -> ShapesDataset:
    """Synthetic pictures that training does not see."""
    return ShapesDataset(64, config.data.image_size, seed=config.train.seed + 1_000_000)


def coco_dataset(
    images: Path | None, annotations: Path | None, images_option: str, option: str, **options: bool
) -> CocoDataset:
    """The data set that two options name; raises ConfigError where one of them is missing."""
    if images is None or annotations is None:
        raise ConfigError(f"COCO data needs both {images_option} and {option} (or use --data shapes)")
    return CocoDataset(images, annotations, **options)


def choose_device(device: Device, ops: Ops) -> torch.device:
    """The device to run on, once it is clear that the ops can run there."""
    if device is Device.cuda and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch sees no GPU")
    chosen = torch.device("cuda" if device is not Device.cpu and torch.cuda.is_available() else "cpu")
    try:
        choose_backend(ops, torch.empty(0, device=chosen))
    except RuntimeError as error:
        raise ConfigError(f"--ops {ops}: {error}") from None
    return chosen


def progress_bar() -> Progress:
    """Progress on stderr; its tasks have a field `status`."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
        console=console,
    )
