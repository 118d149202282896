"""The last convolution and its loss: what the ordinary predictor gives, of each RoI's own class alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_mask_bce_loss import margins  # noqa: F401  # a fixture
from torch import Tensor

from kernels import checks, mask_predictor_loss
from kernels.mask_predictor_loss import op, reference

BACKENDS = ["triton", "torch"]
ALL_BACKENDS = [*BACKENDS, "torchvision"]
FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
NCHW, NHWC = torch.contiguous_format, torch.channels_last
NAN = float("nan")
LAYOUTS = pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
RELU = pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])


def inputs(n=4, c=20, k=5, m=(6, 6), dtype=FP32, weight_dtype=None, layout=NCHW, device="cpu") -> list:
    """Arguments of `mask_predictor_loss`: features, weight, bias, labels, targets, no weights."""
    weight_dtype = weight_dtype or (FP64 if dtype == FP64 else FP32)
    features = torch.randn(n, c, *m).to(dtype).to(device).contiguous(memory_format=layout).requires_grad_()
    weight = (torch.randn(k, c) * 0.3).to(weight_dtype).to(device).requires_grad_()
    bias = torch.randn(k).to(weight_dtype).to(device).requires_grad_()
    return [features, weight, bias, torch.randint(0, k, (n,), device=device), torch.rand(n, *m, device=device), None]


def with_gradients(arguments: list, relu: bool = False, backend: str = "triton") -> list[Tensor]:
    """The loss, and the gradients of features, weight and bias."""
    loss = mask_predictor_loss(*arguments, relu=relu, backend=backend)
    return [loss.detach(), *torch.autograd.grad(loss, [a for a in arguments[:3] if a is not None])]


def expected(arguments: list, relu: bool = False) -> list[Tensor]:
    """The same in fp64: a convolution to K channels, of the slots that count alone, and PyTorch's loss."""
    features, weight, bias, labels, targets, weights = (None if a is None else a.detach().cpu() for a in arguments)
    leaves = [t.double().requires_grad_() for t in (features, weight, bias) if t is not None]
    real = labels >= 0
    x = leaves[0][real]
    matrix = leaves[1].flatten(1)[:, :, None, None]
    logits = F.conv2d(F.relu(x) if relu else x, matrix, *leaves[2:])[torch.arange(int(real.sum())), labels[real]]
    rows = F.binary_cross_entropy_with_logits(logits, targets[real].double(), reduction="none").mean((1, 2))
    weights = torch.ones(len(rows)).double() if weights is None else weights[real].double()
    loss = (weights * rows).sum() / weights.sum().clamp(min=1)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def errors(ours: list[Tensor], truth: list[Tensor]) -> list[float]:
    """Of each, the length of the difference to the truth by the truth's."""
    pairs = zip(ours, truth, strict=True)
    return [((mine.cpu().double() - other).norm() / other.norm().clamp(min=1e-30)).item() for mine, other in pairs]


def check(arguments: list, relu: bool = False) -> list[Tensor]:
    """The loss is fp64's to 3e-7, and the gradients are as near as the ordinary fp32 path's are within a factor of 2.

    Where these happen to be nearer than 1.5e-7, a sum of a hundred numbers in fp32 need not be.
    """
    ours, truth = with_gradients(arguments, relu), expected(arguments, relu)
    real = arguments[3] >= 0
    rows = [a[real] if i in (0, 3, 4, 5) and a is not None else a for i, a in enumerate(arguments)]
    theirs = errors(with_gradients(rows, relu, "torchvision"), [truth[0], truth[1][real.cpu()], *truth[2:]])
    mine = errors(ours, truth)
    assert mine[0] < 3e-7
    for error, other in zip(mine[1:], theirs[1:], strict=True):
        assert error <= 2 * max(other, 1.5e-7)
    return ours


