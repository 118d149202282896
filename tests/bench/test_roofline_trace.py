"""Operators of a step and the kernels they become: single layers and chains by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import roofline
from bench.roofline import predict_step
from bench.roofline_fusion import EPILOGUE, FUSIONS, ONE_PASS, SEPARATE, make_kernels
from bench.roofline_trace import (
    BACKWARD,
    DATA,
    FORWARD,
    POINTWISE,
    PRODUCT,
    REDUCTION,
    WEIGHT,
    trace_ops,
)
from kernels import HAS_TRITON
from mrcnn.config import load_config

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="the model's ops are traced as Triton's")
SIZE, BATCH, OBJECTS = (64, 96), 2, 3
SMALL = [
    "model.roi_samples=8",
    "model.post_nms_top_n=[16, 8]",
    "model.pre_nms_top_n=[20, 20]",
    "model.max_detections=4",
]
HALF = 2  # bytes of a bf16


def traced(model, *inputs, backward=True, half=True):
    """What `model` does with `inputs`, functions of no argument that make tensors."""
    with FakeTensorMode():
        module = model()
        tensors = [make() for make in inputs]
        with trace_ops(module) as trace:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
                out = module(*tensors)
            if backward:
                out.backward(torch.empty_like(out))
    return trace


def products(trace):
    return {(op.layer, op.part): op for op in trace.ops if op.kind == PRODUCT}


@pytest.fixture(scope="module")
def config():
    return load_config("tiny", SMALL)


@pytest.fixture(scope="module")
def step(config):
    if not HAS_TRITON:
        pytest.skip("the model's ops are traced as Triton's")
    return predict_step(config, SIZE, BATCH, objects=OBJECTS)


# Single layers


def test_a_convolution_by_hand():
    # A strided one between two others, so that it has both backward passes; the first has nothing before it.
    def model():
        return nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 24, 3, stride=2, padding=1))

    found = products(traced(model, lambda: torch.empty(2, 8, 12, 20)))
    maps, outs, weights = 2 * 16 * 12 * 20, 2 * 24 * 6 * 10, 24 * 16 * 9
    flops = 2 * outs * 16 * 9
    for part in (FORWARD, DATA, WEIGHT):  # each reads two of the three and writes the third
        assert found["1", part].flops == flops, part
        assert found["1", part].bytes == HALF * (maps + outs + weights), part
    assert found["0", FORWARD].flops == found["0", WEIGHT].flops == 2 * maps * 8 * 9
    assert ("0", DATA) not in found


def test_bias_is_a_pass_of_its_own_and_so_is_its_gradient():
    ops = traced(lambda: nn.Sequential(nn.Conv2d(8, 16, 1)), lambda: torch.empty(2, 8, 6, 6)).ops
    out = HALF * 2 * 16 * 6 * 6
    (bias,) = [op for op in ops if op.name == "bias"]
    (gradient,) = [op for op in ops if op.name.endswith("of the bias")]
    assert (bias.kind, bias.part, bias.bytes) == (POINTWISE, FORWARD, 2 * out + HALF * 16)
    assert (gradient.kind, gradient.part, gradient.bytes) == (REDUCTION, BACKWARD, out + HALF * 16)


def test_linear_and_deconvolution_by_hand():
    def model():
        return nn.Sequential(nn.ConvTranspose2d(8, 16, 2, stride=2), nn.Flatten(), nn.Linear(16 * 8 * 8, 24))

    found = products(traced(model, lambda: torch.empty(3, 8, 4, 4)))
    # Every output pixel of a 2x2 deconvolution with stride 2 comes from one input pixel.
    assert found["0", FORWARD].flops == found["0", WEIGHT].flops == 2 * 3 * (16 * 8 * 8) * 8
    linear = 2 * 3 * 1024 * 24
    assert [found["2", part].flops for part in (FORWARD, DATA, WEIGHT)] == [linear] * 3
    assert found["2", DATA].bytes == HALF * (3 * 24 + 1024 * 24 + 3 * 1024)


def test_a_frozen_layer_has_no_backward():
    # Neither for its weight nor, with nothing trained before it, for its input; the trained one behind it has one.
    def model():
        layers = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1))
        layers[0].requires_grad_(False)
        return layers

    found = products(traced(model, lambda: torch.empty(1, 8, 4, 4)))
    assert set(found) == {("0", FORWARD), ("1", FORWARD), ("1", WEIGHT)}

    def between():
        layers = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1))
        layers[1].requires_grad_(False)
        return layers

    found = products(traced(between, lambda: torch.empty(1, 8, 4, 4)))
    assert {part for layer, part in found if layer == "1"} == {FORWARD, DATA}  # the gradient goes through


@pytest.mark.parametrize("channels, odd", [(8, ()), (12, (12,)), (91, (91,))])
def test_odd_channels_are_flagged(channels, odd):
    trace = traced(lambda: nn.Sequential(nn.Conv2d(16, channels, 1)), lambda: torch.empty(1, 16, 4, 4))
    assert {op.odd_channels for op in trace.ops if op.kind == PRODUCT} == {odd}


def test_views_cost_nothing_and_parts_what_they_show():
    class Parts(nn.Module):
        def forward(self, x, row, table, index):
            y = x.permute(1, 0)[:4]  # no kernel
            return y + row.expand(4, 100), table[index]

    with FakeTensorMode():
        model, x, row = Parts(), torch.empty(100, 50), torch.empty(1, 100)
        table, index = torch.empty(1000, 3), torch.empty(7, dtype=torch.int64)
        with trace_ops(model) as trace:
            model(x, row, table, index)
    add, gather = trace.ops
    assert add.bytes == 4 * (400 + 100 + 400)  # a slice, a row once, the sum
    assert gather.bytes == 4 * (7 * 3 + 7 * 3) + 8 * 7  # as much of the table as is taken, the index


def test_batch_norm_looks_twice_in_training_alone():
    def ops(training):
        return [op.kind for op in traced(lambda: nn.Sequential(nn.BatchNorm2d(8)).train(training),
                                         lambda: torch.empty(2, 8, 4, 4), backward=False, half=False).ops
                if "norm" in op.name]  # fmt: skip

    assert ops(True) == [REDUCTION, POINTWISE]
    assert ops(False) == [POINTWISE]


@pytest.mark.parametrize("half", [True, False])
def test_what_is_kept_for_the_backward_by_hand(half):
    # The convolutions' inputs, of which one is what the ReLU returned; under autocast also their weights in bf16.
    def model():
        return nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.ReLU(), nn.Conv2d(16, 8, 1, bias=False))

    trace = traced(model, lambda: torch.empty(2, 8, 4, 4, dtype=torch.bfloat16 if half else torch.float32), half=half)
    maps = 2 * 8 * 16 + 2 * 16 * 16
    assert trace.saved_bytes == (HALF * (maps + 2 * 8 * 16) if half else 4 * maps)


# Fusion


class Chain(nn.Module):
    """relu(a + b) * 2, and its sum."""

    def forward(self, a, b):
        return (F.relu(a + b) * 2).sum()


@pytest.mark.parametrize("fusion, kernels, passes", [(SEPARATE, 4, 8), (ONE_PASS, 1, 2), (EPILOGUE, 1, 2)])
def test_a_chain_is_one_pass(fusion, kernels, passes):
    # Separate: 3 + 2 + 2 + 1 times the tensor; fused: the two inputs.
    trace = traced(Chain, lambda: torch.empty(1000), lambda: torch.empty(1000), backward=False)
    found = make_kernels(trace, fusion)
    assert len(found) == kernels
    assert sum(kernel.bytes for kernel in found) == 4000 * passes + 4


@pytest.mark.parametrize(
    "fusion, passes",
    [(SEPARATE, 1 + 2 + 2), (ONE_PASS, 1 + 2), (EPILOGUE, 1)],  # of the result: product, bias and ReLU
)
def test_bias_and_relu_ride_in_the_product(fusion, passes):
    def model():
        return nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU(inplace=True))

    trace = traced(model, lambda: torch.empty(2, 8, 5, 5, dtype=torch.bfloat16), backward=False)
    kernels = [k for k in make_kernels(trace, fusion) if any(op.name != "_to_copy" for op in k.ops)]
    assert sum(kernel.bytes for kernel in kernels) == HALF * (2 * 8 * 25 + 8 * 16 + passes * 2 * 16 * 25 + 16)


class Around(nn.Module):
    """A pointwise result goes into a product, and past it to be added to what the product makes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1, bias=False)

    def forward(self, x):
        y = F.relu(x) * 2
        return self.conv(y) + y


