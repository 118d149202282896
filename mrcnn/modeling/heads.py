"""The box head and the mask head."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class BoxHead(nn.Module):
    """Two fully connected layers, then class logits and class-specific deltas."""

    def __init__(self, channels: int, pool_size: int, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.fc6 = nn.Linear(channels * pool_size**2, hidden)
        self.fc7 = nn.Linear(hidden, hidden)
        self.classes = nn.Linear(hidden, num_classes)
        self.deltas = nn.Linear(hidden, num_classes * 4)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """[K, C, 7, 7] -> class logits [K, classes] and deltas [K, classes, 4], fp32."""
        x = F.relu(self.fc6(pooled.flatten(1)))
        x = F.relu(self.fc7(x))
        return self.classes(x).float(), self.deltas(x).float().unflatten(1, (-1, 4))


class MaskHead(nn.Module):
    """Four 3x3 convolutions, a 2x2 deconvolution, one logit a class and pixel."""

    def __init__(self, channels: int, hidden: int, layers: int, num_classes: int) -> None:
        super().__init__()
        inputs = [channels, *[hidden] * (layers - 1)]
        self.convs = nn.ModuleList(nn.Conv2d(c, hidden, 3, padding=1) for c in inputs)
        self.deconv = nn.ConvTranspose2d(hidden, hidden, 2, stride=2)
        self.logits = nn.Conv2d(hidden, num_classes, 1)
        for conv in [*self.convs, self.deconv, self.logits]:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(conv.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """[K, C, 14, 14] -> logits [K, classes, 28, 28]."""
        x = pooled
        for conv in self.convs:
            x = F.relu(conv(x))
        return self.logits(F.relu(self.deconv(x)))