# torchvision's 28 x 28, and maps of 14, 7 and 1; channels that fill no byte of signs (1, 20, 100), a byte (8), a tile
# of NHWC and no predicates (64, 256), several chunks (100 and 256 in NHWC, 256 in NCHW); one class; maps that are not
# square.
@pytest.mark.parametrize(
    ("c", "k", "m"),
    [(20, 5, (28, 28)), (64, 3, (14, 14)), (256, 2, (7, 7)), (1, 4, (1, 1)), (100, 1, (5, 9)), (8, 3, (11, 3))],
)
@LAYOUTS
@RELU
def test_is_the_ordinary_predictor(c, k, m, layout, relu, device):
    arguments = inputs(4, c, k, m, layout=layout, device=device)
    arguments[-1] = torch.rand(4, device=device) + 0.5
    _, grad, *_ = check(arguments, relu)
    assert grad.is_contiguous(memory_format=layout)


# Programs of a GPU's number: several parts a RoI, several tiles a part, the last of both ragged; lists of RoIs, their
# rows, and channels in several blocks.
@LAYOUTS
@RELU
@pytest.mark.parametrize(("c", "m"), [(20, (9, 9)), (128, (5, 8))])
def test_small_tiles(c, m, layout, relu, device, monkeypatch):
    small = {13: 2, 7: 3, 1024: 2, 16: 4, 64: 16}
    monkeypatch.setattr(op, "tile", lambda on_gpu, interpreted: small.get(on_gpu, 16))
    arguments = inputs(5, c, 2, m, layout=layout, device=device)
    arguments[3] = torch.tensor([1, 0, -1, 1, 1], device=device)
    blocks = op._blocks(c, m[0] * m[1], False, layout is NHWC)
    parts = op._forward._init_fn(*(a if a is None else a.detach() for a in arguments), relu)[3].shape[1]
    assert parts > 1 and blocks["PLAIN"] == (c == 128 and layout is NHWC)
    check(arguments, relu)


@pytest.mark.parametrize("dtype", [FP16, BF16])
@LAYOUTS
@RELU
def test_halves_come_closer_than_the_ordinary_path(dtype, layout, relu, device):
    # It rounds logits and their gradients to the features' type. Only the features' gradient is rounded here, when it
    # is stored (the interpreter stores bf16 truncated, which says nothing of a GPU).
    arguments = inputs(4, 24, 3, (14, 14), dtype, layout=layout, device=device)
    ours, truth = with_gradients(arguments, relu), expected(arguments, relu)
    assert [g.dtype for g in ours] == [FP32, dtype, FP32, FP32]
    mine, theirs = errors(ours, truth), errors(with_gradients(arguments, relu, "torchvision"), truth)
    for i in (0, 2, 3):
        assert mine[i] < 1e-6 and mine[i] < theirs[i] / 5
    if dtype == FP16 or device.type == "cuda":
        assert mine[1] <= theirs[1]


def test_weight_of_a_half_type(device):
    # Its gradient has its type: the fp32 sum, rounded once.
    arguments = inputs(3, 8, 2, dtype=FP16, weight_dtype=FP16, device=device)
    ours, truth = with_gradients(arguments, True), expected(arguments, True)
    assert [g.dtype for g in ours] == [FP32, FP16, FP16, FP16]
    assert errors(ours, truth)[0] < 3e-7 and max(errors(ours, truth)) < 2**-11


