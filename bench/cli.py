"""The command line: `mrcnn-bench` or `python -m bench`."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
from enum import StrEnum, auto
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from .command_line import fail, sigterm_interrupts
from .mask_study.command import Device, mask_study
from .resources.command import resources
from .step.command import step
from .step_profile.command import profile

app = typer.Typer(
    name="mrcnn-bench",
    help="Measure the detection ops and report the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command()(resources)
app.command("mask-study")(mask_study)
app.command()(profile)
app.command()(step)
ROOT = Path(__file__).resolve().parents[1]

Log = Annotated[Path | None, typer.Option(help="Also write the output to this file, as it comes.")]


class Sanitizer(StrEnum):
    """The tools of compute-sanitizer."""

    memcheck = auto()
    racecheck = auto()
    initcheck = auto()
    synccheck = auto()


Only = Annotated[
    list[str] | None,
    typer.Option(
        help="Only calls whose name or suite holds all these words, e.g. 'train bf16'; may be repeated. "
        "roi_align stands for all RoI ops, rpn for those of the region proposal network, "
        "mask for those of the mask branch."
    ),
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
    it measures the CPU providers on small workloads. Exit status 1 where a call was lost to an error, 130 where it was
    stopped.
    """
    import torch
    from rich.console import Console

    from .environment import NO_GPU
    from .study import StudyError, parse_budget, run_study
    from .worker import WorkerError

    console = Console(highlight=False, soft_wrap=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        console.print(NO_GPU)
    try:
        with sigterm_interrupts():
            progress = run_study(out, device, only or (), parse_budget(budget), commit, console.print)
    except (StudyError, WorkerError) as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or out}: {error.strerror or error}.")
    except KeyboardInterrupt:
        console.print(f"stopped; what was measured is in {out}: run the same command to go on, or `report` to see it")
        raise typer.Exit(130) from None
    for name, why in progress.lost.items():
        console.print(f"[red]lost[/red] {name}: {why}")
    console.print(
        f"calls measured: {len(progress.measured)}, again with torch.compile: {len(progress.compiled)}, "
        f"still valid from before: {len(progress.kept)}, lost: {len(progress.lost)}, "
        f"left for the next run: {len(progress.left)}"
    )
    if progress.measured or progress.compiled or progress.kept:
        _report(out, out, markdown=False)
    if progress.lost:
        raise typer.Exit(1)


@app.command()
def status(
    reports: Annotated[Path, typer.Argument(help="A results folder, or the folder of all of them.")] = Path("reports"),
    list_calls: Annotated[bool, typer.Option("--calls", help="Name every call that awaits a GPU.")] = False,
) -> None:
    """What is missing or stale, for each GPU that has results; exit status 1 where anything is."""
    from rich.console import Console

    from .status import find_statuses, status_table

    if not reports.is_dir():
        fail(f"{reports} is no folder; results are kept in reports/ of a checkout")
    console = Console(highlight=False, soft_wrap=True)
    statuses, problems = find_statuses(reports)
    for problem in problems:
        console.print(f"[red]unreadable[/red] {problem}")
    for found in statuses:
        console.print(status_table(found))
        if list_calls:
            for call, reason in found.awaiting.items():
                console.print(f"{call}: {reason}")
        if found.awaiting:
            console.print(f"{len(found.awaiting)} calls await a GPU. On a machine with one:")
            console.print(f"python -m bench study --out {found.folder or reports / 'GPU-NAME'} --budget 8m")
    if problems or any(found.awaiting for found in statuses):
        raise typer.Exit(1)


@app.command("gpu-check")
def gpu_check(
    select: Annotated[str, typer.Option("-k", help="Which tests, as for pytest: parts can run side by side.")] = "",
    log: Log = None,
) -> None:
    """Run the tests of the kernels, the model and the clock on the GPU: before any time is believed."""
    _need_gpu("the tests run in Triton's interpreter with `make test`")
    _run([sys.executable, "-m", "pytest", str(_tests()), "-m", "gpu and not slow", "-q", "-k", select], log)


