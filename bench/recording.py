"""Rows of `measure` into pytest-benchmark, whose table, JSON, autosave and comparisons then all work."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

ROW: pytest.StashKey[dict] = pytest.StashKey()
"""On a test item: the row that it measured."""


def record(benchmark: BenchmarkFixture, row: dict, time: str) -> None:
    """Make the samples of `time` the benchmark's own and keep the whole row in `extra_info`.

    `_make_stats` and `_mode` are private: `tests/bench/test_suite.py` fails if they change.
    """
    benchmark._mode = "device samples"  # otherwise the fixture warns that it was never used
    benchmark.extra_info.update(row, time=time)
    stats = benchmark._make_stats(1)
    for seconds in row["times"][time]:
        stats.update(seconds)