@LAYOUTS
@RELU
def test_gradcheck(layout, relu, device):
    # fp64 on the real kernels, features away from the corner of the ReLU; weights, an empty slot and all three leaves.
    features, weight, bias, _, targets, _ = inputs(3, 5, 2, (2, 3), FP64, layout=layout, device=device)
    with torch.no_grad():
        features += 0.5 * features.sign()
    labels, weights = torch.tensor([1, -1, 0], device=device), torch.tensor([2.0, 1.0, 0.5], device=device)
    function = lambda *leaves: mask_predictor_loss(*leaves, labels, targets, weights, relu=relu, backend="triton")
    assert torch.autograd.gradcheck(function, (features, weight, bias), fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_relu_at_zero_learns_nothing(backend, device):
    # As in PyTorch: the derivative at exactly 0, of either sign, is 0. Without the ReLU it is the weight's.
    arguments = inputs(1, 3, 1, (1, 3), device=device)
    with torch.no_grad():
        arguments[0].copy_(torch.tensor([0.0, -0.0, 1e-38]).expand(1, 3, 1, 3))
    _, grad, *_ = with_gradients(arguments, True, backend)
    assert (grad[..., :2] == 0).all() and (grad[..., 2] != 0).all()
    assert (with_gradients(arguments, False, backend)[1] != 0).all()


def test_same_bits_every_time(device):
    arguments = inputs(6, 20, 2, device=device)
    for mine, again in zip(with_gradients(arguments, True), with_gradients(arguments, True), strict=True):
        assert torch.equal(mine, again)


def test_a_class_does_not_depend_on_the_order_of_others(device):
    # Its RoIs are listed first and added in that order, so where those of other classes stand moves no bit.
    features, weight, bias, _, targets, _ = inputs(8, 20, 3, device=device)
    labels = torch.tensor([0, 2, 0, 1, -1, 0, 1, 2], device=device)
    order = torch.tensor([4, 0, 3, 2, 1, 7, 5, 6], device=device)  # the three of class 0 still one after another
    _, _, dw, db = with_gradients([features, weight, bias, labels, targets, None], True)
    moved = [features.detach()[order].requires_grad_(), weight, bias, labels[order], targets[order], None]
    assert moved[3].ne(labels).any()
    _, _, dw_moved, db_moved = with_gradients(moved, True)
    assert dw[0].any() and torch.equal(dw_moved[0], dw[0]) and torch.equal(db_moved[0], db[0])


def test_odd_strides_are_copied(device):
    # Parts of a wider tensor, transposed pixels, every other RoI; labels, targets, weights and the matrix strided.
    arguments = inputs(4, 6, 3, (5, 5), device=device)
    arguments[-1] = torch.rand(4, device=device)
    truth = expected(arguments)
    features, weight, bias, *rows = (a.detach() for a in arguments)
    spread = lambda t: torch.stack([t, torch.full_like(t, 1)], dim=-1).flatten(-2)[..., ::2]
    for other in (
        torch.cat([features, features], dim=3)[..., 5:],
        features.transpose(2, 3).contiguous().transpose(2, 3),
        features.repeat_interleave(2, dim=0)[::2],
        torch.cat([features, features], dim=1).contiguous(memory_format=NHWC)[:, 6:],
    ):
        assert not other.is_contiguous() and not other.is_contiguous(memory_format=NHWC)
        leaves = [other.requires_grad_(), weight.T.contiguous().T.requires_grad_(), spread(bias).requires_grad_()]
        ours = with_gradients([*leaves, *map(spread, rows)])
        assert max(errors(ours, truth)) < 5e-7


def test_a_convolutions_own_weight_and_no_bias(device):
    # [K, C, 1, 1] as the module holds it, with a gradient of that shape; a bias that is not there is 0.
    features, weight, bias, *rows = inputs(3, 8, 2, device=device)
    flat = with_gradients([features, weight, torch.zeros_like(bias).requires_grad_(), *rows])
    four = weight.detach()[:, :, None, None].requires_grad_()
    for backend in ALL_BACKENDS:
        loss, grad, grad_weight = with_gradients([features, four, None, *rows], backend=backend)
        torch.testing.assert_close([loss, grad, grad_weight.flatten(1)], flat[:3], rtol=1e-5, atol=1e-7)
        assert grad_weight.shape == four.shape


def test_leaves_that_learn_nothing(device):
    # A frozen head or trunk, and weights and targets, to which nothing flows even where they ask for it.
    features, weight, bias, labels, targets, _ = inputs(3, 8, 2, device=device)
    weights = torch.ones(3, device=device, requires_grad=True)
    for backend in ALL_BACKENDS:
        loss = mask_predictor_loss(features.detach(), weight, bias.detach(), labels, targets, weights, backend=backend)
        grad, nothing = torch.autograd.grad(loss, [weight, weights], allow_unused=True)
        assert grad.any() and nothing is None


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, FP16, FP64])
def test_target_dtypes(dtype, device):
    # Hard targets may stay bits and bytes.
    arguments = inputs(device=device)
    arguments[4] = (arguments[4] > 0.5).to(dtype)
    assert max(errors(with_gradients(arguments), expected(arguments))) < 5e-7


