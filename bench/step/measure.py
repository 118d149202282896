"""Steps measured: in rounds of blocks, their phases, memory, waits and trace.

A block is some steps back to back, without a wait between them: what a training loop does. It begins and ends on an
idle device, so that its wall time over its steps is the time a step takes, dispatch included; device events between
the steps say how they vary. Rounds go through the providers A B, B A, A B, ...: drift of the clocks hits both alike.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ..step_profile.phases import PREFIX, STEP
from ..timing import steady
from .kernels_in_trace import read_trace_file
from .phases import PhaseClock

Step = Callable[[], object]
BLOCK_SECONDS, ROUNDS = 0.4, 8  # on a GPU: over 3 s of each provider
PHASE_STEPS, TRACED_STEPS = 5, 3


@dataclass
class Samples:
    """Of one provider: seconds a step of each block, milliseconds of each step between two events."""

    blocks: list[float] = field(default_factory=list)
    steps_ms: list[float] = field(default_factory=list)
    seconds: float = 0.0  # of all blocks together
    steps: int = 0

    def add(self, seconds: float, steps_ms: list[float]) -> None:
        """A block."""
        self.blocks.append(seconds / len(steps_ms))
        self.steps_ms += steps_ms
        self.seconds += seconds
        self.steps += len(steps_ms)

    def describe(self) -> dict:
        """As the record keeps them."""
        return {
            "block_seconds": self.blocks,
            "steps": self.steps,
            "seconds": self.seconds,
            "step_ms": dict(zip(("p5", "p50", "p95"), np.quantile(self.steps_ms, [0.05, 0.5, 0.95]), strict=True)),
        }


def measure_rounds(
    steps: Mapping[str, Step], on_gpu: bool, waiting: bool = False, rounds: int | None = None
) -> dict[str, Samples]:
    """Samples of each step; `waiting` for the result of each before the next begins: a latency.

    The steps have been warmed up.
    """
    rounds = rounds or (ROUNDS if on_gpu else 3)
    result = {name: Samples() for name in steps}
    with steady():
        lengths = {name: _block_length(step, on_gpu) for name, step in steps.items()}
        for number in range(rounds):
            for name in list(steps)[:: 1 if number % 2 == 0 else -1]:
                result[name].add(*_block(steps[name], lengths[name], on_gpu, waiting))
    return result


def _block_length(step: Step, on_gpu: bool) -> int:
    if not on_gpu:
        return 1
    seconds, _ = _block(step, 2, on_gpu, waiting=False)
    return max(2, round(BLOCK_SECONDS / (seconds / 2)))


def _block(step: Step, length: int, on_gpu: bool, waiting: bool) -> tuple[float, list[float]]:
    """(wall seconds of the block, milliseconds of each step)."""
    if not on_gpu or waiting:
        walls = [_wall(step, on_gpu) for _ in range(length)]
        return sum(walls), [1e3 * wall for wall in walls]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(length + 1)]
    torch.cuda.synchronize()
    start = time.perf_counter()
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, [a.elapsed_time(b) for a, b in pairwise(events)]


def _wall(step: Step, on_gpu: bool) -> float:
    start = time.perf_counter()
    step()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_phases(step: Step, clock: PhaseClock) -> dict[str, float]:
    """Median milliseconds of each phase, a step at a time: the next does not begin before the last has ended."""
    found: dict[str, list[float]] = {}
    for _ in range(PHASE_STEPS if clock.on_gpu else 2):
        step()
        for name, milliseconds in clock.milliseconds().items():
            found.setdefault(name, []).append(milliseconds)
    return {name: float(np.median(values)) for name, values in found.items()}


class Memory:
    """Bytes of the GPU's allocator beyond those that were there before; nothing on a CPU, where nobody counts."""

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            self.allocated, self.reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
            torch.cuda.reset_peak_memory_stats()

    def restart(self) -> None:
        """Forget the peak so far: the first call's, of a compiler that tries things out."""
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> dict[str, int]:
        """Since the last restart."""
        if not self.on_gpu:
            return {}
        torch.cuda.synchronize()
        return {
            "allocated_bytes": torch.cuda.max_memory_allocated() - self.allocated,
            "reserved_bytes": torch.cuda.max_memory_reserved() - self.reserved,
        }


def count_waits(step: Step, on_gpu: bool) -> int | None:
    """How often PyTorch says that a step makes the host wait; None without a GPU."""
    if not on_gpu:
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def trace_steps(step: Step, on_gpu: bool, keep: Path | None = None) -> dict:
    """What the profiler sees of `TRACED_STEPS` steps; `keep` the trace there. Nothing without a GPU."""
    if not on_gpu:
        return {}
    torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = keep or Path(folder) / "trace.json.gz"
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
            for _ in range(TRACED_STEPS):
                with record_function(PREFIX + STEP):
                    step()
                torch.cuda.synchronize()
        profiler.export_chrome_trace(str(path))
        return read_trace_file(path)
