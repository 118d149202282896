"""What is printed of a profile."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.table import Table

from ..plots import format_seconds
from .phases import STEP
from .run import StepProfile
from .trace import Phase

STEP_NOTE = (
    "Means of the profiled steps; the profiler slows down many small calls. Loading of images is not part of the step."
)
BACKWARD_NOTE = "Update is clipping, schedule and optimizer."
CPU_NOTE = (
    "These are times of a CPU and say nothing about a GPU. What would wait on a GPU is counted in the ops that ran "
    "here: with --ops auto they are not a GPU's, and on a CPU alone they look at their arguments' values "
    "(aten::_local_scalar_dense in a pool or loss). Not seen here at all: .tolist(), .cpu() and .numpy(), which wait "
    "on a GPU and leave no mark in a CPU's trace."
)


def profile_report(result: StepProfile) -> Iterator[str | Table]:
    """What to print: the phases, then what waits, what is launched and what takes long."""
    yield result.title
    yield _phase_table(result)
    memory = "allocated on the GPU" if result.on_gpu else "resident in the process, Python and libraries included"
    yield f"Peak memory: {result.peak_bytes / 2**20:,.0f} MiB {memory}."
    yield f"{STEP_NOTE} {BACKWARD_NOTE}" if result.settings["training"] else STEP_NOTE
    if not result.on_gpu:
        yield CPU_NOTE
    yield from _lists(result)


def _phase_table(result: StepProfile) -> Table:
    table = _table("phase", "host", "share", *(["device", "kernels"] if result.on_gpu else []), _waits_title(result))
    for phase in result.phases:
        table.add_row(*_phase_cells(phase, result))
    table.add_section()
    device, kernels = (sum(getattr(p, name) or 0 for p in result.phases) for name in ("device", "kernels"))
    step = Phase(STEP, result.seconds, device, kernels, sum(p.waits for p in result.phases))
    table.add_row(*_phase_cells(step, result))
    return table


def _phase_cells(phase: Phase, result: StepProfile) -> list[str]:
    on_device = [format_seconds(phase.device), _count_text(phase.kernels)] if result.on_gpu else []
    share = f"{100 * phase.host / result.seconds:.1f} %"
    return [phase.name, format_seconds(phase.host), share, *on_device, _count_text(phase.waits) if phase.waits else ""]


def _lists(result: StepProfile) -> Iterator[Table]:
    """Only those that have rows."""
    waits, launches = (_table(title, "a step") for title in (_waits_title(result), "launches of Triton kernels"))
    for table, counts in ((waits, result.waits), (launches, result.launches)):
        for name, count in counts.items():
            table.add_row(name, _count_text(count))
    own = "device time of their own" if result.on_gpu else "time of their own"
    operators = _table(f"operators with the most {own}", "calls a step", "time a step")
    for name, calls, seconds in result.operators:
        operators.add_row(name, _count_text(calls), format_seconds(seconds))
    yield from (table for table in (waits, launches, operators) if table.row_count)


def _table(first: str, *numbers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(first, overflow="fold")
    for column in numbers:
        table.add_column(column, justify="right", overflow="fold")
    return table


def _count_text(count: float) -> str:
    """A mean of whole numbers."""
    return f"{count:,.1f}".removesuffix(".0")


def _waits_title(result: StepProfile) -> str:
    return "waits for the device" if result.on_gpu else "would wait on a GPU"
