"""Which implementation of an op runs: per call (`backend=`) or for a block of code (`use_backend`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .runtime import HAS_TRITON, INTERPRETED, is_recording

BACKENDS = ("auto", "triton", "torch", "torchvision")
"""`auto` picks one; `triton` are this project's kernels; `torch` is the plain PyTorch reference; `torchvision`
is torchvision's own op, or, where it has none, the way its detection models compute the same thing."""

OPS = (
    *("roi_align", "box_iou", "label_anchors", "rpn_loss", "stable_topk", "decode_proposals", "nms"),
    *("mask_targets", "mask_predictor_loss", "mask_bce_loss", "paste_masks"),
)
"""Names by which `use_backend` tells the ops apart; variants of one op share its name: all RoIAligns are roi_align."""

# Looked up once: torch.compile, which traces the choice of a backend, cannot trace the search for a package.
_HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None

_chosen: dict[str, str] = {}  # backend of each op that is not left to `auto`; that of all others under ""


@contextmanager
def use_backend(backend: str, *, only: Collection[str] | None = None) -> Iterator[None]:
    """Let every op called with `backend="auto"` inside the block use `backend`. Not thread-local.

    Args:
        backend: one of `BACKENDS`.
        only: the ops, of `OPS`, that this is about, by default all; the others keep what an enclosing block says.

    Raises:
        ValueError: an unknown backend or op.
    """
    global _chosen
    _check_name(backend)
    only = (only,) if isinstance(only, str) else only
    if unknown := [op for op in only or () if op not in OPS]:
        raise ValueError(f"unknown op {unknown[0]!r}; only= takes {', '.join(OPS)}")
    previous = _chosen
    _chosen = {"": backend} if only is None else previous | dict.fromkeys(only, backend)
    try:
        yield
    finally:
        _chosen = previous


def choose_backend(backend: str, tensor: Tensor, op: str = "", *, on_cpu: str = "torch", on_gpu: str = "triton") -> str:
    """Resolve `backend` for `op`, whose main input is `tensor`: the name of the one to run, never "auto".

    `auto` is the enclosing `use_backend`, else `on_gpu` or `on_cpu`, whichever is right for that op there.

    Raises:
        ValueError: unknown name.
        RuntimeError: Triton was asked for and cannot run on that tensor, or torchvision is not installed.
    """
    _check_name(backend)
    backend = _chosen.get(op, _chosen.get("", "auto")) if backend == "auto" else backend
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
