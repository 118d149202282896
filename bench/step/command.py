"""The command `mrcnn-bench step`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..command_line import fail, sigterm_interrupts


def step(
    out: Annotated[Path, typer.Option(help="Folder for step.jsonl and README.md; a run in it is continued.")],
    only: Annotated[
        list[str] | None, typer.Option(help="Only rows whose name holds all these words, e.g. 'torchvision eager'.")
    ] = None,
    budget: Annotated[str, typer.Option(help="Time for everything, e.g. 8m, 90s, 1h30m.")] = "8m",
    baseline: Annotated[bool, typer.Option("--baseline", help="torchvision's training step.")] = False,
    ladder: Annotated[bool, typer.Option("--ladder", help="Ours, rung by rung.")] = False,
    ablation: Annotated[
        bool, typer.Option("--ablation", help="Rung 7, an op at a time replaced by its reference.")
    ] = False,
    inference: Annotated[bool, typer.Option("--inference", help="Latency and throughput.")] = False,
    loader: Annotated[bool, typer.Option("--loader", help="The step fed from JPEG files.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Captured against not captured, bit for bit.")] = False,
    commit: Annotated[str | None, typer.Option(help="Commit to record where there is no git.")] = None,
    report_only: Annotated[bool, typer.Option("--report-only", help="Write the report of what is there.")] = False,
) -> None:
    """Measure the training step and inference beside torchvision's, the most valuable first; then write the page.

    Without one of --baseline ... --check all of them. Rows are written as they are measured; a run that was stopped is
    gone on with. Without a GPU a tiny model runs instead, to show that everything works. Exit status 1 where a row
    failed, 130 where it was stopped.
    """
    import torch
    from rich.console import Console

    from ..environment import NO_GPU
    from ..study import StudyError, parse_budget
    from .providers import GROUPS
    from .record import StepError, read_record
    from .report import write_step_report
    from .run import Progress, run_step

    console = Console(highlight=False, soft_wrap=True)
    chosen = (baseline, ladder, ablation, inference, loader, check)
    groups = [group for group, is_chosen in zip(GROUPS, chosen, strict=True) if is_chosen]
    device, progress = torch.device("cuda" if torch.cuda.is_available() else "cpu"), Progress()
    stopped = False
    try:
        if not report_only:
            if device.type == "cpu":
                console.print(NO_GPU)
            seconds = parse_budget(budget)
            try:
                with sigterm_interrupts():
                    progress = run_step(out, device, only or (), groups, seconds, commit, console.print)
            except KeyboardInterrupt:
                stopped = True
        console.print(f"wrote {write_step_report(read_record(out), out)}")
    except (StepError, StudyError) as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or out}: {error.strerror or error}.")
    if stopped:
        console.print(f"stopped; what was measured is in {out}: run the same command to go on")
        raise typer.Exit(130)
    if not report_only:
        console.print(
            f"rows measured: {len(progress.measured)}, kept: {len(progress.kept)}, failed: {len(progress.failed)}, "
            f"left for the next run: {len(progress.left)}"
        )
    if progress.failed:
        raise typer.Exit(1)
