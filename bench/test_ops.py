"""The suite, carried by pytest-benchmark: one row a call (op, direction, workload, dtype) and provider.

python -m pytest bench --benchmark-only --benchmark-json=RESULTS.json
python -m pytest bench --benchmark-only -k "multiscale and bf16 and train" --time op_eager

All providers of a call are measured together, in interleaved rounds, when the first of its rows is asked for; each
row then hands its own samples to pytest-benchmark. Select providers with care: a row alone is measured with all.
"""

from __future__ import annotations

import functools
import gc

import pytest
import torch

from bench.measure import add_floors, measure_call
from bench.providers import Variant, is_ours, variants
from bench.recording import ROW, record
from bench.workloads import Call, calls

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = [(call, variant) for call in calls(DEVICE) for variant in variants(call)]


def _name(value: object) -> str:
    return str(value).replace(" ", "-")


@functools.lru_cache(maxsize=1)  # pytest asks row by row, and a call's rows stand together
def _measured(call: Call, seconds: float | None) -> dict[Variant, dict]:
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    rows = measure_call(call, DEVICE, seconds)
    add_floors(call, rows)
    return dict(zip(variants(call), rows, strict=True))


@pytest.mark.parametrize(("call", "variant"), ROWS, ids=_name)
def test_op(call: Call, variant: Variant, benchmark, request: pytest.FixtureRequest) -> None:  # noqa: ANN001
    """A row; `--benchmark-disable` checks without timing.

    Ours fails the test where it is red or failed. A baseline that is wrong or cannot run is a finding: it is skipped.
    """
    row = _measured(call, 0 if benchmark.disabled else None)[variant]
    request.node.stash[ROW] = row
    benchmark.group = str(call)
    benchmark.skipped = row["status"] != "ok" or benchmark.disabled
    if row["status"] != "ok":
        finish = pytest.fail if is_ours(variant.provider) and row["status"] != "skipped" else pytest.skip
        finish(f"{row['status']}: {row['reason']}")
    if not benchmark.disabled:
        record(benchmark, row, request.config.getoption("time"))