@RELU
@pytest.mark.parametrize("scale", [1.0, 0.1, 0.0])
def test_weights(scale, relu, device):
    # sum(w * l) / max(sum(w), 1): of a sum below 1, and of nothing but zeros, too.
    arguments = inputs(5, device=device)
    arguments[3] = torch.tensor([2, -1, 0, 3, 2], device=device)
    arguments[-1] = torch.tensor([0.5, 9.0, 2.0, 0.0, 1.0], device=device) * scale
    ours, truth = with_gradients(arguments, relu), expected(arguments, relu)
    if scale == 0:
        assert not any(t.any() for t in ours)
    else:
        assert max(errors(ours, truth)) < 5e-7
    assert not ours[1][[1, 3]].any() and not ours[2][[1, 3, 4]].any()


@RELU
@LAYOUTS
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_an_empty_slot_goes_nowhere(backend, layout, relu, device):
    # Padded slots hold whatever the trunk made of garbage boxes, and have no target and no weight. Nor does a broken
    # class 0 reach them, which is what an index clamped to 0 would read.
    features, weight, bias, _, targets, _ = inputs(5, layout=layout, device=device)
    labels = torch.tensor([1, -1, 2, -7, 1], device=device)
    weights = torch.tensor([0.5, NAN, 2.0, NAN, 1.0], device=device)
    clean = expected([features, weight, bias, labels, targets, weights], relu)
    with torch.no_grad():
        features[[1, 3]], targets[3], weight[0], bias[0] = NAN, NAN, NAN, NAN
    ours = with_gradients([features, weight, bias, labels, targets, weights], relu, backend)
    assert not ours[1][[1, 3]].any() and not ours[2][[0, 3, 4]].any() and not ours[3][[0, 3, 4]].any()
    assert max(errors(ours, clean)) < 5e-7


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [0, 3])
@LAYOUTS
def test_nothing_to_learn_from(n, backend, layout, device):
    # No RoIs, or only empty slots: zero, with a gradient path.
    features, weight, bias, labels, targets, _ = inputs(n, layout=layout, device=device)
    ours = with_gradients([features, weight, bias, labels.fill_(-1), targets, None], True, backend)
    assert [t.shape for t in ours[1:]] == [features.shape, weight.shape, bias.shape]
    assert not any(t.any() for t in ours)


@RELU
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_a_real_slot_is_seen(backend, relu, device):
    # A diverged trunk must show in the loss: a ReLU by maximum() would make its NaN a 0.
    arguments = inputs(device=device)
    with torch.no_grad():
        arguments[0][1, 7, 2, 2] = NAN
    loss, _, grad_weight, _ = with_gradients(arguments, relu, backend)
    assert loss.isnan() and grad_weight[arguments[3][1], 7].isnan()


@pytest.mark.parametrize("label", [3, 10**15])
@LAYOUTS
def test_label_out_of_range(label, layout, margins, device):  # noqa: F811
    # The operators themselves, as on a GPU: a NaN loss, no gradient of that RoI, nothing read or written outside. What
    # lies before and behind the features, the weight and the bias is NaN, so that one stray number would show.
    inside = slice(2, 5)
    features, weight, bias, _, targets, _ = inputs(7, 20, 7, layout=layout, device=device)
    with torch.no_grad():
        for tensor in (features, weight, bias, targets):
            tensor[:2], tensor[5:] = NAN, NAN
    arguments = [t.detach()[inside] for t in (features, weight, bias)]
    rest = [torch.tensor([label, 1, -1], device=device), targets[inside], None]
    loss, scale, slope, *sums, signs = op._forward._init_fn(*arguments, *rest, True)
    given = torch.ones((), device=device), arguments[1], rest[0], scale
    grads = [
        op._features._init_fn(*given, slope, signs, FP32, layout is NHWC, True),
        *op._weight._init_fn(*given, *sums),
    ]
    assert loss.isnan()
    # The stray RoI counts among two, so that everything of the other is half of what it is alone: exactly.
    leaves = [a.requires_grad_() for a in arguments]
    alone = with_gradients([*leaves, rest[0].clamp(max=1).where(rest[0] < 3, -1), *rest[1:]], True)[1:]
    for grad, half in zip(grads, alone, strict=True):
        assert torch.equal(grad, half / 2)
    assert grads[0][1].any() and not grads[0][[0, 2]].any()


