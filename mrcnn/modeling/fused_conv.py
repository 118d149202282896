"""Convolutions that add their bias, a residual and a ReLU before they write: one pass over the activations, not two.

cuDNN has such convolutions and PyTorch gives them to inference alone (`cudnn_convolution_relu`). Backward needs no more
than forward has: which outputs are positive, and the ordinary gradients of a convolution.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from .backbone import FoldedConv2d, FrozenBatchNorm


def fuse_relus(model: nn.Module) -> int:
    """Let every convolution inside `model` that a ReLU follows do that, too; returns how many do.

    That are those of the residual blocks whose norms are folded, with the addition, and those in nn.Sequential. Names
    and weights stay as they are.
    """
    for module in model.modules():
        if isinstance(module, (BasicBlock, Bottleneck)):
            if _is_folded(module):
                module.__class__ = FusedBottleneck if isinstance(module, Bottleneck) else FusedBasicBlock
        elif isinstance(module, nn.Sequential) and any(_fusible(*pair) for pair in pairwise(_steps(module))):
            module.__class__ = FusedSequential
    blocks = {FusedBottleneck: 3, FusedBasicBlock: 2}
    sequences = (m for m in model.modules() if type(m) is FusedSequential)
    return sum(blocks.get(type(m), 0) for m in model.modules()) + sum(
        _fusible(*pair) for m in sequences for pair in pairwise(_steps(m))
    )


def can_fuse(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """None where cuDNN's fused convolutions are right on `device`, channels_last: of a stem, 1x1, 3x3; else why not."""
    if device.type != "cuda":
        return "cuDNN's fused convolutions need a GPU"
    for channels, kernel, stride in ((3, 7, 2), (64, 1, 1), (64, 3, 1), (64, 3, 2)):
        geometry = [stride] * 2, [kernel // 2] * 2, [1, 1], 1
        x, weight = (
            torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
            for shape in ((2, channels, 32, 32), (64, channels, kernel, kernel))
        )
        bias = torch.randn(64, device=device, dtype=dtype)
        plain = _plain(x, weight, bias, None, *geometry)
        for add in (None, torch.randn_like(plain)):
            expected = plain if add is None else _plain(x, weight, bias, add, *geometry)
            # cuDNN is given its output as a residual with the factor 0: what lies in that memory must not matter.
            torch.full_like(expected, float("nan"))
            try:
                found = _conv_relu(x, weight, bias, add, *geometry)
            except RuntimeError as error:
                return f"cuDNN's fused convolutions: {str(error).strip().splitlines()[0]}"
            close = torch.allclose(found.float(), expected.float(), rtol=2**-6, atol=2**-4)  # NaN is close to nothing
            if not close or found.stride() != expected.stride():
                return (
                    f"cuDNN's fused convolutions: wrong for {channels} channels, {kernel} x {kernel}, stride {stride}"
                )
    return None


class FusedSequential(nn.Sequential):
    """Layers one after another, a convolution and the ReLU behind it as one."""

    def forward(self, x: Tensor) -> Tensor:
        """As nn.Sequential's."""
        done = None
        for layer, following in pairwise([*_steps(self), None]):
            if layer is not done:
                fused = _fusible(layer, following)
                x = conv_relu(layer, x) if fused else layer(x)
                done = following if fused else None
        return x


class FusedBasicBlock(BasicBlock):
    """torchvision's block of ResNet-18 and 34, its norms folded."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W']."""
        identity = x if self.downsample is None else self.downsample(x)
        return conv_relu(self.conv2, conv_relu(self.conv1, x), identity)


class FusedBottleneck(Bottleneck):
    """torchvision's block of ResNet-50 and 101, its norms folded."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W']."""
        identity = x if self.downsample is None else self.downsample(x)
        return conv_relu(self.conv3, conv_relu(self.conv2, conv_relu(self.conv1, x)), identity)


def conv_relu(layer: nn.Conv2d, x: Tensor, add: Tensor | None = None) -> Tensor:
    """relu(layer(x) + add), under autocast in its type; a FoldedConv2d brings its norm."""
    folded = isinstance(layer, FoldedConv2d) and layer.norm.folded
    weight, bias = layer.folded() if folded else (layer.weight, layer.bias)
    if bias is None:
        bias = weight.new_zeros(len(weight))
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
        add = add if add is None else add.to(dtype)
    return _conv_relu(x, weight, bias, add, [*layer.stride], [*layer.padding], [*layer.dilation], layer.groups)


@torch.library.custom_op("mrcnn::conv_relu", mutates_args=())
def _conv_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    add: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    if not x.is_cuda:
        return _plain(x, weight, bias, add, stride, padding, dilation, groups)
    if add is None:
        return torch.cudnn_convolution_relu(x, weight, bias, stride, padding, dilation, groups)
    return torch.cudnn_convolution_add_relu(x, weight, add, 1.0, bias, stride, padding, dilation, groups)


@_conv_relu.register_fake
def _plain(x, weight, bias, add, stride, padding, dilation, groups) -> Tensor:  # noqa: ANN001
    out = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return F.relu(out if add is None else out + add)


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:  # noqa: ANN001
    x, weight, _, _, *ctx.geometry = inputs
    ctx.save_for_backward(x, weight, output)


def _backward(ctx, grad: Tensor) -> tuple:  # noqa: ANN001
    x, weight, output = ctx.saved_tensors
    stride, padding, dilation, groups = ctx.geometry
    grad = torch.ops.aten.threshold_backward(grad, output, 0)
    needed = list(ctx.needs_input_grad[:3])
    grads = torch.ops.aten.convolution_backward(
        grad, x, weight, [len(weight)], stride, padding, dilation, False, [0, 0], groups, needed
    )
    return (*grads, grad if ctx.needs_input_grad[3] else None, None, None, None, None)


_conv_relu.register_autograd(_backward, setup_context=_setup_context)


def _steps(sequence: nn.Sequential) -> list[nn.Module]:
    """The layers, but norms that the convolution before them has taken over."""
    return [m for m in sequence if not (isinstance(m, FrozenBatchNorm) and m.folded)]


def _fusible(layer: nn.Module | None, following: nn.Module | None) -> bool:
    plain = isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return plain and isinstance(following, nn.ReLU)


def _is_folded(block: nn.Module) -> bool:
    convolutions = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    return all(isinstance(conv, FoldedConv2d) and conv.norm.folded for conv in convolutions)
