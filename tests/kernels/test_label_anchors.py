"""Anchor labels: bit-equal to torchvision's box_iou + Matcher, and never the [A, G] matrix."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import label_anchors
from kernels.label_anchors import op


def random_boxes(*shape: int, side: float = 60) -> torch.Tensor:
    corner = torch.rand(*shape, 2) * side
    return torch.cat([corner, corner + torch.rand(*shape, 2) * 30], dim=-1)


def check(anchors, gt_boxes, gt_count, device, **options):
    """Labels and matches of the Triton kernels, after comparing them with torchvision's and the reference's."""
    gt_count = torch.tensor(gt_count, dtype=torch.int32)
    moved = anchors.to(device), gt_boxes.to(device), gt_count.to(device)
    labels, matched = (t.cpu() for t in label_anchors(*moved, **options, backend="triton"))
    assert labels.dtype == torch.int8 and matched.dtype == torch.int32
    for backend in ("torchvision", "torch"):
        other_labels, other_matched = label_anchors(anchors, gt_boxes, gt_count, **options, backend=backend)
        assert torch.equal(labels, other_labels), backend
        assert torch.equal(matched, other_matched), backend
    return labels, matched


@pytest.mark.parametrize("low_quality", [True, False])
@pytest.mark.parametrize("thresholds", [(0.7, 0.3), (0.5, 0.5), (0.4, 0.1)])
def test_random_boxes(low_quality, thresholds, device):
    # Enough anchors for every kind of label; images with different numbers of objects.
    options = {"high_threshold": thresholds[0], "low_threshold": thresholds[1]}
    labels, _ = check(
        random_boxes(3000), random_boxes(3, 20), [20, 7, 1], device, allow_low_quality_matches=low_quality, **options
    )
    kinds = {1, 0} if thresholds == (0.5, 0.5) else {1, 0, -1}
    assert set(labels.unique().tolist()) == kinds


def test_ties_go_to_the_first_object(device):
    # Duplicated objects and anchors: equal IoUs everywhere, and all of a tie's anchors are positive.
    gt = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 10], [20, 20, 30, 30]]])
    anchors = torch.tensor([[0.0, 0, 10, 5], [0, 5, 10, 10], [0, 0, 10, 5], [21, 20, 31, 30]])
    labels, matched = check(anchors, gt, [3], device)
    assert labels.tolist() == [[1, 1, 1, 1]]
    assert matched.tolist() == [[0, 0, 0, 2]]


def test_low_quality_match_keeps_its_own_best_object(device):
    # The anchor is object 0's best one, but overlaps object 1 more: positive, matched to object 1.
    gt = torch.tensor([[[0.0, 0, 10, 40], [0, 0, 10, 12]]])
    anchors = torch.tensor([[0.0, 0, 10, 20], [50, 50, 60, 60]])
    labels, matched = check(anchors, gt, [2], device)
    assert labels.tolist() == [[1, 0]]
    assert matched.tolist() == [[1, 0]]


def test_iou_exactly_on_a_threshold(device):
    # 0.7 and 0.3 as fp32 on both sides: at the high threshold positive, at the low one ignored.
    gt = torch.tensor([[[0.0, 0, 10, 10]]])
    anchors = torch.tensor([[0.0, 0, 10, 7], [0, 0, 10, 3], [0, 0, 10, 2.9999], [0, 0, 10, 6.9999]])
    labels, _ = check(anchors, gt, [1], device, allow_low_quality_matches=False)
    assert labels.tolist() == [[1, -1, 0, -1]]


def test_object_that_overlaps_nothing_makes_every_anchor_positive(device):
    # torchvision's quirk: its best IoU is 0, and all anchors have that.
    labels, _ = check(random_boxes(50), torch.tensor([[[500.0, 500, 510, 510]]]), [1], device)
    assert (labels == 1).all()


def test_zero_over_zero_stays_positive(device):
    # A box without area on an anchor without area: NaN in torchvision, false in both of Matcher's comparisons.
    anchors = torch.tensor([[5.0, 5, 5, 5], [0, 0, 10, 10], [40, 40, 50, 50]])
    gt = torch.tensor([[[5.0, 5, 5, 5], [0, 0, 10, 9]]])
    labels, matched = check(anchors, gt, [2], device)
    assert labels.tolist() == [[1, 1, 0]]
    assert matched.tolist() == [[0, 1, 0]]


def test_images_without_objects(device):
    # None at all in the batch, none in one image, no image.
    labels, matched = check(random_boxes(30), torch.zeros(2, 0, 4), [0, 0], device)
    assert (labels == 0).all() and (matched == 0).all()
    labels, _ = check(random_boxes(30), random_boxes(2, 5), [0, 5], device)
    assert (labels[0] == 0).all() and (labels[1] == 1).any()
    assert label_anchors(random_boxes(3), torch.zeros(0, 2, 4), torch.zeros(0, dtype=torch.int32))[0].shape == (0, 3)


def test_no_anchors(device):
    labels, matched = check(torch.zeros(0, 4), random_boxes(2, 3), [3, 1], device)
    assert labels.shape == matched.shape == (2, 0)


def test_empty_slots_do_not_matter(device):
    # Whatever lies behind the count, NaN and perfect matches included, and a count beyond the capacity.
    anchors, gt = random_boxes(200), random_boxes(1, 6)
    clean = check(anchors, gt[:, :3], [3], device)
    gt[0, 3], gt[0, 4] = float("nan"), anchors[0]
    dirty = label_anchors(anchors.to(device), gt.to(device), torch.tensor([3], device=device), backend="triton")
    assert torch.equal(clean[0], dirty[0].cpu()) and torch.equal(clean[1], dirty[1].cpu())
    over = label_anchors(anchors.to(device), gt[:, :3].to(device), torch.tensor([9], device=device), backend="triton")
    assert torch.equal(clean[0], over[0].cpu())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_object_that_is_not_finite_is_none(bad, device):
    # torchvision would make every anchor positive; here the other objects' labels stand, indices unmoved.
    gt = random_boxes(1, 3)
    anchors = random_boxes(300)
    expected, _ = check(anchors, gt[:, [0, 2]], [2], device)
    gt[0, 1, 2] = bad
    labels, matched = check(anchors, gt, [3], device)
    assert torch.equal(labels, expected)
    assert set(matched.unique().tolist()) == {0, 2}


def test_strided_inputs(device):
    # Anchors and boxes that are columns of wider tensors.
    anchors, gt = random_boxes(400), random_boxes(2, 5)
    wide_anchors = torch.cat([anchors, anchors], dim=1).to(device)[:, 4:]
    wide_gt = torch.cat([gt, gt], dim=2).to(device)[..., 4:]
    ours = label_anchors(wide_anchors, wide_gt, torch.tensor([5, 2], device=device), backend="triton")
    expected = check(anchors, gt, [5, 2], device)
    assert torch.equal(ours[0].cpu(), expected[0]) and torch.equal(ours[1].cpu(), expected[1])


def test_the_matrix_is_never_formed(device):
    # The largest tensor that the op's body creates is [A, 4]-sized, not [A, G]. (In bytes: the interpreter copies
    # its arguments as bytes.)
    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
            return out

    anchors, gt, count = random_boxes(500), random_boxes(1, 40), torch.tensor([40], dtype=torch.int32)
    with Largest() as largest:
        op._label._init_fn(anchors.to(device), gt.to(device), count.to(device), 0.7, 0.3, True)
    assert 500 * 4 <= largest.bytes <= 500 * 4 * 4 < 500 * 40 * 4


def test_opcheck(device):
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (random_boxes(5), random_boxes(2, 3), torch.tensor([3, 1], dtype=torch.int32), 0.7, 0.3, True)
    moved = tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments)
    torch.library.opcheck(op._label, moved, test_utils=checks)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"anchors": torch.zeros(3, 5)}, ValueError, "anchors must have 2 dimensions, the last of size 4"),
        ({"anchors": torch.zeros(3, 4).half()}, TypeError, "must be float32"),
        ({"gt_boxes": torch.zeros(3, 4)}, ValueError, "gt_boxes must have 3 dimensions"),
        ({"gt_count": torch.tensor([1, 2])}, ValueError, r"gt_count must have shape \[1\]"),
        ({"gt_count": torch.tensor([1.0])}, TypeError, "gt_count must be an int32 or int64"),
        ({"gt_count": torch.zeros(1, device="meta").int()}, ValueError, "all tensors must be on one device"),
        ({"low_threshold": 0.8}, ValueError, "must not exceed high_threshold"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {
        "anchors": torch.zeros(3, 4), "gt_boxes": torch.zeros(1, 2, 4), "gt_count": torch.tensor([2])
    } | change  # fmt: skip
    with pytest.raises(error, match=message):
        label_anchors(**arguments)
