"""The matrices of IoUs and of generalised IoUs and their gradients, against torchvision and the fp64 reference."""

import itertools

import pytest
import torch
import torchvision

from kernels import box_iou, generalized_box_iou
from kernels.box_iou import op, reference

OPS = {
    "iou": (box_iou, torchvision.ops.box_iou, reference.box_iou),
    "giou": (generalized_box_iou, torchvision.ops.generalized_box_iou, reference.generalized_box_iou),
}
both = pytest.mark.parametrize(("ours", "theirs", "plain"), OPS.values(), ids=OPS)


def random_boxes(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    corner = torch.rand(*shape, 2, dtype=dtype) * 40
    return torch.cat([corner, corner + torch.rand(*shape, 2, dtype=dtype) * 30], dim=-1)


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """To the last bit, but for the sign of 0."""
    torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=0, equal_nan=True)


def check_against_torchvision(n, m, ours, theirs, device) -> None:
    a, b = random_boxes(n), random_boxes(m)
    if n > 2 and m > 2:
        b[0], b[1] = a[0], a[1][[2, 3, 0, 1]]  # the same box, an inverted one
    assert_equal(ours(a.to(device), b.to(device), backend="triton"), theirs(a, b))


# One pair; rows and columns that fill no tile; more than one tile, of rows and of columns, on a GPU and interpreted;
# the transposed kind of sizes, few rows by many columns; and none at all.
@pytest.mark.parametrize(
    ("n", "m"), [(1, 1), (2, 150), (37, 150), (130, 5), (2050, 3), (3, 1100), (0, 4), (3, 0), (0, 0)]
)
@both
def test_bit_equal_to_torchvision(n, m, ours, theirs, plain, device):
    check_against_torchvision(n, m, ours, theirs, device)


# Stores of 1, 2 and 4 numbers; less than a narrow chunk, just one, one and a bit; wide ones only, and both kinds.
@pytest.mark.parametrize("m", [2, 3, 4, 7, 8, 9, 12, 16, 18, 64, 80, 100])
def test_every_chunk_of_columns(m, device):
    check_against_torchvision(5, m, box_iou, torchvision.ops.box_iou, device)


