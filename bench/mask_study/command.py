"""The command `mrcnn-bench mask-study`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..command_line import fail

SEEDS, STEPS, IMAGES = 5, 300, 40
Device = StrEnum("Device", ["auto", "cuda", "cpu"])


def mask_study(
    out: Annotated[
        Path,
        typer.Option(help="Folder for study.json and the report, which takes in its notes.md; a study is continued."),
    ] = Path("runs/mask-study"),
    seeds: Annotated[int, typer.Option(help="Runs an arm; the arms are compared seed by seed.")] = SEEDS,
    steps: Annotated[int, typer.Option(help="Training steps a run.")] = STEPS,
    images: Annotated[int, typer.Option(help="Held-out pictures a run is measured on.")] = IMAGES,
    device: Annotated[Device, typer.Option(help="auto is cuda where there is a GPU.")] = Device.auto,
    report_only: Annotated[bool, typer.Option("--report-only", help="Write the report of what is there.")] = False,
) -> None:
    """Compare three forms of the mask loss: train each with the same seeds, and judge the claims made about them.

    The claims are listed before anything runs (bench/mask_study/arms.py); that one is not supported is a result. A
    study that is cut off keeps its finished runs and goes on when it is run again with the same settings. Exit status
    130 where it was stopped.
    """
    from rich.console import Console

    from mrcnn.cli import common
    from mrcnn.errors import ConfigError

    from .record import MaskStudyError, load_record
    from .report import write_study_report
    from .study import run_study

    console = Console(highlight=False, soft_wrap=True)
    try:
        if report_only:
            record = load_record(out)
        else:
            chosen = common.choose_device(common.Device(device), common.Ops.auto)
            record = run_study(out, range(seeds), steps, images, chosen, console)
        for path in write_study_report(record, out):
            console.print(f"wrote {path}")
    except (MaskStudyError, ConfigError) as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or out}: {error.strerror or error}.")
    except KeyboardInterrupt:
        console.print(f"stopped; finished runs are in {out}: run the same command to go on, or with --report-only")
        raise typer.Exit(130) from None
