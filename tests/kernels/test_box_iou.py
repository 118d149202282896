"""The IoU matrix and its gradient, against torchvision and the fp64 reference."""

import pytest
import torch
import torchvision

from kernels import box_iou
from kernels.box_iou import reference


def random_boxes(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    corner = torch.rand(*shape, 2, dtype=dtype) * 40
    return torch.cat([corner, corner + torch.rand(*shape, 2, dtype=dtype) * 30], dim=-1)


# One pair, sizes that fill no tile, more than one tile on a GPU, and none at all.
@pytest.mark.parametrize(("n", "m"), [(1, 1), (37, 150), (130, 5), (0, 4), (3, 0), (0, 0)])
def test_bit_equal_to_torchvision(n, m, device):
    a, b = random_boxes(n), random_boxes(m)
    if n > 2 and m > 2:
        b[0], b[1] = a[0], a[1][[2, 3, 0, 1]]  # the same box, an inverted one
    ours = box_iou(a.to(device), b.to(device), backend="triton").cpu()
    assert torch.equal(ours, torchvision.ops.box_iou(a, b))


def test_zero_over_zero_is_nan(device):
    # Two boxes without area: torchvision's answer, which anchor matching has to know about.
    point = torch.tensor([[3.0, 3.0, 3.0, 3.0]], device=device)
    assert box_iou(point, point, backend="triton").isnan().all()
    assert torchvision.ops.box_iou(point.cpu(), point.cpu()).isnan().all()


def test_batched(device):
    # Each batch entry on its own; the flat offset of the last one must not mix with the first.
    a, b = random_boxes(3, 9).to(device), random_boxes(3, 20).to(device)
    ours = box_iou(a, b, backend="triton")
    assert ours.shape == (3, 9, 20)
    for i in range(3):
        torch.testing.assert_close(ours[i].cpu(), torchvision.ops.box_iou(a[i].cpu(), b[i].cpu()), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype, device):
    # Half types are widened first, so the result is that of the fp32 boxes, in fp32.
    a, b = random_boxes(11).to(dtype), random_boxes(7).to(dtype)
    ours = box_iou(a.to(device), b.to(device), backend="triton")
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    truth = reference.box_iou(a.double(), b.double())
    torch.testing.assert_close(ours.cpu().double(), truth, rtol=1e-6, atol=1e-7)


def test_gradcheck(device):
    # Both arguments, batched; disjoint, overlapping and nested pairs.
    a, b = random_boxes(2, 5, dtype=torch.float64).to(device), random_boxes(2, 4, dtype=torch.float64).to(device)
    b[0, 0] = a[0, 0] + torch.tensor([-1.0, -1.0, 1.0, 1.0], device=device)
    function = lambda x, y: box_iou(x, y, backend="triton")
    assert torch.autograd.gradcheck(function, (a.requires_grad_(), b.requires_grad_()))


def test_gradient_at_ties_is_pytorchs(device):
    # Shared edges and touching boxes have no derivative; autograd's convention (halves) is ours too.
    a = torch.tensor([[0.0, 0, 4, 4], [1, 1, 3, 3]], device=device, requires_grad=True)
    b = torch.tensor([[0.0, 0, 4, 4], [4, 0, 6, 4], [1, 2, 3, 5]], device=device, requires_grad=True)
    weight = torch.randn(2, 3, device=device)
    ours = torch.autograd.grad((box_iou(a, b, backend="triton") * weight).sum(), (a, b))
    theirs = torch.autograd.grad((box_iou(a, b, backend="torch") * weight).sum(), (a, b))
    torch.testing.assert_close(ours, theirs)


def test_strided_inputs(device):
    # Every second row of a wider tensor, and a gradient of stride 0.
    a = random_boxes(10).to(device)[::2].requires_grad_()
    b = torch.cat([random_boxes(6), random_boxes(6)], dim=1).to(device)[:, 2:6]
    ours, theirs = box_iou(a, b, backend="triton"), box_iou(a, b, backend="torch")
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), a), torch.autograd.grad(theirs.sum(), a))


@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        (torch.zeros(3, 5), torch.zeros(2, 4), ValueError, r"boxes1 .* must have 2 dimensions, the last of size 4"),
        (
            torch.zeros(3, 4),
            torch.zeros(1, 2, 4),
            ValueError,
            r"boxes2 \(unless both are batched\) must have 2",
        ),
        (torch.zeros(3, 2, 4), torch.zeros(1, 2, 4), ValueError, "batch sizes differ"),
        (torch.zeros(3, 4).int(), torch.zeros(2, 4), TypeError, "boxes1 .* must be float16"),
        (torch.zeros(3, 4), torch.zeros(2, 4).half(), TypeError, "must share a dtype"),
        (torch.zeros(3, 4), torch.zeros(2, 4, device="meta"), ValueError, "all tensors must be on one device"),
        (None, torch.zeros(2, 4), TypeError, "boxes1 .* must be a tensor, got NoneType"),
    ],
)
def test_bad_arguments(a, b, error, message):
    with pytest.raises(error, match=message):
        box_iou(a, b)