@app.command()
def sanitize(
    tool: Annotated[Sanitizer, typer.Option(help="Which of its tools.")] = Sanitizer.memcheck,
    select: Annotated[
        str, typer.Option("-k", help="Which op tests: each launch is slowed a hundredfold.")
    ] = "not compile and not gradcheck",
    log: Log = None,
) -> None:
    """Run the op tests on the GPU under NVIDIA's compute-sanitizer; exit status 9 where it finds an error."""
    from .ncu import find_tool
    from .study import StudyError

    _need_gpu("compute-sanitizer watches a GPU's memory")
    try:
        program = find_tool("compute-sanitizer")
    except StudyError as error:
        fail(str(error))
    tests = ["-m", "pytest", str(_tests() / "kernels"), "-m", "gpu and not slow", "-q", "-x", "-k", select]
    # PyTorch's caching allocator would hide an access beyond a tensor but inside its block.
    command = [program, "--tool", tool.value, "--error-exitcode", "9", sys.executable, *tests]
    _run(command, log, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


@app.command()
def ncu(
    out: Annotated[Path, typer.Option(help="Folder for ncu.json; what is in it is not counted again.")],
    only: Only = None,
    budget: Annotated[str, typer.Option(help="Time for everything, e.g. 8m.")] = "8m",
) -> None:
    """Count DRAM bytes and issue slots of our kernels with Nsight Compute, beside what the model says they need.

    By default the train suite in bf16 (fp32 for boxes).
    """
    from rich.console import Console

    from .ncu import count_calls
    from .study import StudyError, parse_budget, select

    _need_gpu("Nsight Compute reads a GPU's counters")
    console = Console(highlight=False, soft_wrap=True)
    try:
        chosen = select("cuda", only or ["train bf16", "train label_grid_anchors", "train nms_mask", "train box_iou"])
        count_calls(chosen, out / "ncu.json", parse_budget(budget), console.print)
    except StudyError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{out} cannot be written: {error.strerror}.")


@app.command()
def overhead(
    out: Annotated[Path | None, typer.Option(help="Also write the figures to this JSON file.")] = None,
    calls: Annotated[int, typer.Option(min=1, help="Calls of each variant.")] = 2000,
) -> None:
    """Measure how long the host takes to make a small RoIAlign call: ours, through torch.library, torchvision's.

    Without a GPU launches are recorded, not made: the figures are then of our Python alone.
    """
    import torch
    from rich.console import Console

    from .overhead import measure_overhead, overhead_json, overhead_table
    from .report import write_whole

    found, on_gpu = measure_overhead(calls), torch.cuda.is_available()
    Console(highlight=False).print(overhead_table(found, on_gpu))
    if out is not None:
        try:
            write_whole(out, overhead_json(found, on_gpu).encode())
        except OSError as error:
            fail(f"{out} cannot be written: {error.strerror}.")


@app.command()
def loader(
    images: Annotated[Path | None, typer.Option(help="Folder of the images; without it a set is made up.")] = None,
    annotations: Annotated[Path | None, typer.Option(help="COCO instances JSON.")] = None,
    workers: Annotated[
        list[int] | None, typer.Option(min=0, show_default="0, 1, 2, 4, ... cores", help="May be repeated.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images a step.")] = 16,
    image_size: Annotated[int, typer.Option(min=0, help="Shorter side after resizing.")] = 800,
    max_size: Annotated[int, typer.Option(min=1, help="Longer side at most.")] = 1333,
    grouped: Annotated[bool, typer.Option("--grouped/--mixed", help="As data.group_by_aspect.")] = True,
    rounds: Annotated[int, typer.Option(min=1, help="Batches of each worker that are timed.")] = 4,
    made_up: Annotated[int, typer.Option(min=1, help="Images of the made-up set.")] = 96,
    out: Annotated[Path | None, typer.Option(help="Also write the figures to this JSON file.")] = None,
) -> None:
    """Measure how many images a second the loader alone delivers, by workers, and where an image's time goes.

    The made-up set is JPEG files of COCO's usual size, 640 x 480 and 480 x 640. The figures are of this machine's CPU.
    """
    from rich.console import Console

    from mrcnn.errors import ConfigError, DataError

    from .loader_rate import measure_named

    console = Console(highlight=False)
    if not console.is_terminal:  # a file has no width
        console.width = max(console.width, 100)
    try:
        settings = (batch, image_size, max_size, grouped, rounds, made_up)
        measure_named(images, annotations, workers, *settings, out, console)
    except (ConfigError, DataError) as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or out}: {error.strerror or error}.")


