"""ResNet (arXiv:1512.03385) giving C2..C5, and the feature pyramid (arXiv:1612.03144) giving P2..P6."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "bn": nn.BatchNorm2d,
    "frozen_bn": FrozenBatchNorm2d,
    "gn": functools.partial(nn.GroupNorm, 32),
}
BACKBONES = ("resnet18", "resnet50")


class ResNet(nn.Module):
    """torchvision's ResNet without its classifier."""

    def __init__(self, name: str, norm: str) -> None:
        super().__init__()
        if name not in BACKBONES:
            raise ValueError(f"unknown backbone {name!r}; choose one of {', '.join(BACKBONES)}")
        if norm not in NORMS:
            raise ValueError(f"unknown norm {norm!r}; choose one of {', '.join(NORMS)}")
        net = getattr(torchvision.models, name)(weights=None, norm_layer=NORMS[norm])
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.stages = nn.ModuleList([net.layer1, net.layer2, net.layer3, net.layer4])
        self.out_channels = [net.fc.in_features // 2**i for i in (3, 2, 1, 0)]

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W] -> C2..C5, [B, c_l, H / 2**l, W / 2**l] for l = 2..5."""
        x = self.stem(images)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


class FPN(nn.Module):
    """Lateral 1x1 convolutions, a top-down path of nearest-neighbour upsampling, a 3x3 convolution on every level."""

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels)
        for conv in [*self.lateral, *self.output]:
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """C2..C5 -> P2..P6, all with the same number of channels; P6 is every second cell of P5."""
        laterals = [conv(c) for conv, c in zip(self.lateral, features, strict=True)]
        merged = [laterals[-1]]
        for lateral in reversed(laterals[:-1]):
            merged.insert(0, lateral + F.interpolate(merged[0], size=lateral.shape[-2:], mode="nearest"))
        pyramid = [conv(m) for conv, m in zip(self.output, merged, strict=True)]
        return [*pyramid, F.max_pool2d(pyramid[-1], kernel_size=1, stride=2)]