SPECIAL = [0.0, 1.0, -2.5, 1e-42, 1e-20, 3e38, float("inf"), -float("inf"), float("nan")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@both
def test_special_numbers(ours, theirs, plain, dtype, device):
    # Zero, subnormal, infinite and inverted areas: the kernel replaces a dividend of 0, and none of them may show it.
    # Not -0.0 for the generalised one: it divides by hulls without area, whose sign is then max(-0.0, 0.0)'s.
    numbers = SPECIAL if ours is generalized_box_iou else [-0.0, *SPECIAL]
    boxes = torch.tensor(list(itertools.product(numbers, repeat=4)))
    partners = torch.cat([boxes[torch.randperm(len(boxes))[:60]], random_boxes(4), torch.zeros(1, 4)])
    a, b = boxes[torch.randperm(len(boxes))[:4000]].to(dtype), partners.to(dtype)
    expected = theirs(a, b)
    assert_equal(ours(a.to(device), b.to(device), backend="triton"), expected)
    for kind in (expected.isnan(), expected == 0):
        assert 0 < kind.sum() < kind.numel()


@both
def test_zero_over_zero_is_nan(ours, theirs, plain, device):
    # Two boxes without area: torchvision's answer, which anchor matching has to know about.
    point = torch.tensor([[3.0, 3.0, 3.0, 3.0]])
    assert ours(point.to(device), point.to(device), backend="triton").isnan().all()
    assert theirs(point, point).isnan().all()


def test_known_values(device):
    # The paper's limits: equal boxes 1, touching ones by the hull, ever further apart towards -1, nested ones the IoU.
    a = torch.tensor([[0.0, 0, 2, 2]], device=device)
    b = torch.tensor([[0.0, 0, 2, 2], [2, 0, 4, 2], [2, 2, 4, 4], [0, 0, 1, 1], [98, 0, 100, 2], [0, 0, 0, 0]])
    b = b.to(device)
    iou, giou = box_iou(a, b, backend="triton"), generalized_box_iou(a, b, backend="triton")
    assert iou.tolist() == [[1, 0, 0, 0.25, 0, 0]]
    torch.testing.assert_close(giou.cpu(), torch.tensor([[1, 0, -0.5, 0.25, -0.96, 0]]))


@both
def test_batched(ours, theirs, plain, device):
    # Each batch entry on its own; the flat offset of the last one must not mix with the first.
    a, b = random_boxes(3, 9), random_boxes(3, 20)
    matrices = ours(a.to(device), b.to(device), backend="triton")
    assert matrices.shape == (3, 9, 20)
    assert_equal(matrices, torch.stack([theirs(x, y) for x, y in zip(a, b, strict=True)]))


def test_empty_batches(device):
    # No entry, entries without boxes: nothing to launch, and the shape as ever.
    for shape1, shape2 in [((0, 3), (0, 4)), ((2, 0), (2, 4)), ((2, 3), (2, 0))]:
        a, b = random_boxes(*shape1).to(device).requires_grad_(), random_boxes(*shape2).to(device)
        matrices = box_iou(a, b, backend="triton")
        assert matrices.shape == (shape1[0], shape1[1], shape2[1])
        assert torch.equal(torch.autograd.grad(matrices.sum(), a)[0], torch.zeros_like(a))


@pytest.mark.parametrize("rows", [1, 7, 256, 2099, 10**6])
@pytest.mark.parametrize("m", [1, 4, 100, 1000, 268_569, 2**31 - 1])
def test_programs_share_all_columns(rows, m):
    # Whole wide chunks each, so that only the last program has narrow ones; a grid's second side ends at 65535.
    span = op._chunks(rows, m, 16) * 16
    programs = -(-m // span)
    assert (programs - 1) * span < m <= programs * span
    assert programs <= op.PROGRAMS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="9 GB that only a GPU fills quickly")
def test_offsets_beyond_32_bits(device):
    # 2.2e9 numbers: the last rows' offsets do not fit into an int32, the first half's do.
    a, b = random_boxes(268_569), random_boxes(8200)
    matrix = box_iou(a.to(device), b.to(device), backend="triton")
    assert_equal(matrix[-3:], torchvision.ops.box_iou(a[-3:], b))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@both
def test_other_dtypes(ours, theirs, plain, dtype, device):
    # Half types are widened first, so the result is that of the fp32 boxes, in fp32.
    a, b = random_boxes(11).to(dtype), random_boxes(7).to(dtype)
    matrix = ours(a.to(device), b.to(device), backend="triton")
    assert matrix.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(matrix.cpu().double(), plain(a.double(), b.double()), rtol=1e-6, atol=1e-6)


@both
def test_reference_is_torchvisions(ours, theirs, plain):
    # What gradients are compared with, and what runs on a CPU.
    a, b = random_boxes(20), random_boxes(30)
    assert_equal(plain(a, b), theirs(a, b))


@both
def test_gradcheck(ours, theirs, plain, device):
    # Both arguments, batched; disjoint, overlapping and nested pairs.
    a, b = random_boxes(2, 5, dtype=torch.float64).to(device), random_boxes(2, 4, dtype=torch.float64).to(device)
    b[0, 0] = a[0, 0] + torch.tensor([-1.0, -1.0, 1.0, 1.0], device=device)
    function = lambda x, y: ours(x, y, backend="triton")
    assert torch.autograd.gradcheck(function, (a.requires_grad_(), b.requires_grad_()), fast_mode=True)


def gradients(function, a, b, weight, **options) -> tuple[torch.Tensor, ...]:
    leaves = a.detach().requires_grad_(), b.detach().requires_grad_()
    return torch.autograd.grad((function(*leaves, **options) * weight).sum(), leaves)


@both
def test_gradient_in_fp32(ours, theirs, plain, device):
    # More partners than a tile of the backward has, on a GPU; the truth is autograd's of the reference in fp64.
    a, b = random_boxes(70).to(device), random_boxes(90).to(device)
    weight = torch.randn(70, 90, device=device)
    result = gradients(ours, a, b, weight, backend="triton")
    truth = gradients(plain, a.double(), b.double(), weight.double())
    torch.testing.assert_close(tuple(g.double() for g in result), truth, rtol=1e-4, atol=1e-5)


@both
def test_gradient_at_ties_is_pytorchs(ours, theirs, plain, device):
    # Shared edges and touching boxes have no derivative; autograd's convention (halves) is ours too. Also of a box
    # without area, and of an inverted one whose hull with its equal has none.
    a = torch.tensor([[0.0, 0, 4, 4], [1, 1, 3, 3], [5, 1, 4, 3]], device=device)
    b = torch.tensor([[0.0, 0, 4, 4], [4, 0, 6, 4], [1, 2, 3, 5], [2, 2, 2, 2], [1, 0, 3, 0]], device=device)
    weight = torch.randn(3, 5, device=device)
    result = gradients(ours, a, b, weight, backend="triton")
    assert all(g.isfinite().all() for g in result)
    torch.testing.assert_close(result, gradients(plain, a, b, weight))


@both
def test_strided_inputs(ours, theirs, plain, device):
    # Every second row of a wider tensor, and a gradient of stride 0.
    a = random_boxes(10).to(device)[::2].requires_grad_()
    b = torch.cat([random_boxes(6), random_boxes(6)], dim=1).to(device)[:, 2:6]
    result, expected = ours(a, b, backend="triton"), plain(a, b)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(torch.autograd.grad(result.sum(), a), torch.autograd.grad(expected.sum(), a))


@both
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
def test_bad_arguments(ours, theirs, plain, a, b, error, message):
    with pytest.raises(error, match=message):
        ours(a, b)
