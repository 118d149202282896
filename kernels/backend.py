"""Which implementation of an op runs: per call (`backend=`) or for a block of code (`use_backend`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .runtime import HAS_TRITON, INTERPRETED, is_recording

BACKENDS = ("auto", "triton", "torch", "torchvision")
"""`auto` picks one; `triton` are this project's kernels; `torch` is the plain PyTorch reference; `torchvision`
is torchvision's own op, or, where it has none, the way its detection models compute the same thing."""

# Looked up once: torch.compile, which traces the choice of a backend, cannot trace the search for a package.
_HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None

_default = "auto"


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Let every op called with `backend="auto"` inside the block use `backend`. Not thread-local.

    Raises:
        ValueError: `backend` is not one of `BACKENDS`.
    """
    global _default
    _check_name(backend)
    previous, _default = _default, backend
    try:
        yield
    finally:
        _default = previous


def choose_backend(backend: str, tensor: Tensor, on_cpu: str = "torch", on_gpu: str = "triton") -> str:
    """Resolve `backend` for an op whose main input is `tensor`: the name of the one to run, never "auto".

    `auto` is the enclosing `use_backend`, else `on_gpu` or `on_cpu`, whichever is right for that op there.

    Raises:
        ValueError: unknown name.
        RuntimeError: Triton was asked for and cannot run on that tensor, or torchvision is not installed.
    """
    _check_name(backend)
    backend = _default if backend == "auto" else backend
    if backend == "auto":
        chosen = on_gpu if tensor.is_cuda and HAS_TRITON and not INTERPRETED else on_cpu
        return chosen if chosen != "torchvision" or _HAS_TORCHVISION else "torch"
    if backend == "triton":
        _check_triton(tensor.device)
    if backend == "torchvision" and not _HAS_TORCHVISION:
        raise RuntimeError("backend='torchvision' needs the torchvision package, which is not installed")
    return backend


def _check_name(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")


def _check_triton(device: torch.device) -> None:
    if not HAS_TRITON:
        raise RuntimeError("backend='triton' needs the triton package, which is not installed")
    if is_recording():
        return  # nothing will run
    if INTERPRETED and device.type != "cpu":
        raise RuntimeError("TRITON_INTERPRET=1 runs the kernels on the CPU: move the tensors there or unset it")
    if not INTERPRETED and device.type != "cuda":
        raise RuntimeError(
            f"the Triton kernels need CUDA tensors, these are on {device}; to run the kernels on a CPU "
            "(slowly, for tests) set TRITON_INTERPRET=1 before Python starts"
        )
