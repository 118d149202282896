"""Several layers of one input as one product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MULTIPLE = 8
"""Tensor cores read rows of 16 bytes, eight channels of a half type; with 3 or 91 of them the libraries fall back."""


class Joined(nn.Module):
    """Linear layers, or 1x1 convolutions, as one: the input is read once, and by a product that is not so thin.

    The layers stay where they are, with their own names and weights; this module has none.
    """

    def forward(self, x: Tensor, *layers: nn.Linear | nn.Conv2d) -> list[Tensor]:
        """What each layer makes of x, [N, C] or [B, C, H, W]: views of one tensor, its channels a multiple of 8.

        Only products in half types are padded: in fp32 it would gain nothing.
        """
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        sizes = [layer.weight.shape[0] for layer in layers]
        weight = torch.cat([layer.weight for layer in layers])
        bias = torch.cat([layer.bias for layer in layers])
        rows = -sum(sizes) % MULTIPLE if dtype in (torch.bfloat16, torch.float16) else 0
        if rows:
            weight = F.pad(weight, (0, 0) * (weight.ndim - 1) + (0, rows))
            bias = F.pad(bias, (0, rows))
        out = F.linear(x, weight, bias) if weight.ndim == 2 else F.conv2d(x, weight, bias)
        return list(out.split([*sizes, rows], dim=1))[: len(sizes)]
