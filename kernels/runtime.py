"""Whether Triton is here, how it runs, and the one door through which every kernel is launched."""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

HAS_TRITON = importlib.util.find_spec("triton") is not None
DEBUG = os.environ.get("TRITON_DEBUG", "0") == "1"  # Triton's own switch for its device-side assertions
# Triton reads the variable when it is imported, so it must be set before Python imports triton.
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"

# torch.library names are global to the process: a copy of this folder under another name needs its own.
NAMESPACE = __package__.replace(".", "_")

launch_counts: Counter[str] = Counter()
"""Launches of each Triton kernel by name since the process began (or since `launch_counts.clear()`)."""


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded instead of made: what Triton would have been called with."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple
    meta: dict[str, Any]


_recorded: list[Launch] | None = None


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Collect what the ops inside the block would launch, on any device; nothing runs, their outputs are garbage.

    Kernels can so be compiled for GPUs that are not there exactly as the ops launch them, where a list of
    signatures kept by hand would one day check kernels that nobody launches. Not thread-local: autograd runs a
    GPU's backward in a thread of its own.
    """
    global _recorded
    previous, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = previous


def is_recording() -> bool:
    """Whether launches are being recorded instead of made."""
    return _recorded is not None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, device: torch.device, **meta: Any) -> None:
    """Launch `kernel` over `grid` on `device` and count it; an empty grid launches nothing.

    Triton launches on the current CUDA device, which need not be the tensors' own. Fused multiply-adds are off
    unless asked for: they round once where the reference rounds twice, which can move a label, or turn a bin of
    exactly 2 cells into 2.0000002 and its adaptive grid from 2 samples to 3.
    """
    meta.setdefault("enable_fp_fusion", False)
    if 0 in grid:
        return
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, meta))
        return
    launch_counts[kernel.__name__] += 1
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        with torch.cuda.device(device):
            kernel[grid](*args, **meta)
    else:
        kernel[grid](*args, **meta)


def is_traced(*tensors: Tensor) -> bool:
    """Whether someone is watching or stands in for the operators: torch.compile, export, jit, functorch, fake tensors.

    They see an op that is registered with torch.library; to the eager rest, that is only overhead.
    """
    return (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or any(type(t) not in (Tensor, Parameter) for t in tensors)
    )


def tile(on_gpu: int, interpreted: int) -> int:
    """Block size: the interpreter pays per program and per operation, not per element, so it wants big tiles."""
    return interpreted if INTERPRETED else on_gpu


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least `n` (>= 1): Triton's block sizes have to be powers of two."""
    return 1 << max(n - 1, 0).bit_length()
