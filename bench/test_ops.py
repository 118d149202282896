"""The suite: five ops x forward, backward x providers x workloads x dtypes, one row each.

python -m pytest bench --benchmark-only --benchmark-json=RESULTS.json
python -m pytest bench --benchmark-only -k "multiscale and bf16"
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch

from bench.gate import Verdict, check_backward, check_forward
from bench.providers import PROVIDERS, get_provider, provider_dtype, provider_layouts, why_not_here
from bench.timing import CPU_THREADS, backward_call, measure, record
from bench.workloads import DIRECTIONS, WORKLOADS, Inputs, Workload

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Row:
    """One line of the result table."""

    workload: Workload
    direction: str
    provider: str
    dtype: torch.dtype
    layout: str

    @property
    def measured_dtype(self) -> torch.dtype:
        """The dtype that the provider can do, where it is not the one asked for."""
        return provider_dtype(self.provider, self.workload.op, self.dtype)

    def labels(self) -> dict[str, str]:
        """The columns that name the row."""
        return {
            "op": self.workload.op,
            "direction": self.direction,
            "workload": self.workload.name,
            "dtype": DTYPE_NAMES[self.dtype],
            "measured_dtype": DTYPE_NAMES[self.measured_dtype],
            "provider": self.provider,
            "layout": self.layout,
            "device": DEVICE,
        }

    def __str__(self) -> str:
        label = self.labels()
        return "-".join(label[k] for k in ("op", "direction", "workload", "dtype", "provider", "layout"))


def rows() -> Iterator[Row]:
    """Every row for this machine: the `gpu` workloads where there is a GPU, else the `cpu` ones."""
    suite = "gpu" if DEVICE == "cuda" else "cpu"
    for workload in (w for w in WORKLOADS if w.suite == suite):
        for direction in DIRECTIONS[workload.op]:
            for dtype in workload.dtypes:
                for provider in PROVIDERS:
                    for layout in provider_layouts(provider, workload.op):
                        yield Row(workload, direction, provider, dtype, layout)


@pytest.fixture(autouse=True)
def _steady_machine() -> Iterator[None]:
    """Few threads while a row runs, no garbage of the last row left for the next."""
    threads = torch.get_num_threads()
    torch.set_num_threads(CPU_THREADS)
    yield
    torch.set_num_threads(threads)
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


@pytest.mark.parametrize("row", list(rows()), ids=str)
def test_op(row: Row, benchmark) -> None:  # noqa: ANN001
    """Check a provider's result, then time it."""
    reason = why_not_here(row.provider, row.workload.op, DEVICE)
    if reason is not None:
        benchmark.skipped = True
        pytest.skip(reason)
    label = row.labels()
    benchmark.group = " ".join(label[k] for k in ("op", "direction", "workload", "dtype"))
    inputs = row.workload.build(DEVICE, row.measured_dtype, row.layout, grad=row.direction == "backward")
    try:
        call, verdict = prepare(row, inputs)
        if benchmark.disabled:  # --benchmark-disable: the gate alone
            benchmark.skipped = True
            return
        samples = measure(call, DEVICE)
    except _baseline_failures(row.provider) as error:
        benchmark.skipped = True
        pytest.skip(f"{row.provider} cannot run this: {type(error).__name__}: {error}")
    record(
        benchmark,
        samples,
        **label,
        shapes=inputs.shapes(),
        error=verdict.error,
        tolerance=verdict.tolerance,
        note=_note(row),
    )


def prepare(row: Row, inputs: Inputs) -> tuple[Callable[[], object], Verdict]:
    """The call to be timed, after its first result has passed the gate."""
    op, dtype = row.workload.op, row.measured_dtype
    provider = get_provider(row.provider, op)
    adapted = provider.adapt(inputs)
    checked = inputs if op == "label_anchors" else adapted
    if row.direction == "forward":
        with torch.no_grad():
            verdict = check_forward(op, checked, provider(adapted), dtype).require()
        return torch.no_grad()(lambda: provider(adapted)), verdict
    output = provider(adapted)
    torch.manual_seed(0)  # an incoming gradient that can be drawn again; in the layout of the output
    grad_output = torch.randn_like(output)
    call = backward_call(output, adapted.leaves, grad_output)
    return call, check_backward(op, checked, call(), grad_output, dtype).require()


def _baseline_failures(provider: str) -> tuple[type[Exception], ...]:
    """What a baseline may fail with without failing the run: no memory, or nothing to compile with."""
    if provider == "triton":
        return ()
    failures: tuple[type[Exception], ...] = (torch.cuda.OutOfMemoryError,)
    if provider == "torch.compile":
        from torch._dynamo.exc import TorchDynamoException

        failures += (TorchDynamoException,)
    return failures


def _note(row: Row) -> str:
    if row.measured_dtype == row.dtype:
        return ""
    asked, measured = DTYPE_NAMES[row.dtype], DTYPE_NAMES[row.measured_dtype]
    return f"has no {asked}: measured in {measured}, as under autocast, casts not counted"