@pytest.mark.parametrize("fusion", FUSIONS)
def test_no_kernel_needs_its_own_result(fusion):
    # relu, multiplication and addition are pointwise of one size, but the product lies between.
    trace = traced(Around, lambda: torch.empty(1, 8, 4, 4, dtype=torch.bfloat16), backward=False)
    kernels = make_kernels(trace, fusion)
    names = [[op.name for op in kernel.ops if op.name != "_to_copy"] for kernel in kernels]
    if fusion == ONE_PASS:
        assert [n for n in names if n] == [["relu", "mul"], ["convolution"], ["add"]]
    if fusion == EPILOGUE:
        assert [n for n in names if n] == [["relu", "mul"], ["convolution", "add"]]


class Late(nn.Module):
    """A short branch meets a long one."""

    def __init__(self):
        super().__init__()
        self.long = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.short = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return F.relu(self.long(x) + self.short(x))


def test_what_one_kernel_reads_is_computed_there():
    # The short branch's bias long before the sum: torch.compile adds it where the sum is taken.
    trace = traced(Late, lambda: torch.empty(1, 8, 4, 4), backward=False)
    names = [sorted(op.name for op in kernel.ops) for kernel in make_kernels(trace, ONE_PASS)]
    assert ["add", "bias", "bias", "relu"] in names


@needs_triton
@pytest.mark.parametrize("training", [True, False])
def test_kernels_run_in_order_and_lose_nothing(config, training):
    # Of a whole model, with norms, sums, views and in-place writes: every result is there before it is read.
    trace, _, _ = roofline._trace_ours(config, SIZE, BATCH, training, OBJECTS)
    total = []
    for fusion in FUSIONS:
        kernels = make_kernels(trace, fusion)
        made_in_all = {value for op in trace.ops for value in op.writes}
        made = set()
        for kernel in kernels:
            inside = set()
            for op in kernel.ops:
                assert not (op.reads.keys() & made_in_all) - made - inside, (fusion, op)
                inside |= op.writes.keys()
            made |= kernel.writes.keys()
        assert sum(len(kernel.ops) for kernel in kernels) == len(trace.ops)
        assert sum(kernel.flops for kernel in kernels) == sum(op.flops for op in trace.ops)
        total.append((sum(kernel.bytes for kernel in kernels), len(kernels)))
    assert list(FUSIONS) == [EPILOGUE, ONE_PASS, SEPARATE] and total == sorted(total) and len(set(total)) == 3
