"""One provider: made, warmed up, measured beside its rival, and all that is said of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..verdicts import noise_floor
from .clocks import ClockSampler
from .measure import Memory, count_waits, measure_phases, measure_rounds, trace_steps
from .phases import PhaseClock
from .providers import CHECK, INFERENCE, LOADER, Provider, make_step, top
from .record import FAILED, OK, RED
from .workload import Workload

WARMUP = {"cuda": 8, "cpu": 1}  # steps after the first: a graph is captured on the fourth or so
MOST_WARMUP = 32  # further steps, of those that still compile
LOSS_TOLERANCE = 0.1  # relative, of a loss beside torchvision's in fp32: samples are random, and the dtype is another
TWIN = "twin"


@dataclass
class Measured:
    """A provider that is ready to be measured."""

    provider: Provider
    step: Callable[[], Any]
    clock: PhaseClock
    images: int
    found: dict[str, Any] = field(default_factory=dict)  # what making it showed


def measure_provider(
    provider: Provider, workload: Workload, rival: Measured | None, seconds: float, twin: bool = False
) -> dict[str, Any]:
    """The row of a provider: status, and what was measured or why it was not."""
    try:
        if provider.group == CHECK:
            return _check(workload, seconds)
        if provider.group == LOADER:
            return {"status": OK, "reason": ""} | _loader(provider, workload)
        return _measure(prepare(provider, workload), workload, rival, twin)
    except Exception as error:  # of a compiler, a capture, a missing part: the row says so, the others go on
        text = " ".join(str(error).split())[:300] or "no message"
        out_of_memory = isinstance(error, torch.OutOfMemoryError)
        return {"status": FAILED, "reason": f"{type(error).__name__}: {text}", "out_of_memory": out_of_memory}


def prepare(provider: Provider, workload: Workload) -> Measured:
    """Make a provider and warm it up."""
    on_gpu = workload.device.type == "cuda"
    clock, notes, memory = PhaseClock(on_gpu), [], Memory(on_gpu)
    counters = torch._dynamo.utils.counters
    counters.clear()
    torch.manual_seed(0)
    step, images = _make(provider, workload, clock, notes.append)
    found: dict[str, Any] = {"counts": step.counts()} if hasattr(step, "counts") else {}
    start = time.perf_counter()
    result = step()
    if on_gpu:
        torch.cuda.synchronize()
    found["first_call_seconds"] = time.perf_counter() - start
    found |= _describe_result(result)
    memory.restart()
    for _ in range(WARMUP[workload.device.type]):
        step()
    for _ in range(MOST_WARMUP if on_gpu else 0):  # shapes that depend on data: until nothing is compiled any more
        compiled = _graphs_compiled()
        step()
        if _graphs_compiled() == compiled:
            break
    found |= {"memory": memory.peak(), "mode": getattr(step, "mode", "eager"), "notes": list(dict.fromkeys(notes))}
    if provider.compiles or found["mode"] != "eager":
        breaks, graphs = sum(counters["graph_break"].values()), counters["stats"].get("unique_graphs", 0)
        found |= {"graph_breaks": breaks, "graphs": graphs}
    return Measured(provider, step, clock, images, found)


def _graphs_compiled() -> int:
    return torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)


def _make(
    provider: Provider, workload: Workload, clock: PhaseClock, on_note: Callable[[str], None]
) -> tuple[Callable[[], Any], int]:
    if provider.group != INFERENCE:
        return make_step(provider, workload, clock, on_note), workload.setting.batch
    from .inference import OurInference
    from .torchvision_baseline import TorchvisionInference

    if "how" in provider.options:
        return OurInference(workload, on_note=on_note, **provider.options), provider.options["images"]
    return TorchvisionInference(workload, **provider.options), provider.options["images"]


def _describe_result(result: Any) -> dict[str, Any]:
    """Losses of a training step; of inference the numbers of detections, the shares of pixels in masks."""
    if isinstance(result, dict):
        return {"losses": {name: float(loss) for name, loss in result.items()}}
    return {"detections": [len(image["labels"]) for image in result]}


def _measure(measured: Measured, workload: Workload, rival: Measured | None, twin: bool) -> dict[str, Any]:
    on_gpu, provider = workload.device.type == "cuda", measured.provider
    row = measured.found | _judge(measured.found, workload)
    if row["status"] == RED:
        return row
    steps = {provider.name: measured.step}
    if rival is not None:
        steps[rival.provider.name] = rival.step
    if twin or rival is None:
        steps[TWIN] = measured.step
    waiting = provider.group == INFERENCE and measured.images == 1
    compiled = _graphs_compiled()
    with ClockSampler(on_gpu) as clocks:
        samples = measure_rounds(steps, on_gpu, waiting)
    row["compiled_while_measured"] = _graphs_compiled() - compiled  # 0, or compilation is in the time
    own = samples[provider.name]
    row |= own.describe() | {"images": measured.images, "clock": clocks.summary}
    row["images_per_second"] = measured.images * own.steps / own.seconds
    row["seconds_per_step"] = float(np.median(own.blocks))
    if TWIN in samples:
        row["noise"] = noise_floor(own.blocks, samples[TWIN].blocks)
    if rival is not None:
        other = samples[rival.provider.name]
        row["reference"] = {"name": rival.provider.name, "block_seconds": other.blocks, "images": rival.images}
    row["phases_ms"] = measure_phases(measured.step, measured.clock)
    row["waits"] = count_waits(measured.step, on_gpu)
    row["trace"] = trace_steps(measured.step, on_gpu)
    return row


def _judge(found: dict[str, Any], workload: Workload) -> dict[str, Any]:
    """Whether it does the same work: finite losses, near those of torchvision in fp32."""
    losses, expected = found.get("losses"), workload.described.get("losses")
    if losses is None:
        return {"status": OK, "reason": ""}
    if not np.isfinite(list(losses.values())).all():
        return {"status": RED, "reason": f"a loss is not finite: {losses}"}
    if expected is None:
        return {"status": OK, "reason": ""}
    ratios = {name: losses[name] / value if value else float(losses[name] == value) for name, value in expected.items()}
    far = [name for name, ratio in ratios.items() if abs(ratio - 1) > LOSS_TOLERANCE]
    return {"status": OK, "reason": "", "loss_ratios": ratios, "far_losses": far}


def _check(workload: Workload, seconds: float) -> dict[str, Any]:
    from .bitwise import check_in_process

    found = check_in_process(workload.device.type, seconds)
    reason = "" if found["equal"] else "the two differ"
    if workload.device.type == "cuda" and found["modes"] != ["compiled", "captured"]:
        reason = f"nothing was captured, so nothing was compared: {'; '.join(found['notes']) or found['modes']}"
    return {"status": RED if reason else OK, "reason": reason, "check": found}


def _loader(provider: Provider, workload: Workload) -> dict[str, Any]:
    from .loader_row import measure_loader, measure_with_step
    from .ours import Options, OurStep

    if provider.name == "loader alone":
        return measure_loader(workload)
    notes: list[str] = []
    options = Options(**top().options)
    if workload.device.type != "cuda":
        options = Options(**{**top().options, "ops": "torch"})
    step = OurStep(workload, PhaseClock(workload.device.type == "cuda"), options, notes.append, given=False)
    return measure_with_step(workload, step.on) | {"mode": step.mode, "notes": notes}