def test_label_out_of_range_is_an_index_error(device, monkeypatch):
    # Always on a CPU; on a GPU, where looking stops the device, when it is asked for.
    arguments = inputs(2, 4, 3, device=device)
    arguments[3] = torch.tensor([3, -1], device=device)
    monkeypatch.setattr(checks, "DEBUG", True)
    with pytest.raises(IndexError, match=r"labels .* must lie in \[0, 3\), got 0 to 3"):
        mask_predictor_loss(*arguments)


class Elsewhere:
    """What the check asks of an index tensor that is on a GPU."""

    device = torch.device("cuda")

    def __init__(self, values: list[int]) -> None:
        values = torch.tensor(values)
        self.numel, self.min, self.max = values.numel, values.min, values.max


def test_debug_looks_at_indices_on_a_gpu(monkeypatch):
    monkeypatch.setattr(checks, "DEBUG", False)
    checks.check_indices(Elsewhere([0, 7]), 3, "labels")
    monkeypatch.setattr(checks, "DEBUG", True)
    checks.check_indices(Elsewhere([0, 2]), 3, "labels")
    for values in ([0, 7], [-1, 2]):
        with pytest.raises(IndexError, match=r"labels must lie in \[0, 3\)"):
            checks.check_indices(Elsewhere(values), 3, "labels")


def of_logits(logits: list[float], device: torch.device) -> list:
    """Arguments whose logits are these, exactly: one channel, a weight of 1 and no bias."""
    features = torch.tensor(logits, device=device).view(1, 1, 1, -1).requires_grad_()
    leaves = [torch.ones(1, 1, device=device).requires_grad_(), torch.zeros(1, device=device).requires_grad_()]
    return [features, *leaves, torch.zeros(1, dtype=torch.int64, device=device)]


@pytest.mark.parametrize("z", [0.0, 1e-3, 0.7, 3.0, 9.0, 12.0, 20.0, 60.0])
def test_loss_of_a_confident_model(z, device):
    # exp(-12) is 6e-6, and 1 + it loses five of its digits: all of this loss. The gradient is as small.
    arguments = [*of_logits([z, -z], device), torch.tensor([[[1.0, 0.0]]], device=device), None]
    loss, grad, *_ = with_gradients(arguments)
    truth = F.softplus(torch.tensor(-z, dtype=FP64)).item()  # PyTorch's loss loses it in fp64, too, for the largest
    assert abs(loss.item() / truth - 1) < 3e-7
    torch.testing.assert_close(grad.cpu().double(), expected(arguments)[1], rtol=0, atol=6e-8)  # sigmoid - 1 cancels


def test_extreme_logits_do_not_overflow(device):
    # exp(1000) would: the loss of a confident error is linear, its gradient 1.
    arguments = of_logits([1000.0, -1000.0, 90.0, -90.0], device)
    loss, grad, *_ = with_gradients([*arguments, torch.tensor([[[0.0, 1.0, 1.0, 0.0]]], device=device), None])
    assert loss.item() == 500.0
    torch.testing.assert_close(grad.flatten().cpu(), torch.tensor([0.25, -0.25, 0.0, 0.0]))


def test_auto_on_a_cpu_is_the_reference(monkeypatch):
    monkeypatch.setattr(reference, "mask_predictor_loss", lambda *arguments: "the reference")
    assert mask_predictor_loss(*inputs()) == "the reference"


@RELU
@pytest.mark.parametrize("backend", ["torch", "torchvision"])
def test_other_backends(backend, relu):
    # All slots filled: the ordinary path multiplies what is in an empty one by 0.
    arguments = inputs()
    arguments[-1] = torch.rand(4) + 0.5
    assert max(errors(with_gradients(arguments, relu, backend), expected(arguments, relu))) < 1e-6


