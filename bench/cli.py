"""The command line: `mrcnn-bench` or `python -m bench`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="mrcnn-bench",
    help="Measure the detection ops and report the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


@app.callback()
def _main() -> None:
    # A callback keeps `report` a subcommand even while it is the only one.
    pass


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="JSON written by `pytest bench --benchmark-json=FILE`.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for report.html, report.md and plots/.")
    ] = Path("runs/bench-report"),
) -> None:
    """Turn a result into a self-contained HTML page and a Markdown file."""
    from .report import write_report
    from .results import ResultsError

    try:
        written = write_report(results, output)
    except ResultsError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{output} cannot be written: {error.strerror}.")
    for path in written[:2]:
        typer.echo(f"wrote {path}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything it writes.")] = Path(
        "runs/demo"
    ),
) -> None:
    """Train on synthetic shapes, compare the Triton kernels with the reference, draw, measure, report.

    Exit status 1 where the model did not learn or the kernels do not follow the reference.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which `bench.demo` does
    from rich.console import Console

    from .demo import run_demo

    if not run_demo(output, Console()):
        raise typer.Exit(1)


def _fail(message: str) -> None:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)
