"""The two memory formats of [B, C, H, W] tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_channels_last(tensors: Sequence[Tensor]) -> bool:
    """One layout serves all; a single channel is both, and counts as contiguous."""
    return tensors[0].shape[1] > 1 and all(t.is_contiguous(memory_format=torch.channels_last) for t in tensors)


def layout(channels_last: bool) -> torch.memory_format:
    """The memory format of a [B, C, H, W] tensor."""
    return torch.channels_last if channels_last else torch.contiguous_format
