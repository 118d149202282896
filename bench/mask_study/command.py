"""The command `mrcnn-bench mask-study`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer

SEEDS, STEPS, IMAGES = 5, 300, 40


def mask_study(
    out: Annotated[Path, typer.Option(help="Folder for study.json and the report; a study in it is continued.")] = Path(
        "runs/mask-study"
    ),
    seeds: Annotated[int, typer.Option(help="Runs an arm; the arms are compared seed by seed.")] = SEEDS,
    steps: Annotated[int, typer.Option(help="Training steps a run.")] = STEPS,
    images: Annotated[int, typer.Option(help="Held-out pictures a run is measured on.")] = IMAGES,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    report_only: Annotated[bool, typer.Option("--report-only", help="Write the report of what is there.")] = False,
) -> None:
    """Compare three forms of the mask loss: train each with the same seeds, and judge the claims made about them.

    The claims are listed before anything runs (bench/mask_study/arms.py); that one is not supported is a result. A
    study that is cut off keeps its finished runs and goes on when it is run again with the same settings. Exit status
    130 where it was stopped.
    """
    from rich.console import Console

    from mrcnn.errors import ConfigError

    from .record import MaskStudyError, load_record
    from .report import write_study_report
    from .study import choose_device, run_study

    console = Console(highlight=False, soft_wrap=True)
    try:
        if report_only:
            record = load_record(out)
        else:
            record = run_study(out, range(seeds), steps, images, choose_device(device), console)
        for path in write_study_report(record, out):
            console.print(f"wrote {path}")
    except (MaskStudyError, ConfigError) as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename or out}: {error.strerror or error}.")
    except KeyboardInterrupt:
        console.print(f"stopped; finished runs are in {out}: run the same command to go on, or with --report-only")
        raise typer.Exit(130) from None


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)
