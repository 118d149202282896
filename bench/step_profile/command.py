"""The command `mrcnn-bench profile`."""

from __future__ import annotations

import os
import shutil
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..command_line import fail

Ops = StrEnum("Ops", ["auto", "triton", "torch", "torchvision"])
Device = StrEnum("Device", ["auto", "cuda", "cpu"])


def profile(
    out: Annotated[Path, typer.Option(help="Folder for trace.json.gz (opens in ui.perfetto.dev) and profile.json.")],
    config: Annotated[str, typer.Option(help="A name that `mrcnn train` knows, or a .toml or .json file.")] = "tiny",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one value; may be repeated.")
    ] = None,
    image_size: Annotated[
        str | None, typer.Option(metavar="HEIGHTxWIDTH", show_default="the configuration's", help="800 is a square.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, show_default="the configuration's", help="Images a step.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are profiled.")] = 3,
    warmup: Annotated[int, typer.Option(min=1, help="Steps before them.")] = 2,
    ops: Annotated[Ops, typer.Option(help="Implementation of the detection ops; auto is Triton on a GPU.")] = Ops.auto,
    device: Annotated[Device, typer.Option(help="auto is cuda where there is a GPU.")] = Device.auto,
    training: Annotated[bool, typer.Option("--training/--inference", help="Training steps or detections.")] = True,
) -> None:
    """Profile the whole model on synthetic shapes: time by phase, launches, waits for the device, memory."""
    if shutil.which("nvidia-smi") is None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read with torch: without a GPU its profiler complains of that
    from rich.console import Console

    from mrcnn.errors import ConfigError

    from .report import profile_report
    from .run import NUMBERS, TRACE, out_of_memory, profile_named

    try:
        result = profile_named(out, config, set_ or [], image_size, batch, steps, warmup, ops, device, training)
    except ConfigError as error:
        fail(f"{error}.")
    except OSError as error:
        fail(f"{out} cannot be written: {error.strerror or error}.")
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        fail("not enough memory for this step: a smaller --batch or --image-size takes less.")
    console = Console(highlight=False)
    if not console.is_terminal:  # a file has no width
        console.width = max(console.width, 100)
    for part in profile_report(result):
        console.print(part)
    typer.echo(f"wrote {out / TRACE} and {NUMBERS}")
