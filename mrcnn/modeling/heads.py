"""The box head and the mask head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from ..config import ModelConfig
from .backbone import NORMS
from .joined import Joined


def conv_layers(channels: int, hidden: int, layers: int, norm: str) -> nn.Sequential:
    """`layers` 3x3 convolutions, each with its norm and a ReLU."""
    inputs = [channels, *[hidden] * (layers - 1)] if layers else []
    convs = nn.Sequential(*(Conv2dNormActivation(c, hidden, 3, norm_layer=NORMS[norm]) for c in inputs))
    init_relu(convs)
    return convs


def init_relu(module: nn.Module) -> None:
    """He initialisation of the convolutions inside `module`, biases 0 (arXiv:1502.01852)."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class BoxHead(nn.Module):
    """Convolutions, if any, fully connected layers, then class logits and class-specific deltas."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels, hidden = config.fpn_channels, config.box_channels
        self.convs = conv_layers(channels, channels, config.box_conv_layers, config.head_norm)
        inputs = [channels * config.box_pool_size**2, *[hidden] * (config.box_fc_layers - 1)]
        self.fcs = nn.ModuleList(nn.Linear(n, hidden) for n in inputs)
        self.classes = nn.Linear(hidden, config.num_classes)
        self.deltas = nn.Linear(hidden, config.num_classes * 4)
        self.joined = Joined()

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """[N, C, 7, 7] -> class logits [N, K] and deltas [N, K, 4], fp32; K counts the background, class 0."""
        x = self.convs(pooled)
        first, *rest = self.fcs
        x = F.relu(linear_of_maps(x, first))
        for fc in rest:
            x = F.relu(fc(x))
        logits, deltas = self.joined(x, self.classes, self.deltas)
        return logits.float(), deltas.float().unflatten(1, (-1, 4))


def linear_of_maps(x: Tensor, layer: nn.Linear) -> Tensor:
    """`layer(x.flatten(1))` of maps [N, C, H, W], without a copy of maps that are channels_last in memory.

    The columns of the weights are put in the maps' order instead: 13 M numbers of the box head, whose maps have more
    than a hundred million.
    """
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return layer(x.flatten(1))
    weight = layer.weight.to(x.dtype).unflatten(1, x.shape[1:]).permute(0, 2, 3, 1).flatten(1)
    return F.linear(x.permute(0, 2, 3, 1).flatten(1), weight, layer.bias)


class MaskHead(nn.Module):
    """3x3 convolutions and a 2x2 deconvolution; and the layer that makes one logit a class and pixel of their output.

    That layer is not part of `forward`: the loss and detection need the logits of one class of each RoI.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = config.mask_channels
        self.convs = conv_layers(config.fpn_channels, hidden, config.mask_layers, config.head_norm)
        self.deconv = nn.ConvTranspose2d(hidden, hidden, 2, stride=2)
        self.logits = nn.Conv2d(hidden, config.num_classes, 1)
        init_relu(self.deconv)
        init_relu(self.logits)

    def forward(self, pooled: Tensor) -> Tensor:
        """[N, C, 14, 14] -> features [N, hidden, 28, 28], before the last ReLU."""
        return self.deconv(self.convs(pooled))

    def all_logits(self, features: Tensor) -> Tensor:
        """Features -> [N, K, 28, 28]; K counts the background, whose channel mask_loss=canvas needs."""
        return self.logits(F.relu(features))

    def class_logits(self, features: Tensor, labels: Tensor) -> Tensor:
        """Features -> [N, 28, 28] of the class of each RoI, labels [N] in 0..K-1; the other channels are not formed."""
        weight = self.logits.weight.flatten(1)[labels]
        logits = torch.bmm(weight[:, None], F.relu(features).flatten(2)).unflatten(2, features.shape[2:])[:, 0]
        return logits + self.logits.bias[labels, None, None]