@app.command()
def predict() -> None:
    """Predict from counts, without a GPU, what the kernels take in training; nothing is measured.

    The kernels of the training ops are compiled and their machine code is counted: half a minute, or a whole one.
    """
    from rich.console import Console

    from . import predict as model

    try:
        table = model.prediction_table(model.predict(model.training_workloads()))
    except model.PredictionError as error:
        fail(str(error))
    console = Console(highlight=False)
    console.width = max(console.width, 124)  # a pipe's 80 would cut figures off
    console.print(table)


@app.command("step-roofline")
def step_roofline(
    config: Annotated[
        str, typer.Option(help="A name that `mrcnn train` knows, or a .toml or .json file.")
    ] = "torchvision",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one value; may be repeated.")
    ] = None,
    image_size: Annotated[str, typer.Option(metavar="HEIGHTxWIDTH", help="800 is a square.")] = "800x1344",
    batch: Annotated[int, typer.Option(min=1, max=4096, help="Images a step.")] = 12,
    training: Annotated[bool, typer.Option("--training/--inference", help="A training step or detection.")] = True,
    objects: Annotated[int, typer.Option(min=1, help="Ground-truth slots an image.")] = 16,
    efficiency: Annotated[
        list[float] | None,
        typer.Option(min=0.01, max=1.0, show_default="1.0 0.7 0.57", help="Of products; may be repeated."),
    ] = None,
    matrix: Annotated[float, typer.Option(min=1.0, help="TFLOP/s of large bf16 products.")] = 790.0,
    dram: Annotated[float, typer.Option(min=0.01, help="TB/s of a copy.")] = 4.3,
    pcie: Annotated[float, typer.Option(min=0.1, help="GB/s from the host.")] = 55.0,
    kernel_us: Annotated[float, typer.Option("--kernel", min=0.0, help="Microseconds that a kernel costs.")] = 2.0,
    target: Annotated[float, typer.Option(min=0.1, help="Images/s to hold the step against.")] = 180.0,
    count_kernels: Annotated[
        bool, typer.Option("--count-kernels/--bytes-only", help="Compile our ops' kernels and count: half a minute.")
    ] = True,
    layers: Annotated[bool, typer.Option("--layers", help="Show every layer; the page has them anyway.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write prediction.json and README.md to this folder.")] = None,
) -> None:
    """Predict from counts, without a GPU, what a step takes layer by layer on an H200; nothing is measured."""
    from rich.console import Console

    from mrcnn.config import load_config, validate
    from mrcnn.errors import ConfigError
    from mrcnn.summary import parse_image_size

    from .roofline import Rates, predict_step
    from .roofline_ops import own_times
    from .roofline_report import headline, rich_table, sheets, verdict, write_prediction

    rates = Rates(matrix * 1e12, tuple(efficiency or Rates.efficiencies), Rates.fp32_matrix, dram * 1e12,
                  kernel_us * 1e-6, pcie * 1e9, target)  # fmt: skip
    try:
        resolved, size = validate(load_config(config, set_ or [])), parse_image_size(image_size)
        own = own_times(resolved.model, size, batch, objects, training) if count_kernels else ({}, "")
        result = predict_step(resolved, size, batch, training, objects, rates, own)
    except ConfigError as error:
        fail(f"{error}.")
    console = Console(highlight=False)
    if not console.is_terminal:  # a file has no width
        console.width = max(console.width, 240 if layers else 150)
    for part in (headline(result), verdict(result), *map(rich_table, sheets(result, layers))):
        console.print(part)
    for assumption in rates.assumptions:
        console.print(f"- {assumption}")
    if out is None:
        return
    try:
        for path in write_prediction(result, out, shlex.join(["mrcnn-bench", *sys.argv[1:]])):
            console.print(f"wrote {path}")
    except OSError as error:
        fail(f"{out} cannot be written: {error.strerror or error}.")


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


