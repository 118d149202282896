"""Backbones, their weights, norms and frozen stages, and the pyramid."""

import copy
import socket
import urllib.error

import pytest
import torch
import torchvision
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from mrcnn.errors import ConfigError
from mrcnn.modeling.backbone import FoldedConv2d, ResNet, load_pretrained
from mrcnn.modeling.fpn import FPN

CHANNELS = {
    "resnet18": [64, 128, 256, 512],
    "resnet34": [64, 128, 256, 512],
    "resnet50": [256, 512, 1024, 2048],
    "resnet101": [256, 512, 1024, 2048],
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """torch.hub's cache in an empty folder."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def cached(hub, name: str, net: nn.Module) -> None:
    """Put a ResNet's weights where torchvision would have downloaded its own."""
    url = torchvision.models.get_model_weights(name).DEFAULT.url
    torch.save(net.state_dict(), hub / url.rsplit("/", 1)[1])


@pytest.mark.parametrize("name", CHANNELS)
@torch.no_grad()
def test_c2_to_c5_are_torchvisions(name, hub):
    # Weights through torchvision's own API, from its cache; the last map, pooled and classified, gives torchvision's
    # logits: nothing of the network is missing or in another order.
    # In double: without statistics the activations of 101 layers grow, and their rounding.
    theirs = getattr(torchvision.models, name)(weights=None).eval().double()
    cached(hub, name, theirs)
    backbone = ResNet(name, "frozen_bn").eval().double()
    load_pretrained(backbone, "DEFAULT")
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    features = backbone(images)
    sides = [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert [tuple(f.shape) for f in features] == [(2, c, *s) for c, s in zip(CHANNELS[name], sides, strict=True)]
    assert backbone.out_channels == CHANNELS[name]
    torch.testing.assert_close(theirs.fc(features[-1].mean((2, 3))), theirs(images), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("norm", "layer"),
    [("bn", nn.BatchNorm2d), ("frozen_bn", FrozenBatchNorm2d), ("sync_bn", nn.SyncBatchNorm), ("gn", nn.GroupNorm)],
)
def test_norms(norm, layer):
    # The kind asked for everywhere. Only the live ones move their statistics; frozen_bn has nothing to train.
    backbone = ResNet("resnet18", norm).train()
    norms = [m for m in backbone.modules() if isinstance(m, layer)]
    assert len(norms) == 20
    before = {k: v.clone() for k, v in backbone.state_dict().items() if "running" in k}
    sum(f.sum() for f in backbone(torch.randn(2, 3, 64, 64))).backward()
    moved = any(not torch.equal(v, before[k]) for k, v in backbone.state_dict().items() if k in before)
    assert moved == (norm in ("bn", "sync_bn"))
    assert len(list(norms[0].parameters())) == (0 if norm == "frozen_bn" else 2)


@pytest.mark.parametrize("norm", ["bn", "frozen_bn", "gn"])
def test_autocast_keeps_bf16(norm):
    # Activations are the memory of training: torchvision's frozen batch norm would make them fp32 again.
    with torch.autocast("cpu", torch.bfloat16):
        features = ResNet("resnet18", norm)(torch.randn(1, 3, 64, 64))
    assert all(f.dtype == torch.bfloat16 for f in features)


def with_statistics(backbone: ResNet) -> ResNet:
    """Frozen batch norms as training leaves them: no constant is 0 or 1."""
    for module in backbone.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.5, 2)
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.5)
    return backbone