SIZES_OF_ONE = """
import torch
from triton.runtime import driver
from bench.resources.worker import AbsentDevice
from kernels import MaskPool, mask_bce_loss, mask_predictor_loss, mask_targets
from kernels.runtime import record_launches
leaf = lambda *shape: torch.empty(shape).requires_grad_()
one, integer = torch.empty(1, 1, 1), lambda *shape, dtype=torch.int64: torch.zeros(shape, dtype=dtype)
with record_launches() as launches:
    leaves = [leaf(1, 1, 1, 1), leaf(1, 1), leaf(1)]
    torch.autograd.grad(mask_predictor_loss(*leaves, integer(1), one, backend="triton"), leaves)
    logits = leaf(1, 1, 1, 1)
    torch.autograd.grad(mask_bce_loss(logits, integer(1), one, backend="triton"), logits)
    mask_targets(MaskPool.of([one]), torch.empty(1, 1, 4), integer(1, 1), 1, backend="triton")
driver.set_active(AbsentDevice("sm_90"))
for launch in launches:
    print(launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.meta).name)
"""


def test_sizes_of_one_compile_for_a_gpu(tmp_path):
    # Triton makes an argument of 1 a constant, which is no tensor: one class, RoI, channel, object. The interpreter
    # does not, so this is a process that compiles for a GPU that is not here.
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    result = subprocess.run(
        [sys.executable, "-c", SIZES_OF_ONE], cwd=root, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert len(set(result.stdout.split())) == 7


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": torch.zeros(3, 6, 6)}, ValueError, "features must have 4 dimensions"),
        ({"features": torch.zeros(3, 4, 6, 6).int()}, TypeError, "features must be float16"),
        ({"features": torch.zeros(3, 4, 0, 6), "targets": torch.zeros(3, 0, 6)}, ValueError, "must not be empty"),
        ({"features": torch.zeros(3, 0, 6, 6), "weight": torch.zeros(2, 0)}, ValueError, "1 to 4096 channels, got 0"),
        ({"features": torch.zeros(0, 4097, 6, 6), "weight": torch.zeros(2, 4097)}, ValueError, "channels, got 4097"),
        ({"features": torch.zeros(3, 4, 6, 6).double()}, TypeError, "must both be float64 or neither"),
        ({"weight": torch.zeros(2, 5)}, ValueError, "weight must have the features' 4 channels"),
        ({"weight": torch.zeros(2, 4, 3, 3)}, ValueError, r"weight must have shape \[K, C\] or \[K, C, 1, 1\]"),
        ({"weight": torch.zeros(2, 4, 1)}, ValueError, "weight must have shape"),
        ({"weight": torch.zeros(0, 4), "bias": None}, ValueError, "must not be empty"),
        ({"weight": torch.zeros(2, 4, device="meta")}, ValueError, "all tensors must be on one device"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias must be \[2\]"),
        ({"bias": torch.zeros(2).half()}, ValueError, r"bias must be \[2\] of torch.float32"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, ValueError, r"labels must have shape \[3\]"),
        ({"labels": torch.zeros(3)}, TypeError, "labels must be an int64 tensor"),
        ({"targets": torch.zeros(3, 5, 6)}, ValueError, r"targets must have shape \[3, 6, 6\]"),
        ({"targets": torch.zeros(3, 6, 6, requires_grad=True)}, ValueError, "no gradient flows to the targets"),
        ({"weights": torch.zeros(4)}, ValueError, r"weights must have shape \[3\]"),
        ({"weights": torch.zeros(3, device="meta")}, ValueError, "all tensors must be on one device"),
        ({"backend": "cuda"}, ValueError, "unknown backend"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {
        "features": torch.zeros(3, 4, 6, 6), "weight": torch.zeros(2, 4), "bias": torch.zeros(2),
        "labels": torch.zeros(3, dtype=torch.int64), "targets": torch.zeros(3, 6, 6),
    } | change  # fmt: skip
    with pytest.raises(error, match=message):
        mask_predictor_loss(**arguments)
