"""Argument checks shared by the ops: each says what was wrong and what is wanted."""

from __future__ import annotations

import torch
from torch import Tensor

from .runtime import DEBUG, is_recording

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(value: object, name: str, ndim: int, last: int | None = None) -> Tensor:
    """Return `value` if it is a floating tensor of `ndim` dimensions (the last of size `last`).

    Raises:
        TypeError: not a tensor, or not fp16, bf16, fp32 or fp64.
        ValueError: wrong shape.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.ndim != ndim or (last is not None and value.shape[-1] != last):
        wanted = f"{ndim} dimensions" + ("" if last is None else f", the last of size {last}")
        raise ValueError(f"{name} must have {wanted}, got shape {tuple(value.shape)}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}")
    return value


def check_same_device(**tensors: Tensor) -> None:
    """Raise ValueError unless all tensors are on one device."""
    devices = {name: t.device for name, t in tensors.items()}
    if len(set(devices.values())) > 1:
        raise ValueError(
            "all tensors must be on one device, got " + ", ".join(f"{k} on {v}" for k, v in devices.items())
        )


def check_indices(indices: Tensor, end: int, name: str, negative: bool = False) -> None:
    """Raise IndexError for an index outside [0, end), or, if `negative`, from `end` on; on the CPU, or with
    TRITON_DEBUG=1 anywhere.

    On a GPU the check stops the device; without it the kernels still never address outside their tensors, and each op's
    docstring says what an index out of range gives. Nor are the indices looked at while launches are recorded: nothing
    will read them, and CPU tensors then stand for a GPU's.
    """
    if (
        (indices.device.type != "cpu" and not DEBUG)
        or indices.numel() == 0
        or torch.compiler.is_compiling()
        or is_recording()
    ):
        return
    low, high = (indices.clamp(min=0) if negative else indices).min().item(), indices.max().item()
    if not (low >= 0 and high < end):  # written so that NaN fails
        raise IndexError(f"{name} must lie in [0, {end}), got {low:g} to {high:g}")


def pair(value: int | tuple[int, int], name: str) -> tuple[int, int]:
    """`value` as (height, width), both at least 1; raises ValueError otherwise."""
    sides = (value, value) if isinstance(value, int) else value
    if not isinstance(sides, (tuple, list)) or len(sides) != 2 or not all(isinstance(s, int) and s > 0 for s in sides):
        raise ValueError(f"{name} must be a positive integer or two of them, got {value!r}")
    return sides[0], sides[1]
