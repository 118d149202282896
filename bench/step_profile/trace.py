"""From the events of a Chrome trace to phases and waits."""

from __future__ import annotations

import gzip
import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .phases import OTHER, PREFIX, STEP, UPDATE, WAIT

# Calls of the CUDA runtime that return when the device has done something.
WAITING_CALLS = (
    "cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cudaMemcpy2D", "cudaFree",
)  # fmt: skip
# Operators that need a value, or the number of their results, on the host. On a CPU they wait for nothing.
SCALAR = "aten::_local_scalar_dense"
WAITING_OPERATORS = (
    SCALAR, "aten::nonzero", "aten::equal", "aten::masked_select", "aten::bincount",
    "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "torchvision::nms",
)  # fmt: skip


@dataclass(frozen=True)
class Phase:
    """Means of the profiled steps; seconds."""

    name: str
    host: float
    device: float | None  # sum of its kernels and copies; None without a GPU
    kernels: float | None  # launched on the device, copies aside
    waits: float


def read_events(trace: Path) -> list[dict]:
    """The events of a Chrome trace that have a duration."""
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        return [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]


def read_trace(events: list[dict], on_gpu: bool) -> tuple[float, list[Phase], dict[str, float]]:
    """(seconds a step, phases, waits by "phase: what") from a trace's events, whose times are microseconds.

    What the device does belongs to the phase in which the host launched it; what another thread does, as the backward
    of a GPU, to the phase that the main thread is in.
    """
    clock = _Clock(events)
    waits = Counter(_waits(events, clock, on_gpu))
    device, kernels = _device_work(events, clock)
    phases = [
        Phase(
            name,
            host / clock.steps / 1e6,
            device[name] / clock.steps / 1e6 if on_gpu else None,
            kernels[name] / clock.steps if on_gpu else None,
            sum(count for (phase, _), count in waits.items() if phase == name) / clock.steps,
        )
        for name, host in clock.host.items()
    ]
    by_place = {f"{phase}: {what}": count / clock.steps for (phase, what), count in waits.most_common()}
    return clock.total / clock.steps / 1e6, phases, by_place


class _Clock:
    """Which phase it is at a time of the host."""

    def __init__(self, events: list[dict]) -> None:
        ours = [e for e in events if e.get("cat") == "user_annotation" and e["name"].startswith(PREFIX)]
        ours.sort(key=lambda e: e["ts"])
        self._steps = [e for e in ours if e["name"] == PREFIX + STEP]
        self._phases = [e for e in ours if e["name"] != PREFIX + STEP]
        self.steps = len(self._steps)
        self.total = sum(e["dur"] for e in self._steps)
        self.host: dict[str, float] = {}  # microseconds of each phase, in the order in which they come
        for event in self._phases:
            name = event["name"].removeprefix(PREFIX)
            self.host[name] = self.host.get(name, 0.0) + event["dur"]
        self.host[OTHER] = self.total - sum(self.host.values())

    def phase(self, time: float) -> str | None:
        """None outside the steps."""
        if (inside := _at(self._phases, time)) is not None:
            return inside["name"].removeprefix(PREFIX)
        return None if _at(self._steps, time) is None else OTHER


def _at(ranges: list[dict], time: float) -> dict | None:
    """The one of `ranges`, in order and apart from each other, that holds `time`."""
    place = bisect_right(ranges, time, key=lambda e: e["ts"]) - 1
    return ranges[place] if place >= 0 and time <= ranges[place]["ts"] + ranges[place]["dur"] else None


def _device_work(events: list[dict], clock: _Clock) -> tuple[Counter, Counter]:
    """Microseconds of kernels and copies, and the number of kernels, by the phase that launched them."""
    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    microseconds, kernels = Counter(), Counter()
    for event in events:
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        time = launched.get(event.get("args", {}).get("correlation"))
        phase = OTHER if time is None else clock.phase(time)
        if phase is not None:
            microseconds[phase] += event["dur"]
            kernels[phase] += event["cat"] == "kernel"
    return microseconds, kernels


def _waits(events: list[dict], clock: _Clock, on_gpu: bool) -> Iterator[tuple[str, str]]:
    """(phase, what) of everything inside the steps that waits for the device, or would on a GPU."""
    operators = [e for e in events if e.get("cat") == "cpu_op"]
    for event, what in (_device_waits if on_gpu else _would_be_waits)(events, operators):
        phase = clock.phase(event["ts"])
        # The wait at the end of a step is ours. A fused optimizer's counts of its steps are read on the host where it
        # runs on a CPU; a GPU has them in its memory, where its kernels read them.
        counts = not on_gpu and phase == UPDATE and what == SCALAR
        if phase not in (None, WAIT) and not counts:
            yield phase, what


def _device_waits(events: list[dict], operators: list[dict]) -> Iterator[tuple[dict, str]]:
    """Each call that waits for the device, with the innermost operator around it."""
    for event in events:
        if event.get("cat") == "cuda_runtime" and _call_name(event) in WAITING_CALLS:
            around = min((e for e in operators if _holds(e, event)), key=lambda e: e["dur"], default=None)
            yield event, f"{around['name']}, {_call_name(event)}" if around else _call_name(event)


def _would_be_waits(events: list[dict], operators: list[dict]) -> Iterator[tuple[dict, str]]:
    """Each operator that would wait on a GPU; those within another one are part of it."""
    waiting = [e for e in operators if e["name"] in WAITING_OPERATORS]
    for event in waiting:
        if not any(_holds(other, event) for other in waiting if other is not event):
            yield event, event["name"]


def _call_name(event: dict) -> str:
    """Without the version that CUPTI may add, as in cudaStreamSynchronize_v3020."""
    return re.sub(r"(_v\d+|_ptsz|_ptds)+$", "", event["name"])


def _holds(outer: dict, inner: dict) -> bool:
    """Whether `inner` happens within `outer`, on its thread."""
    return (
        outer["tid"] == inner["tid"]
        and outer["ts"] <= inner["ts"]
        and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]
    )
