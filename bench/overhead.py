"""Host time of one small RoIAlign call: what dispatch costs before a kernel can start.

| variant | what is called |
| --- | --- |
| public op | `kernels.roi_align`, with its argument checks, in eager mode |
| registered op | `kernels.roi_align.library.roi_align_forward`: torch.library's dispatcher and autograd, no checks |
| torchvision | `torchvision.ops.roi_align` |

One image, 8 RoIs, 256 channels, 7 x 7 bins, fp32; channels_last, for torchvision NCHW, its own layout. On a GPU the
kernels are launched, and a call ends when the host has enqueued them: it never waits for the device, which is idle when
a batch of calls begins. Without one the launches are recorded, not made: the times are then of our Python alone, and
torchvision, which would compute, is left out.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

import kernels
from kernels.roi_align.library import roi_align_forward
from kernels.runtime import record_launches

from .environment import describe_environment
from .timing import steady

CALLS = 2000
BATCH = 20  # calls between two waits for the device: fewer than its queue of launches holds
WARM_UP = 3  # batches
PASSES = ("forward", "forward + backward")


@dataclass(frozen=True)
class Overhead:
    """Microseconds that the host spends in a call: quartiles of `calls` of them."""

    what: str  # one of `PASSES`
    variant: str
    median: float
    q25: float
    q75: float
    calls: int


def measure_overhead(calls: int = CALLS) -> list[Overhead]:
    """Measure every variant, at least `calls` times, forward without gradients and forward with backward."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [
        found
        for what in PASSES
        for found in _measure(what, _variants(device, backward=what != "forward"), device, calls)
    ]


def _variants(device: str, backward: bool) -> dict[str, Callable[[], object]]:
    boxes = torch.tensor([[0.0, 16 * i, 8 * i, 16 * i + 200, 8 * i + 150] for i in range(8)], device=device)
    nchw = torch.zeros(1, 256, 50, 84, device=device)
    ours = nchw.contiguous(memory_format=torch.channels_last).requires_grad_(backward)
    options = ([7, 7], [1 / 16], 2, False, 224, 4, True, False)
    found = {
        "public op": _passes(ours, lambda: kernels.roi_align(ours, boxes, 7, 1 / 16, 2, backend="triton")),
        "registered op": _passes(ours, lambda: roi_align_forward([ours], [boxes], *options)[0]),
    }
    if device == "cuda":
        from torchvision.ops import roi_align

        theirs = nchw.requires_grad_(backward)
        found["torchvision"] = _passes(theirs, lambda: roi_align(theirs, boxes, 7, 1 / 16, 2))
    return found


def _passes(feature: Tensor, forward: Callable[[], Tensor]) -> Callable[[], object]:
    """The forward pass, and the backward pass behind it where `feature` wants a gradient."""
    if not feature.requires_grad:
        return torch.no_grad()(forward)
    channels_last = feature.is_contiguous(memory_format=torch.channels_last)
    grad_output = torch.ones(8, 256, 7, 7, device=feature.device).contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )
    return lambda: torch.autograd.grad(forward(), feature, grad_output)


def _measure(what: str, variants: dict[str, Callable[[], object]], device: str, calls: int) -> list[Overhead]:
    """In batches, in the order A B C, C B A, ...: whatever slows the host down hits all alike."""
    seconds = {name: [] for name in variants}
    rounds = WARM_UP + -(-calls // BATCH)
    with steady():
        for done in range(rounds):
            order = list(variants) if done % 2 == 0 else list(reversed(variants))
            for name in order:
                batch = _batch(variants[name], device)
                seconds[name] += batch if done >= WARM_UP else []
    return [_overhead(what, name, samples) for name, samples in seconds.items()]


def _batch(call: Callable[[], object], device: str) -> list[float]:
    on_gpu = device == "cuda"
    mode: AbstractContextManager = contextlib.nullcontext([]) if on_gpu else record_launches()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = []
    with mode as launches:
        for _ in range(BATCH):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
            launches.clear()  # they hold the tensors, whose memory the next call would reuse
    return seconds


def _overhead(what: str, variant: str, seconds: list[float]) -> Overhead:
    low, median, high = (round(1e6 * float(q), 2) for q in np.quantile(seconds, [0.25, 0.5, 0.75]))
    return Overhead(what, variant, median, low, high, len(seconds))


def overhead_json(found: list[Overhead], on_gpu: bool) -> str:
    """The figures and what they were measured on."""
    content = {"launches": "made" if on_gpu else "recorded", "rows": [asdict(row) for row in found]}
    return json.dumps({"environment": describe_environment(), **content}, indent=1)


def overhead_table(found: list[Overhead], on_gpu: bool) -> Table:
    """Microseconds by pass and variant."""
    note = "kernels launched; until the call returns" if on_gpu else "launches recorded, not made: our Python alone"
    table = Table(title="Host time a call, microseconds", caption=note, title_justify="left")
    for column in ("pass", "variant", "median", "25 %-75 %", "calls"):
        table.add_column(column, justify="left" if column in ("pass", "variant") else "right", no_wrap=True)
    for row in found:
        cells = (f"{row.median:.1f}", f"{row.q25:.1f} - {row.q75:.1f}", str(row.calls))
        table.add_row(row.what, row.variant, *cells)
    return table
