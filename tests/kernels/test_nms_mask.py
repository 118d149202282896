"""Grouped greedy NMS: torchvision's CPU op on every group, without the [n, n] matrix."""

import pytest
import torch
import torchvision

from kernels import nms_mask
from kernels.nms_mask import op, reference

BACKENDS = ["triton", "torch", "torchvision"]


def crowded(groups: int, n: int) -> torch.Tensor:
    """Boxes that overlap many others, so that what suppresses is itself suppressed."""
    corner = torch.rand(groups, n, 2) * 40
    return torch.cat([corner, corner + 5 + torch.rand(groups, n, 2) * 25], dim=-1)


def kept(boxes, valid, threshold, device, backend="triton"):
    """The op's answer, on the CPU."""
    keep = nms_mask(boxes.to(device), valid.to(device), threshold, backend=backend)
    assert keep.dtype == torch.bool and keep.shape == valid.shape
    return keep.cpu()


def expected(boxes, valid, threshold):
    """torchvision's CPU op, one group after the other."""
    keep = torch.zeros_like(valid)
    for group, real, row in zip(boxes, valid, keep, strict=True):
        index = real.nonzero()[:, 0]
        row[index[torchvision.ops.nms(group[index], torch.linspace(1, 0, len(index)), threshold)]] = True
    return keep


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
def test_is_torchvisions_on_every_group(threshold, device):
    # Crowded boxes, a duplicate of each kind, ragged groups and an empty one; 45 fills no power of two. An IoU is
    # never above 1: then nothing is suppressed, duplicates neither.
    boxes = crowded(4, 45)
    boxes[:, 7], boxes[:, 40] = boxes[:, 3], boxes[:, 39]
    valid = torch.rand(4, 45) < torch.tensor([1.1, 0.8, 0.3, 0.0])[:, None]
    wanted = expected(boxes, valid, threshold)
    for backend in BACKENDS:
        assert torch.equal(kept(boxes, valid, threshold, device, backend), wanted), backend
    assert 0 < wanted.sum() <= valid.sum() and (wanted.sum() == valid.sum()) == (threshold == 1.0)
    assert not wanted[3].any()


@pytest.mark.parametrize("threshold", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
def test_iou_exactly_on_the_threshold(threshold, device):
    # The IoU is the threshold as fp32, which is above the double for some and below it for others: as torchvision.
    pair = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 10 * threshold]]])
    valid = torch.ones(1, 2, dtype=torch.bool)
    assert torchvision.ops.box_iou(*pair[0][:, None]).item() == torch.tensor(threshold).item()
    for backend in BACKENDS if device.type == "cpu" else BACKENDS[:2]:  # its CUDA op decides otherwise
        assert torch.equal(kept(pair, valid, threshold, device, backend), expected(pair, valid, threshold)), backend


def test_both_roundings_of_the_threshold_are_among_those():
    # Else the case above could pass by luck: rounded to nearest, 0.1 would keep what torchvision suppresses.
    assert reference.round_down(0.1) < torch.tensor(0.1).item()
    assert reference.round_down(0.7) == torch.tensor(0.7).item() and reference.round_down(0.5) == 0.5
    assert reference.round_down(-0.1) <= -0.1


@pytest.mark.parametrize("n", [1, 2, 17, 33])
@pytest.mark.parametrize("backend", BACKENDS)
def test_chain_of_suppression(n, backend, device):
    # Each box overlaps its neighbours alone: the second falls, so the third stays, and so on to the last.
    start = torch.arange(n, dtype=torch.float32) * 4
    boxes = torch.stack([start, start * 0, start + 10, start * 0 + 10], dim=-1)[None]
    keep = kept(boxes, torch.ones(1, n, dtype=torch.bool), 0.4, device, backend)
    assert keep[0].tolist() == [i % 2 == 0 for i in range(n)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_invalid_boxes_neither_suppress_nor_are_kept(backend, device):
    # Padding holds anything: NaN, or the very best box once more. Of two duplicates the first valid one stays.
    boxes = crowded(2, 12)
    boxes[0, 0] = float("nan")
    boxes[0, 2] = boxes[0, 1] = boxes[0, 5]
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[0, :2] = False
    keep = kept(boxes, valid, 0.5, device, backend)
    assert torch.equal(keep, expected(boxes, valid, 0.5))
    assert keep[0, :3].tolist() == [False, False, True] and not keep[0, 5]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_does_not_suppress(backend, device):
    # A NaN coordinate, and 0/0 of two equal boxes without area: an IoU of NaN is above no threshold.
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, float("nan"), 10], [5, 5, 5, 5], [5, 5, 5, 5], [0, 0, 10, 9]]])
    valid = torch.ones(1, 5, dtype=torch.bool)
    keep = kept(boxes, valid, 0.5, device, backend)
    assert keep.tolist() == [[True, True, True, True, False]] == expected(boxes, valid, 0.5).tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("groups", "n"), [(0, 5), (3, 0), (0, 0)])
