"""The mask loss: each RoI's own class channel, and nothing of the others or of empty slots."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import mask_bce_loss
from kernels.mask_bce_loss import op


def inputs(n=5, k=4, m=6, dtype=torch.float32, device="cpu"):
    logits = (torch.randn(n, k, m, m) * 3).to(dtype).to(device).requires_grad_()
    return logits, torch.randint(0, k, (n,), device=device), torch.rand(n, m, m, device=device)


@pytest.fixture
def margins(poison, monkeypatch) -> Iterator[None]:
    """Fresh memory lies between margins, which have to be whole at the end of the test."""
    whole, margin = [], 256

    def between_margins(allocate):
        def allocate_between(*args, **kwargs) -> Tensor:
            like = allocate(*args, **kwargs)
            if type(like) is not Tensor or like.is_meta:
                return like
            whole.append(torch.full((like.numel() + 2 * margin,), 7, dtype=like.dtype, device=like.device))
            return whole[-1].as_strided(like.shape, like.stride(), margin).copy_(like)

        return allocate_between

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, between_margins(getattr(owner, name)))
    yield
    assert whole and all((t[:margin] == 7).all() and (t[-margin:] == 7).all() for t in whole)


# torchvision's 28 x 28, a size that fills no tile, one pixel, one class.
@pytest.mark.parametrize(("k", "m"), [(5, 28), (3, 7), (4, 1), (1, 6)])
def test_is_torchvisions_mask_loss(k, m, device):
    logits, labels, targets = inputs(6, k, m, device=device)
    ours = mask_bce_loss(logits, labels, targets, backend="triton")
    rows = torch.arange(6, device=device)
    theirs = F.binary_cross_entropy_with_logits(logits[rows, labels].double(), targets.double())
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-7)
    (ours_grad,) = torch.autograd.grad(ours, logits)
    (theirs_grad,) = torch.autograd.grad(theirs, logits)
    torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-5, atol=1e-9)
    other_channels = ours_grad.clone()
    other_channels[rows, labels] = 0
    assert (other_channels == 0).all()


# A program writes a stretch of the gradient's memory: small ones, that begin and end inside a pixel, a channel or a
# RoI, hold none of their own class's pixels, or several RoIs; and one that is the whole. One class, COCO's; maps of
# torchvision's size and of small heads, and not square.
@pytest.mark.parametrize(
    ("k", "m", "block", "own"),
    [
        (1, (7, 7), 64, 8),
        (3, (14, 14), 64, 8),
        (81, (7, 7), 1024, 32),
        (2, (5, 1), 16, 8),
        (2, (1, 5), 32, 2),
        (3, (28, 28), 1024, 64),
        (3, (7, 7), 1 << 16, 1024),
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_every_stretch_of_the_gradient(k, m, block, own, layout, margins, device, monkeypatch):
    # Nothing of it is left unwritten (it was NaN), and nothing beside it is written.
    n = 4
    monkeypatch.setattr(op, "tile", lambda on_gpu, interpreted: {4096: block, 128: own}.get(on_gpu, interpreted))
    logits = (torch.randn(n, k, *m, device=device) * 3).contiguous(memory_format=layout)
    labels, targets = torch.tensor([0, k, k - 1, -1], device=device), torch.rand(n, *m, device=device)
    scale = torch.rand(n, device=device)
    grad = op._backward._init_fn(torch.tensor(2.0, device=device), logits, labels, targets, scale)
    expected = torch.zeros(n, k, *m, device=device)
    for i, label in ((0, 0), (2, k - 1)):
        expected[i, label] = (logits[i, label].sigmoid() - targets[i]) * scale[i] * 2
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=3e-7)
    assert grad.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_fp64_stays_fp64(layout, device):
    # To fp64's own rounding, where one constant or scalar in fp32 would leave 1e-8.
    logits, labels, targets = inputs(3, 2, 7, torch.float64, device)
    leaf = logits.detach().contiguous(memory_format=layout).requires_grad_()
    targets, weights = targets.double(), torch.tensor([0.3, 0.9, 0.7], dtype=torch.float64, device=device)
    losses = [mask_bce_loss(leaf, labels, targets, weights, backend=b) for b in ("triton", "torch")]
    grads = [torch.autograd.grad(loss, leaf)[0] for loss in losses]
    assert losses[0].dtype == grads[0].dtype == torch.float64
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-15, atol=0)
    torch.testing.assert_close(*grads, rtol=1e-13, atol=1e-17)


@pytest.mark.parametrize("z", [0.0, 1e-3, 0.7, 3.0, 12.0, 60.0])
def test_loss_of_a_confident_model(z, device):
    # exp(-12) is 6e-6, and 1 + it loses five of its digits: all of this loss.
    logits = torch.tensor([z, -z], device=device).view(1, 1, 1, 2)
    targets, label = torch.tensor([[[1.0, 0.0]]], device=device), torch.zeros(1, dtype=torch.int64, device=device)
    truth = F.softplus(torch.tensor(-z, dtype=torch.float64)).item()
    assert abs(mask_bce_loss(logits, label, targets, backend="triton").item() / truth - 1) < 3e-7


def test_weights_and_empty_slots(device):
    # sum(w * l) / max(sum(w), 1): an empty slot's weight counts in neither sum.
    logits, _, targets = inputs(device=device)
    labels = torch.tensor([2, -1, 0, 3, -7], device=device)
    weights = torch.tensor([0.5, 9.0, 2.0, 0.0, float("nan")], device=device)
    loss = lambda i: F.binary_cross_entropy_with_logits(logits[i, labels[i]], targets[i])
    expected = (0.5 * loss(0) + 2.0 * loss(2)) / 2.5
    for backend in ("triton", "torch"):
        torch.testing.assert_close(mask_bce_loss(logits, labels, targets, weights, backend=backend), expected)
    small = mask_bce_loss(logits, labels, targets, weights / 10, backend="triton")
    torch.testing.assert_close(small, expected * 0.25)  # the weights sum to 0.25: divided by 1


@pytest.mark.parametrize("backend", ["triton", "torch", "torchvision"])
def test_nan_in_an_empty_slot_goes_nowhere(backend, device):
    # Padded slots hold whatever the head made of garbage boxes.
    logits, _, targets = inputs(device=device)
    labels = torch.tensor([1, -1, 2, -1, 0], device=device)
    with torch.no_grad():
        logits[1] = float("nan")
        targets[3] = float("nan")
    loss = mask_bce_loss(logits, labels, targets, backend=backend)
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite() and loss > 0
    assert grad.isfinite().all() and (grad[[1, 3]] == 0).all() and (grad[0, 1] != 0).all()


def test_nan_in_a_real_slot_is_seen(device):
    # A diverged model must show in the loss, on a GPU too, where max(NaN, 0) is 0.
    logits, labels, targets = inputs(device=device)
    with torch.no_grad():
        logits[0] = float("nan")
    assert mask_bce_loss(logits, labels, targets, backend="triton").isnan()


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("n", [0, 3])
def test_nothing_to_learn_from(n, backend, device):
    # No RoIs, or only empty slots: zero, with a gradient path, as torchvision's `mask_logits.sum() * 0`.
    logits, _, targets = inputs(n, device=device)
    loss = mask_bce_loss(logits, torch.full((n,), -1, device=device), targets, backend=backend)
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss == 0 and (grad == 0).all()


def test_gradcheck(device):
    # fp64 on the real kernels, an empty slot and weights among them.
    logits, _, targets = inputs(3, 2, 3, torch.float64, device)
    labels, weights = torch.tensor([1, -1, 0], device=device), torch.tensor([2.0, 1.0, 0.5], device=device)
    function = lambda z: mask_bce_loss(z, labels, targets, weights, backend="triton")
    assert torch.autograd.gradcheck(function, logits)


def test_extreme_logits_do_not_overflow(device):
    # exp(1000) would: the loss of a confident error is linear, its gradient 1.
    logits = torch.tensor([1000.0, -1000.0, 90.0, -90.0], device=device).view(1, 1, 2, 2).requires_grad_()
    targets = torch.tensor([0.0, 1.0, 1.0, 0.0], device=device).view(1, 2, 2)
    loss = mask_bce_loss(logits, torch.zeros(1, dtype=torch.int64, device=device), targets, backend="triton")
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 500.0
    torch.testing.assert_close(grad.flatten().cpu(), torch.tensor([0.25, -0.25, 0.0, 0.0]))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 2**-7)])
def test_half_types(dtype, tolerance, device):
    # Sums in fp32, so the loss is that of the rounded logits; the gradient has the logits' dtype.
    logits, labels, targets = inputs(dtype=dtype, device=device)
    loss = mask_bce_loss(logits, labels, targets, backend="triton")
    truth = mask_bce_loss(logits.detach().double().requires_grad_(), labels, targets, backend="torch")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(loss, logits)
    (expected,) = torch.autograd.grad(
        mask_bce_loss(z := logits.detach().double().requires_grad_(), labels, targets, backend="torch"), z
    )
    assert grad.dtype == dtype
    torch.testing.assert_close(grad.double(), expected, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float16, torch.float64])
def test_target_dtypes(dtype, device):
    # Hard targets may stay bits and bytes.
    logits, labels, targets = inputs(device=device)
    hard = (targets > 0.5).to(dtype)
    ours = mask_bce_loss(logits, labels, hard, backend="triton")
    torch.testing.assert_close(ours, mask_bce_loss(logits, labels, hard.float(), backend="torch"))


def test_strided_inputs(device):
    # channels_last, a slice of a wider tensor, strided targets: the same numbers.
    logits, labels, targets = inputs(device=device)
    expected = mask_bce_loss(logits, labels, targets, backend="torch")
    wide = torch.cat([logits, logits], dim=3)[..., 6:]
    for other in (
        logits.contiguous(memory_format=torch.channels_last),
        wide,
        logits.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        leaf = other.detach().requires_grad_()
        assert leaf.stride() != logits.stride()
        loss = mask_bce_loss(leaf, labels, targets.transpose(1, 2).contiguous().transpose(1, 2), backend="triton")
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(
            torch.autograd.grad(loss, leaf), torch.autograd.grad(expected, logits, retain_graph=True)
        )


def test_label_out_of_range(device):
    # The kernel, called directly as on a GPU: NaN loss, no gradient, nothing read or written outside.
    logits, labels, targets = inputs(2, 3, 4, device=device)
    labels = torch.tensor([3, 1], device=device)
    loss, scale = op._forward(logits, labels, targets, None)
    assert loss.isnan() and scale.isfinite().all()
    grad = op._backward(torch.ones((), device=device), logits, labels, targets, scale)
    assert (grad[0] == 0).all() and (grad[1, 1] != 0).any()
    with pytest.raises(IndexError, match=r"labels .* must lie in \[0, 3\), got 1 to 3"):
        mask_bce_loss(logits.cpu(), labels.cpu(), targets.cpu())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(3, 6, 6)}, ValueError, "logits must have 4 dimensions"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, ValueError, r"labels must have shape \[3\]"),
        ({"labels": torch.zeros(3)}, TypeError, "labels must be an int64 tensor"),
        ({"targets": torch.zeros(3, 5, 6)}, ValueError, r"targets must have shape \[3, 6, 6\]"),
        ({"targets": torch.zeros(3, 6, 6).long()}, TypeError, "targets must be a floating, bool or uint8"),
        ({"targets": torch.zeros(3, 6, 6, requires_grad=True)}, ValueError, "no gradient flows to the targets"),
        ({"weights": torch.zeros(4)}, ValueError, r"weights must have shape \[3\]"),
        ({"weights": torch.zeros(3, device="meta")}, ValueError, "all tensors must be on one device"),
        ({"logits": torch.zeros(3, 0, 6, 6)}, ValueError, "logits must not be empty"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {
        "logits": torch.zeros(3, 2, 6, 6), "labels": torch.zeros(3, dtype=torch.int64), "targets": torch.zeros(3, 6, 6)
    } | change  # fmt: skip
    with pytest.raises(error, match=message):
        mask_bce_loss(**arguments)


def test_bytes_that_are_no_targets():
    # 255, as image files hold it, would make the loss negative. What an empty slot holds is nobody's business.
    logits, labels, targets = inputs()
    whites = (targets > 0.5).to(torch.uint8) * 255
    with pytest.raises(IndexError, match=r"targets of bytes must lie in \[0, 2\), got 0 to 255"):
        mask_bce_loss(logits, labels, whites)
    assert mask_bce_loss(logits, torch.full_like(labels, -1), whites) == 0
