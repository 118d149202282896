"""Convolution, addition and ReLU as one op: the same numbers and gradients, one tensor kept."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from model_inputs import FEW, shapes_batch
from torch import nn

from mrcnn.modeling import MaskRCNN, fused_conv
from mrcnn.modeling.backbone import FrozenBatchNorm, ResNet
from mrcnn.modeling.fused_conv import FusedSequential, can_fuse, conv_relu, fuse_relus

# Sizes of kernel, stride, padding, dilation, groups as in a ResNet, and all of them odd.
LAYERS = {
    "1x1": {"kernel_size": 1},
    "3x3, stride 2": {"kernel_size": 3, "stride": 2, "padding": 1},
    "no bias": {"kernel_size": 3, "padding": 1, "bias": False},
    "dilated groups": {"kernel_size": (3, 1), "padding": (2, 0), "dilation": 2, "groups": 2},
}


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_it_is_the_layers_it_stands_for(name, residual):
    # Values and the gradients of input, weights, bias and residual.
    layer = nn.Conv2d(4, 6, **LAYERS[name]).double()
    x = torch.randn(2, 4, 9, 7, dtype=torch.float64, requires_grad=True)
    add = torch.randn_like(layer(x)).requires_grad_() if residual else None
    wanted = [t for t in (x, add, *layer.parameters()) if t is not None]
    results = []
    for run in (lambda: conv_relu(layer, x, add), lambda: F.relu(layer(x) + (add if residual else 0))):
        out = run()
        results.append([out, *torch.autograd.grad((out * torch.arange(out.shape[-1])).sum(), wanted)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert 0.2 < (results[0][0] > 0).double().mean() < 0.9


def test_registered_rightly():
    x, weight = torch.randn(2, 4, 6, 6, requires_grad=True), torch.randn(8, 4, 3, 3, requires_grad=True)
    bias, add = torch.randn(8, requires_grad=True), torch.randn(2, 8, 6, 6, requires_grad=True)
    geometry = [1, 1], [1, 1], [1, 1], 1
    for residual in (None, add):
        torch.library.opcheck(fused_conv._conv_relu, (x, weight, bias, residual, *geometry))
    frozen = (x.detach(), weight, bias.detach(), add, *geometry)  # a gradient that nobody wants is not computed
    torch.library.opcheck(fused_conv._conv_relu, frozen)


def with_statistics(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm):
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.5, 2)
            module.bias.normal_(0, 0.5)
    return model


@pytest.mark.parametrize(("name", "fused"), [("resnet18", 1 + 8 * 2), ("resnet50", 1 + 16 * 3)])
def test_a_backbone_with_all_of_them(name, fused):
    # Stem and blocks; the same values, gradients and names.
    torch.manual_seed(0)
    plain = with_statistics(ResNet(name, "frozen_bn", 2)).double()
    other = copy.deepcopy(plain)
    assert fuse_relus(other) == fused and fuse_relus(other) == fused  # twice is once
    assert other.state_dict().keys() == plain.state_dict().keys()
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    results = []
    for backbone in (copy.deepcopy(other), plain):
        features = backbone(images)
        sum(f.square().mean() for f in features).backward()
        results.append((features, {n: p.grad for n, p in backbone.named_parameters() if p.grad is not None}))
    (features, grads), (expected_features, expected_grads) = results
    for found, expected in zip(features, expected_features, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert grads.keys() == expected_grads.keys()
    for key, grad in expected_grads.items():
        assert (grads[key] - grad).norm() <= 1e-9 * grad.norm(), key


def test_what_is_not_fused():
    # A norm that learns stands between convolution and ReLU; a sequence without such a pair stays what it was.
    assert fuse_relus(ResNet("resnet18", "bn")) == 0
    unfolded = ResNet("resnet18", "frozen_bn")
    for module in unfolded.modules():
        if isinstance(module, FrozenBatchNorm):
            module.folded = False
    assert fuse_relus(unfolded) == 0
    sequence = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.ReLU(), nn.Conv2d(4, 4, 1, padding="same"), nn.ReLU())
    assert fuse_relus(sequence) == 0 and type(sequence) is nn.Sequential
    mixed = nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    expected = mixed(torch.ones(1, 3, 2, 2))
    assert fuse_relus(mixed) == 1 and type(mixed) is FusedSequential
    torch.testing.assert_close(mixed(torch.ones(1, 3, 2, 2)), expected)


def test_the_whole_model(device):
    # Backbone, RPN and mask head, in one graph, under bf16: the losses of the model as it was; no ReLU is left but
    # those of the fully connected layers and of blocks. Where there is a GPU, cuDNN's own.
    torch.manual_seed(0)
    model = MaskRCNN(dataclasses.replace(FEW, norm="frozen_bn")).train().to(device, memory_format=torch.channels_last)
    batch = shapes_batch().to(device)
    results = []
    for fused in (False, True):
        if fused:
            assert fuse_relus(model) == 1 + 8 * 2 + 1 + 4
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.manual_seed(1)
        with torch.autocast(device.type, torch.bfloat16):
            losses = compiled(batch.images, batch.sizes, batch.targets)
        sum(losses.values()).backward()
        results.append({name: loss.item() for name, loss in losses.items()})
    assert results[1] == pytest.approx(results[0], rel=0.05)
    assert all(p.grad is not None for p in model.parameters())


def test_a_cpu_has_none():
    assert can_fuse(torch.device("cpu")) == "cuDNN's fused convolutions need a GPU"


def test_cudnn_takes_them(device):
    if device.type == "cpu":
        pytest.skip("cuDNN needs a GPU")
    assert can_fuse(device) is None
    layer = nn.Conv2d(64, 64, 3, padding=1).to(device, torch.bfloat16, memory_format=torch.channels_last)
    x, add = (torch.randn(2, 64, 9, 7, device=device, dtype=torch.bfloat16) for _ in range(2))
    for residual in (None, add):
        found = conv_relu(layer, x, residual)
        expected = F.relu(layer(x).float() + (0 if residual is None else residual.float()))
        torch.testing.assert_close(found.float(), expected, rtol=2**-6, atol=2**-6)
