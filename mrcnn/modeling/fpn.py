"""Feature pyramid network (arXiv:1612.03144): C2..C5 -> P2..P5 or P6."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from .backbone import NORMS


class FPN(nn.Module):
    """Lateral 1x1 convolutions, a top-down path of nearest-neighbour upsampling, a 3x3 convolution on every level.

    Each convolution is a torchvision Conv2dNormActivation without activation, as in torchvision's own pyramid.

    Args:
        in_channels: of C2..C5.
        channels: of every P.
        norm: none, bn, sync_bn or gn, after every convolution.
        levels: 4 ends with P5; 5 adds P6, every second cell of P5, which only the RPN looks at.
    """

    def __init__(self, in_channels: Sequence[int], channels: int, norm: str = "none", levels: int = 5) -> None:
        super().__init__()
        options = {"norm_layer": NORMS[norm], "activation_layer": None}
        self.lateral = nn.ModuleList(Conv2dNormActivation(c, channels, 1, padding=0, **options) for c in in_channels)
        self.output = nn.ModuleList(Conv2dNormActivation(channels, channels, 3, **options) for _ in in_channels)
        self.levels = levels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """C2..C5, [B, c_l, H_l, W_l] -> P2..P5 or P6, [B, channels, H_l, W_l]; P6 has half of P5's sides, rounded up.

        A map is upsampled to the size of the one below it, which need not be twice its own: images of any size work.
        """
        laterals = [conv(c) for conv, c in zip(self.lateral, features, strict=True)]
        merged = [laterals[-1]]
        for lateral in reversed(laterals[:-1]):
            merged.insert(0, lateral + F.interpolate(merged[0], size=lateral.shape[-2:], mode="nearest"))
        pyramid = [conv(m) for conv, m in zip(self.output, merged, strict=True)]
        if self.levels == len(pyramid):
            return pyramid
        return [*pyramid, F.max_pool2d(pyramid[-1], kernel_size=1, stride=2)]
