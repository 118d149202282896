"""Device times of an eager call, fed into pytest-benchmark.

What is measured is `op_warm`: one eager call after warming up, caches (L2 included) as the previous call left
them. On a GPU a pair of events brackets each call, so that host dispatch counts only where the GPU has to wait
for it; on a CPU it is the wall clock. Cold-cache and kernel-only times are other measurements with other names.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

MEASURES = "op_warm"
# With more, one busy neighbour on the machine makes every parallel region wait a scheduler's tick: times of
# 4, 8, 12 ms whatever the op costs. CPU times are there to exercise the harness, so steady beats quick.
CPU_THREADS = 1


@dataclass(frozen=True)
class Budget:
    """How long to go on: a number of samples that fits into `seconds`, within bounds."""

    seconds: float
    least: int
    most: int
    warm_up: int

    def samples(self, seconds_a_call: float) -> int:
        """Number of samples for calls of this length."""
        return max(self.least, min(self.most, int(self.seconds / max(seconds_a_call, 1e-9))))


BUDGETS = {"cuda": Budget(1.0, 30, 300, warm_up=5), "cpu": Budget(0.3, 10, 100, warm_up=2)}


@dataclass(frozen=True)
class Samples:
    """All samples, none thrown away, and the memory that one call needs beyond what was there before."""

    seconds: list[float]
    peak_memory_bytes: int | None  # None on a CPU, where PyTorch does not count


def measure(call: Callable[[], object], device: str) -> Samples:
    """Time `call` after warming it up."""
    budget = BUDGETS[device]
    for _ in range(budget.warm_up):
        call()
    clock = _cuda_samples if device == "cuda" else _cpu_samples
    count = budget.samples(min(clock(call, 3)))
    return Samples(clock(call, count), _peak_memory(call) if device == "cuda" else None)


def _cpu_samples(call: Callable[[], object], count: int) -> list[float]:
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def _cuda_samples(call: Callable[[], object], count: int) -> list[float]:
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    torch.cuda.synchronize()
    for start, end in pairs:  # no synchronisation in between: the host may run ahead, as it does in training
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def _peak_memory(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def backward_call(output: Tensor, leaves: tuple[Tensor, ...], grad_output: Tensor) -> Callable[[], object]:
    """A call that runs only the backward pass, over a forward pass that is kept."""

    def call() -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, leaves, grad_output, retain_graph=True)

    return call


def record(benchmark: BenchmarkFixture, samples: Samples, **extra_info: object) -> None:
    """Hand samples taken elsewhere to pytest-benchmark, whose table, JSON and comparisons then all work.

    `_make_stats` and `_mode` are private: `tests/bench/test_timing.py` fails if they change.
    """
    benchmark._mode = "device samples"  # otherwise the fixture warns that it was never used
    benchmark.extra_info.update(extra_info, measures=MEASURES, peak_memory_bytes=samples.peak_memory_bytes)
    stats = benchmark._make_stats(1)
    for seconds in samples.seconds:
        stats.update(seconds)
