"""Every kernel test runs with uninitialised memory full of NaN, so that an output left unwritten is seen."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._device import _device_constructors

import kernels  # noqa: F401  # PyTorch's compiler, which it imports, looks its functions up by identity: before the patch

_device_constructors()  # likewise, and it remembers what it found: `torch.device` as a context would miss torch.empty


def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`allocate`, its result filled with NaN or the largest integer; tensors without memory of their own excepted."""

    def allocate_and_fill(*args, **kwargs) -> Tensor:
        out = allocate(*args, **kwargs)
        if type(out) is Tensor and not out.is_meta:  # FakeTensor and other traced tensors are subclasses
            with torch.no_grad():
                out.fill_(worst(out.dtype))
        return out

    return allocate_and_fill


def worst(dtype: torch.dtype) -> float | int | bool:
    """What a test should not take for a result."""
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).max


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every place where the ops allocate. (PyTorch's own switch for it comes with deterministic mode, which changes
    the backend that "auto" picks.)"""
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))
