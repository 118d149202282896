"""The command line: `mrcnn-bench` or `python -m bench`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from .resources.command import resources

app = typer.Typer(
    name="mrcnn-bench",
    help="Measure the detection ops and report the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command()(resources)
ROOT = Path(__file__).resolve().parents[1]

Only = Annotated[
    list[str] | None,
    typer.Option(help="Only calls whose name or suite holds all these words, e.g. 'train bf16'; may be repeated."),
]


@app.command()
def study(
    out: Annotated[Path, typer.Option(help="Folder for study.jsonl and the report; a study in it is continued.")],
    only: Only = None,
    budget: Annotated[str, typer.Option(help="Time for everything, e.g. 8m, 90s, 1h30m.")] = "8m",
    commit: Annotated[str | None, typer.Option(help="Commit to record where there is no git.")] = None,
) -> None:
    """Measure what is missing or stale, the most valuable first, within a time budget; then write the page.

    Two files: study.jsonl, which holds every sample, and report.html; `report` adds Markdown and plots. Without a GPU
    it measures the CPU providers on small workloads. Exit status 1 where a call was lost to an error.
    """
    import torch
    from rich.console import Console

    from .study import StudyError, WorkerError, parse_budget, run_study

    def stop(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)  # as Ctrl-C: the worker is stopped, what is measured stays
    console = Console(highlight=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        progress = run_study(out, device, only or (), parse_budget(budget), commit, console.print)
    except (StudyError, WorkerError) as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{out} cannot be written: {error.strerror}.")
    except KeyboardInterrupt:
        console.print(f"stopped; what was measured is in {out}: run the same command to go on", soft_wrap=True)
        raise typer.Exit(130) from None
    for name, why in progress.lost.items():
        console.print(f"[red]lost[/red] {name}: {why}")
    console.print(
        f"{len(progress.measured)} calls measured, {len(progress.kept)} still valid from before, "
        f"{len(progress.lost)} lost, {len(progress.left)} left for the next run"
    )
    if progress.measured or progress.kept:
        _report(out, out, markdown=False)
    if progress.lost:
        raise typer.Exit(1)


@app.command()
def status(
    reports: Annotated[Path, typer.Argument(help="Folder of results folders.")] = Path("reports"),
    list_calls: Annotated[bool, typer.Option("--calls", help="Name every call that awaits a GPU.")] = False,
) -> None:
    """What is missing or stale, for each GPU that has results; exit status 1 where anything is."""
    from rich.console import Console
    from rich.table import Table

    from .status import find_statuses

    console = Console(highlight=False)
    statuses, problems = find_statuses(reports)
    for problem in problems:
        console.print(f"[red]unreadable[/red] {problem}")
    for found in statuses:
        where = f" in {found.folder}" if found.folder else f": no results of one in {reports}"
        table = Table(title=f"{found.machine}{where}", caption=found.versions, title_justify="left")
        states = ("measured", "stale", "failed", "missing")
        for column in ("suite", *states):
            table.add_column(column, justify="left" if column == "suite" else "right")
        for suite in found.suites:
            table.add_row(suite, *(str(found.counts(suite)[state]) for state in states))
        console.print(table)
        if list_calls:
            for call, reason in found.awaiting.items():
                console.print(f"{call}: {reason}", soft_wrap=True)
        if found.awaiting:
            folder = found.folder or reports / "GPU-NAME"
            console.print(f"{len(found.awaiting)} calls await a GPU. On a machine with one:")
            console.print(f"python -m bench study --out {folder} --budget 8m", soft_wrap=True)
    if problems or any(found.awaiting for found in statuses):
        raise typer.Exit(1)


@app.command("gpu-check")
def gpu_check(
    log: Annotated[Path | None, typer.Option(help="Also write pytest's output to this file.")] = None,
) -> None:
    """Run the tests with the real kernels on the GPU: before any time is believed."""
    _need_gpu("the tests run in Triton's interpreter with `make test`")
    command = [sys.executable, "-m", "pytest", str(_tests()), "-m", "not slow", "-q"]
    raise typer.Exit(_run(command, log))


@app.command()
def sanitize(
    tool: Annotated[str, typer.Option(help="memcheck, racecheck, initcheck or synccheck.")] = "memcheck",
    select: Annotated[
        str, typer.Option("-k", help="Which op tests; the sanitizer slows each launch a hundredfold.")
    ] = ("not compile and not gradcheck"),
    log: Annotated[Path | None, typer.Option(help="Also write the output to this file.")] = None,
) -> None:
    """Run the op tests on the GPU under NVIDIA's compute-sanitizer; exit status 9 where it finds an error."""
    from .ncu import find_tool
    from .study import StudyError

    _need_gpu("compute-sanitizer watches a GPU's memory")
    try:
        program = find_tool("compute-sanitizer")
    except StudyError as error:
        _fail(str(error))
    tests = [sys.executable, "-m", "pytest", str(_tests() / "kernels"), "-m", "not slow", "-q", "-x", "-k", select]
    options = ["--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
    # PyTorch's caching allocator would hide an access beyond a tensor but inside its block.
    raise typer.Exit(_run([program, *options, *tests], log, PYTORCH_NO_CUDA_MEMORY_CACHING="1"))


@app.command()
def ncu(
    out: Annotated[Path, typer.Option(help="Folder for ncu.json.")],
    only: Only = None,
) -> None:
    """Count DRAM bytes and issue slots of our kernels with Nsight Compute, beside what the model says they need.

    By default the train suite in bf16 (fp32 for boxes).
    """
    import json

    from rich.console import Console

    from .ncu import profile_call, triton_variants
    from .report import write_whole
    from .study import StudyError, select

    _need_gpu("Nsight Compute reads a GPU's counters")
    console, found = Console(highlight=False), []
    try:
        for call in select("cuda", only or ["train bf16", "train label_anchors", "train box_iou"]):
            for variant in triton_variants(call):
                found.append(profile_call(call, variant))
                moved = sum(k["dram_read_bytes"] + k["dram_write_bytes"] for k in found[-1]["kernels"])
                model = found[-1]["floor"]["dram_bytes"]
                issue = max(k["issue_percent"] for k in found[-1]["kernels"])
                console.print(
                    f"{call}, {variant}: {moved / 1e6:.0f} MB through DRAM, {moved / model:.2f} x the model's, "
                    f"issue slots up to {issue:.0f} % used"
                )
                write_whole(out / "ncu.json", json.dumps(found, indent=1).encode())
    except StudyError as error:
        _fail(str(error))


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="A study's folder, or JSON of `pytest bench --benchmark-json=FILE`.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for report.html, report.md and plots/.")
    ] = Path("runs/bench-report"),
) -> None:
    """Turn a result into a self-contained HTML page, and a Markdown file with its plots."""
    _report(results, output, markdown=True)


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


def _report(results: Path, output: Path, markdown: bool) -> None:
    from .report import write_report
    from .results import ResultsError

    try:
        written = write_report(results, output, markdown)
    except ResultsError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{output} cannot be written: {error.strerror}.")
    for path in written[:2]:
        typer.echo(f"wrote {path}")


def _need_gpu(instead: str) -> None:
    import torch

    if not torch.cuda.is_available():
        _fail(f"no GPU here; {instead}")


def _tests() -> Path:
    if not (ROOT / "tests").is_dir():
        _fail("the tests are not installed with the package: run this in a checkout")
    return ROOT / "tests"


def _run(command: list[str], log: Path | None, **environment: str) -> int:
    """Run in the checkout, showing the output as it comes and keeping it in `log`; the exit status."""
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=ROOT, env=variables | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        lines = []
        for line in process.stdout:
            typer.echo(line, nl=False)
            lines.append(line)
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("".join(lines), encoding="utf-8")
    return process.returncode


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)