@app.command("mask-paths")
def mask_paths(
    out: Annotated[
        Path, typer.Option(help="Folder for results.json, README.md and curves.png; runs that are in it are kept.")
    ] = Path("runs/mask-paths"),
    seeds: Annotated[int, typer.Option(help="Runs a path; the paths are compared seed by seed.")] = 5,
    steps: Annotated[int, typer.Option(help="Training steps a run.")] = 120,
    images: Annotated[int, typer.Option(help="Held-out pictures a run is measured on.")] = 40,
    device: Annotated[Device, typer.Option(help="auto is cuda where there is a GPU.")] = Device.auto,
    commit: Annotated[str | None, typer.Option(help="Commit to record where there is no git.")] = None,
    report_only: Annotated[bool, typer.Option("--report-only", help="Write the report of what is there.")] = False,
) -> None:
    """Train with the ordinary and with the fused mask path from the same seeds; compare with the spread over seeds.

    On a GPU with the compiled kernels in bf16, on a CPU with the same kernels in Triton's interpreter: most of an hour.
    Exit status 1 where the fused path was not shown to be within the spread, 130 where it was stopped.
    """
    import torch

    if device is Device.cpu or not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which `bench.mask_paths` does
    from rich.console import Console

    from mrcnn.cli import common
    from mrcnn.errors import ConfigError

    from .mask_paths import FUSED, MaskPathsError, load_paths, run_paths
    from .mask_paths_report import WITHIN, verdict, write_paths_report

    console = Console(highlight=False, soft_wrap=True)
    try:
        if report_only:
            record = load_paths(out)
        else:
            chosen = common.choose_device(common.Device(device), common.Ops.auto)
            with sigterm_interrupts():
                record = run_paths(out, seeds, steps, images, chosen, commit, console)
        for path in write_paths_report(record, out):
            console.print(f"wrote {path}")
    except (MaskPathsError, ConfigError) as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or out}: {error.strerror or error}.")
    except KeyboardInterrupt:
        console.print(f"stopped; finished runs are in {out}: run the same command to go on, or with --report-only")
        raise typer.Exit(130) from None
    console.print(f"the fused path is: {verdict(record.runs, FUSED)}")
    if verdict(record.runs, FUSED) != WITHIN:
        raise typer.Exit(1)


def _report(results: Path, output: Path, markdown: bool) -> None:
    from .report import write_report
    from .results import ResultsError

    try:
        written = write_report(results, output, markdown)
    except ResultsError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{output} cannot be written: {error.strerror}.")
    for path in written[:2]:
        typer.echo(f"wrote {path}")


def _need_gpu(instead: str) -> None:
    import torch

    if not torch.cuda.is_available():
        fail(f"no GPU here; {instead}")


def _tests() -> Path:
    if not (ROOT / "tests").is_dir():
        fail("the tests are not installed with the package: run this in a checkout")
    return ROOT / "tests"


def _run(command: list[str], log: Path | None, **environment: str) -> NoReturn:
    """Run in the checkout and exit with its status; the output is shown, and kept in `log`, line by line."""
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    variables |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **environment}
    with contextlib.ExitStack() as stack:
        kept = None
        if log is not None:
            try:
                log.parent.mkdir(parents=True, exist_ok=True)
                kept = stack.enter_context(log.open("w", encoding="utf-8", buffering=1))
            except OSError as error:
                fail(f"{log} cannot be written: {error.strerror}.")
        process = stack.enter_context(
            subprocess.Popen(
                command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
        for line in process.stdout:
            typer.echo(line, nl=False)
            if kept is not None:
                kept.write(line)
    raise typer.Exit(process.returncode)
