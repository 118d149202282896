"""Anchor labels: bit-equal to torchvision's box_iou + Matcher, and never the [A, G] matrix."""

import numpy as np
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


@pytest.mark.parametrize("flags", [{}, {"low_inclusive": True, "require_overlap": True}])
def test_zero_over_zero_stays_positive(flags, device):
    # A box without area on an anchor without area: NaN in torchvision, false in both of Matcher's comparisons.
    anchors = torch.tensor([[5.0, 5, 5, 5], [0, 0, 10, 10], [40, 40, 50, 50]])
    gt = torch.tensor([[[5.0, 5, 5, 5], [0, 0, 10, 9]]])
    labels, matched = check(anchors, gt, [2], device, **flags)
    assert labels.tolist() == [[1, 1, 0]]
    assert matched.tolist() == [[0, 1, 0]]


def brute_force(anchors, gt_boxes, high, low, low_quality, low_inclusive, require_overlap):
    """One image's labels, rule by rule, in numpy's fp32 scalars."""
    iou = [[_iou(g, a) for g in gt_boxes.numpy()] for a in anchors.numpy()]
    best_of_gt = [max(row[g] for row in iou) for g in range(len(gt_boxes))]
    high, low = np.float32(high), np.float32(low)
    labels = []
    for row in iou:
        claimed = any(v == b and (b > 0 or not require_overlap) for v, b in zip(row, best_of_gt, strict=True))
        background = max(row) <= low if low_inclusive else max(row) < low
        positive = max(row) >= high or (low_quality and claimed)
        labels.append(1 if positive else 0 if background else -1)
    return labels


def _iou(a, b):
    width = max(min(a[2], b[2]) - max(a[0], b[0]), np.float32(0))
    height = max(min(a[3], b[3]) - max(a[1], b[1]), np.float32(0))
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (areas - width * height)


@pytest.mark.parametrize("low_quality", [True, False])
@pytest.mark.parametrize("low_inclusive", [True, False])
@pytest.mark.parametrize("require_overlap", [True, False])
def test_flags_against_brute_force(low_quality, low_inclusive, require_overlap, device):
    # Whole-pixel boxes, whose IoUs often are the low threshold, 1/3, exactly; with and without an object that
    # overlaps nothing. The counts show that each flag has something to decide.
    anchors, gt = random_boxes(150, side=24).round(), random_boxes(2, 6, side=24).round()
    anchors[:10], gt[:, 0] = torch.tensor([0.0, 0, 10, 10]), torch.tensor([0.0, 5, 10, 15])
    gt[1, 5] = torch.tensor([500.0, 500, 510, 510])
    options = {"low_inclusive": low_inclusive, "require_overlap": require_overlap}
    thresholds = {"high_threshold": 0.6, "low_threshold": 1 / 3}
    labels, _ = check(anchors, gt, [6, 6], device, allow_low_quality_matches=low_quality, **thresholds, **options)
    wanted = [brute_force(anchors, boxes, 0.6, 1 / 3, low_quality, low_inclusive, require_overlap) for boxes in gt]
    assert labels.tolist() == wanted
    plain, _ = check(anchors, gt, [6, 6], device, allow_low_quality_matches=low_quality, **thresholds)
    assert (labels[0] != plain[0]).any() == low_inclusive
    assert (labels[1] != plain[1]).any() == (require_overlap if low_quality else low_inclusive)


def test_low_inclusive_at_the_threshold(device):
    # 0.3 as fp32, the numbers next to it, and the high threshold: only the one exactly on it changes sides.
    gt = torch.tensor([[[0.0, 0, 10, 10]]])
    anchors = torch.tensor([[0.0, 0, 10, 7], [0, 0, 10, 3], [0, 0, 10, 2.9999], [0, 0, 10, 3.0001]])
    options = {"allow_low_quality_matches": False, "low_inclusive": True}
    assert check(anchors, gt, [1], device, **options)[0].tolist() == [[1, 0, 0, -1]]
    # Where both thresholds are one number, an IoU on it is positive, whichever way the low one is closed.
    same = {"high_threshold": 0.3, "low_threshold": 0.3}
    assert check(anchors, gt, [1], device, **same, **options)[0].tolist() == [[1, 1, 0, 1]]


def test_require_overlap(device):
    # The object that overlaps nothing claims nothing; the one with a small overlap still claims its best anchor.
    gt = torch.tensor([[[500.0, 500, 510, 510], [0, 0, 10, 10]]])
    anchors = torch.tensor([[9.0, 9, 19, 19], [100, 100, 110, 110], [8, 8, 18, 18]])
    assert check(anchors, gt, [2], device, require_overlap=True)[0].tolist() == [[0, 0, 1]]
    assert check(anchors, gt, [1], device, require_overlap=True)[0].tolist() == [[0, 0, 0]]
    assert check(anchors, gt, [2], device)[0].tolist() == [[1, 1, 1]]
    # Between the anchors and of their size: it cannot be passed over for lying apart from them, nor for its size.
    between = torch.tensor([[[50.0, 50, 60, 60]]])
    assert check(anchors, between, [1], device, require_overlap=True)[0].tolist() == [[0, 0, 0]]
    assert check(anchors, between, [1], device)[0].tolist() == [[1, 1, 1]]


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
        op._label._init_fn(anchors.to(device), gt.to(device), count.to(device), 0.7, 0.3, True, False, False)
    assert 500 * 4 <= largest.bytes <= 500 * 4 * 4 < 500 * 40 * 4


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"anchors": torch.zeros(3, 5)}, ValueError, "anchors must have 2 dimensions, the last of size 4"),
        ({"anchors": torch.zeros(3, 4).half()}, TypeError, "must be float32"),
        ({"gt_boxes": torch.zeros(3, 4)}, ValueError, "gt_boxes must have 3 dimensions"),
        ({"gt_count": torch.tensor([1, 2])}, ValueError, r"gt_count must have shape \[1\]"),
        ({"gt_count": torch.tensor([1.0])}, TypeError, "gt_count must be an int32 or int64"),
        ({"gt_count": torch.zeros(1, device="meta").int()}, ValueError, "all tensors must be on one device"),
        ({"low_threshold": 0.8}, ValueError, "0 <= low <= high, got low_threshold 0.8"),
        ({"low_threshold": -0.1}, ValueError, "0 <= low <= high"),
        ({"high_threshold": float("nan")}, ValueError, "0 <= low <= high"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {
        "anchors": torch.zeros(3, 4), "gt_boxes": torch.zeros(1, 2, 4), "gt_count": torch.tensor([2])
    } | change  # fmt: skip
    with pytest.raises(error, match=message):
        label_anchors(**arguments)