def test_nothing_to_do(groups, n, backend, device):
    # No image, no level with a proposal.
    keep = kept(torch.zeros(groups, n, 4), torch.zeros(groups, n, dtype=torch.bool), 0.5, device, backend)
    assert keep.shape == (groups, n)


def test_strided_inputs(device):
    # Columns of a wider tensor and every second flag; the last group's offset must not be the first one's.
    boxes, valid = crowded(3, 10), torch.rand(3, 10) < 0.8
    wide = torch.cat([boxes, boxes + 100], dim=2).to(device)[..., :4]
    flags = torch.stack([valid, ~valid], dim=2).to(device)[..., 0]
    assert not wide.is_contiguous() and not flags.is_contiguous()
    assert torch.equal(nms_mask(wide, flags, 0.4, backend="triton").cpu(), expected(boxes, valid, 0.4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_result_is_not_the_argument(backend, device):
    # Where all valid boxes stay the answer equals `valid`; who writes into it must not change the caller's.
    boxes = torch.tensor([[[0.0, 0, 1, 1], [5, 5, 6, 6]]], device=device)
    valid = torch.ones(1, 2, dtype=torch.bool, device=device)
    nms_mask(boxes, valid, 0.5, backend=backend).zero_()
    assert valid.all()


def test_auto_on_a_cpu_is_the_reference(monkeypatch):
    # On a CPU the interpreter would take minutes; what ran is seen by its being replaced.
    monkeypatch.setattr(reference, "nms_mask", lambda boxes, valid, threshold: "the reference")
    assert nms_mask(torch.zeros(1, 2, 4), torch.ones(1, 2, dtype=torch.bool), 0.5) == "the reference"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"boxes": torch.zeros(3, 4)}, ValueError, "boxes must have 3 dimensions, the last of size 4"),
        ({"boxes": torch.zeros(1, 3, 4).half()}, TypeError, "boxes must be float32, got torch.float16"),
        ({"boxes": [1.0]}, TypeError, "boxes must be a tensor, got list"),
        ({"valid": torch.ones(1, 3)}, TypeError, "valid must be a bool tensor"),
        ({"valid": torch.ones(1, 2).bool()}, ValueError, r"valid must have shape \[1, 3\], got \(1, 2\)"),
        ({"valid": torch.ones(1, 3, device="meta").bool()}, ValueError, "all tensors must be on one device"),
        ({"threshold": "0.5"}, TypeError, "threshold must be a number, got str"),
        ({"threshold": float("nan")}, ValueError, "threshold must not be NaN"),
        ({"backend": "cuda"}, ValueError, "unknown backend 'cuda'"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"boxes": torch.zeros(1, 3, 4), "valid": torch.ones(1, 3).bool(), "threshold": 0.5} | change
    with pytest.raises(error, match=message):
        nms_mask(**arguments)


def test_more_boxes_than_registers(device):
    # Refused with the way out, before anything is launched; "auto" takes it on a GPU, too.
    boxes = torch.zeros(0, op.MAX_BOXES + 1, 4, device=device)
    valid = torch.zeros(0, op.MAX_BOXES + 1, dtype=torch.bool, device=device)
    with pytest.raises(ValueError, match="at most 4096 boxes a group, got 4097; use backend='torch'"):
        nms_mask(boxes, valid, 0.5, backend="triton")
    assert nms_mask(boxes[:, 1:], valid[:, 1:], 0.5, backend="triton").shape == (0, 4096)
    assert nms_mask(boxes, valid, 0.5).shape == (0, 4097)