def test_folded_norms_change_nothing():
    # Values and gradients of the weights, which are the unscaled ones; names of the state as torchvision's.
    torch.manual_seed(0)
    backbone = with_statistics(ResNet("resnet18", "frozen_bn")).double()
    norms = [m for m in backbone.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert sum(isinstance(m, FoldedConv2d) for m in backbone.modules()) == len(norms) == 20
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    results = []
    for folded in (True, False):
        for norm in norms:
            norm.folded = folded
        backbone.zero_grad()
        features = backbone(images)
        sum(f.square().mean() for f in features).backward()
        results.append((features, {n: p.grad.clone() for n, p in backbone.named_parameters()}))
    (features, grads), (plain_features, plain_grads) = results
    for found, expected in zip(features, plain_features, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    assert not torch.equal(features[-1], plain_features[-1])  # another order of operations: it was folded
    for name, grad in plain_grads.items():
        assert (grads[name] - grad).norm() <= 1e-11 * grad.norm(), name
    assert backbone.state_dict().keys() == ResNet("resnet18", "frozen_bn").state_dict().keys()
    assert "stages.1.0.downsample.0.weight" in grads and "stem.1.running_var" in backbone.state_dict()


def test_folding_survives_a_copy():
    # Of a copied model the convolutions read the copy's norms, not the original's.
    backbone = ResNet("resnet18", "frozen_bn").eval()
    twin = copy.deepcopy(backbone)
    images = torch.randn(1, 3, 32, 32)
    expected = twin(images)[-1]
    with_statistics(backbone)
    assert torch.equal(twin(images)[-1], expected)
    with_statistics(twin)
    assert not torch.equal(twin(images)[-1], expected)


def test_folded_weights_round_once():
    # bf16's error against fp64 is no larger than with the norm as a layer of its own, which rounds in between.
    torch.manual_seed(0)
    backbone = with_statistics(ResNet("resnet18", "frozen_bn"))
    norms = [m for m in backbone.modules() if isinstance(m, FrozenBatchNorm2d)]
    images = torch.randn(2, 3, 64, 64)
    exact = copy.deepcopy(backbone).double()(images.double())[-1]
    errors = []
    for folded in (True, False):
        for norm in norms:
            norm.folded = folded
        with torch.autocast("cpu", torch.bfloat16):
            errors.append((backbone(images)[-1].double() - exact).norm().item())
    assert errors[0] <= 1.1 * errors[1] and errors[0] <= 0.02 * exact.norm()


@pytest.mark.parametrize("stages", range(6))
def test_frozen_stages(stages):
    # The first n of stem, C2..C5 get no gradient, and their batch norm does not move, though the model trains.
    backbone = ResNet("resnet18", "bn", stages).train()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    features = backbone(torch.randn(2, 3, 64, 64))
    if stages < 5:
        sum(f.sum() for f in features).backward()
    for i, part in enumerate([backbone.stem, *backbone.stages]):
        frozen = i < stages
        assert all((p.grad is None) == frozen for p in part.parameters())
        name = "stem" if i == 0 else f"stages.{i - 1}"
        state = {k: v for k, v in backbone.state_dict().items() if k.startswith(name) and "running" in k}
        moved = [not torch.equal(v, before[k]) for k, v in state.items()]
        assert any(moved) != frozen


def test_weights_without_a_network(hub, monkeypatch):
    # What a machine without a network answers: where to put the file, and how to do without.
    def no_network(*args, **kwargs):
        raise urllib.error.URLError(socket.gaierror(-3, "Temporary failure in name resolution"))

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setattr("torch.hub.urlopen", no_network)
    with pytest.raises(ConfigError) as error:
        load_pretrained(ResNet("resnet18", "bn"), "IMAGENET1K_V1")
    message = str(error.value)
    assert "cannot download https://download.pytorch.org/models/resnet18-f37072fd.pth" in message
    assert "name resolution" in message and str(hub) in message and "model.weights=''" in message


def test_weights_that_torchvision_does_not_have():
    with pytest.raises(ConfigError, match="no weights 'V9' for resnet18; choose one of IMAGENET1K_V1"):
        load_pretrained(ResNet("resnet18", "bn"), "V9")


def test_weights_that_do_not_fit(hub):
    # Batch norm's statistics have no place in a GroupNorm.
    cached(hub, "resnet18", torchvision.models.resnet18(weights=None))
    with pytest.raises(ConfigError, match="do not fit this backbone"):
        load_pretrained(ResNet("resnet18", "gn"), "DEFAULT")


@pytest.mark.parametrize("content", [b"", b"PK half a file", b"garbage\n" * 40, b"<html>not found</html>"])
def test_weights_in_a_damaged_file(content, hub):
    # As a download that was cut off leaves it, or a page put there for it: not to be mistaken for a missing network.
    (hub / "resnet18-f37072fd.pth").write_bytes(content)
    with pytest.raises(ConfigError, match=r"is damaged .*: delete it"):
        load_pretrained(ResNet("resnet18", "bn"), "DEFAULT")


@pytest.mark.parametrize("norm", ["none", "bn", "gn"])
@pytest.mark.parametrize("levels", [4, 5])
def test_pyramid(norm, levels):
    # Sizes that 32 does not divide, P6 or not; against the sentence of the paper, written out.
    sizes = [(21, 13), (11, 7), (6, 4), (3, 2)]
    fpn = FPN((8, 16, 32, 64), 32, norm, levels).eval()
    features = [torch.randn(2, c, *s) for c, s in zip((8, 16, 32, 64), sizes, strict=True)]
    pyramid = fpn(features)
    merged = fpn.lateral[3](features[3])
    expected = [fpn.output[3](merged)]
    for i in (2, 1, 0):
        rows = torch.arange(sizes[i][0]) * sizes[i + 1][0] // sizes[i][0]
        columns = torch.arange(sizes[i][1]) * sizes[i + 1][1] // sizes[i][1]
        merged = fpn.lateral[i](features[i]) + merged[:, :, rows][:, :, :, columns]
        expected.insert(0, fpn.output[i](merged))
    if levels == 5:
        expected.append(expected[-1][:, :, ::2, ::2])
    assert len(pyramid) == levels
    for found, wanted in zip(pyramid, expected, strict=True):
        torch.testing.assert_close(found, wanted)
