"""Layers that share a product: the same numbers, fewer and fatter products."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mrcnn.modeling.heads import linear_of_maps
from mrcnn.modeling.joined import Joined

# 3 and 12 channels, 91 and 364, are what a detector has; two that are whole already; one layer.
LAYERS = {
    "convolutions": ([nn.Conv2d(16, n, 1) for n in (3, 12)], (2, 16, 5, 7), 16),
    "linear": ([nn.Linear(16, n) for n in (91, 364)], (6, 16), 456),
    "nothing to pad": ([nn.Linear(16, n) for n in (8, 16)], (6, 16), 24),
    "one": ([nn.Linear(16, 3)], (6, 16), 8),
}


@pytest.mark.parametrize("name", LAYERS)
def test_same_outputs_and_gradients(name):
    layers, shape, _ = LAYERS[name]
    layers = [layer.double() for layer in layers]
    x = torch.randn(shape, dtype=torch.float64)
    results = []
    for run in (lambda: Joined()(x, *layers), lambda: [layer(x) for layer in layers]):
        outputs = run()
        parameters = [p for layer in layers for p in layer.parameters()]
        results.append([*outputs, *torch.autograd.grad(sum(o.square().sum() for o in outputs), parameters)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert Joined().state_dict() == {}


@pytest.mark.parametrize("name", LAYERS)
def test_half_types_are_padded_to_multiples_of_eight(name, monkeypatch):
    # Seen by the product that runs; fp32 is left as it is.
    layers, shape, padded = LAYERS[name]
    layers = [layer.float() for layer in layers]
    function = "linear" if len(shape) == 2 else "conv2d"
    plain, rows = getattr(F, function), []

    def watched(x, weight, *rest):
        rows.append(len(weight))
        return plain(x, weight, *rest)

    monkeypatch.setattr(F, function, watched)
    x = torch.randn(shape)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = Joined()(x.bfloat16(), *layers)
        Joined()(x, *layers)
    Joined()(x, *layers)
    assert rows == [padded, padded, sum(len(layer.weight) for layer in layers)]
    for found, layer in zip(outputs, layers, strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(found, layer(x))


@pytest.mark.parametrize("shape", [(5, 8, 7, 7), (5, 8, 1, 1), (5, 1, 7, 7), (1, 8, 7, 7), (0, 8, 7, 7)])
def test_linear_of_maps_in_both_layouts(shape):
    # The maps' order in memory changes nothing; gradients of maps and weights too.
    _, channels, height, width = shape
    layer = nn.Linear(channels * height * width, 6).double()
    maps = torch.randn(shape, dtype=torch.float64)
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = maps.contiguous(memory_format=memory_format).requires_grad_()
        out = linear_of_maps(x, layer)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, layer.weight, layer.bias])])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_channels_last_maps_are_not_copied():
    # What the product reads shares the maps' memory.
    layer, seen = nn.Linear(8 * 49, 6), []
    maps = torch.randn(5, 8, 7, 7).contiguous(memory_format=torch.channels_last)

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is F.linear:
                seen.append(args[0].data_ptr())
            return function(*args, **(kwargs or {}))

    with Watch():
        linear_of_maps(maps, layer)
    assert seen == [maps.data_ptr()]
