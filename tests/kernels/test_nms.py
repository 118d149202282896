"""Greedy NMS of groups and of boxes with scores: torchvision's CPU ops, bit for bit."""

import pytest
import torch
import torchvision

from kernels import batched_nms, nms, nms_mask
from kernels.nms import op, reference

BACKENDS = ["triton", "torch", "torchvision"]


def crowded(groups: int, n: int) -> torch.Tensor:
    """Boxes that overlap many others, so that what suppresses is itself suppressed."""
    corner = torch.rand(groups, n, 2) * 40
    return torch.cat([corner, corner + 5 + torch.rand(groups, n, 2) * 25], dim=-1)


def kept(boxes, valid, threshold, device, backend="triton", groups=None):
    """The op's answer, on the CPU."""
    groups = None if groups is None else groups.to(device)
    keep = nms_mask(boxes.to(device), valid.to(device), threshold, groups=groups, backend=backend)
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


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 70, 130])
@pytest.mark.parametrize("backend", BACKENDS)
def test_chain_of_suppression(n, backend, device):
    # Each box overlaps its neighbours alone: the second falls, so the third stays, and so on to the last, through every
    # word of 32 boxes, and from the words that are in registers at a time to the next.
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


def test_auto_on_a_cpu_is_torchvision(monkeypatch):
    # On a CPU the interpreter would take minutes, and the reference compares all pairs of 4096 boxes, of any class;
    # what ran is seen by its being replaced.
    monkeypatch.setitem(op._OTHERS, "torchvision", lambda *arguments: "torchvision")
    assert nms_mask(torch.zeros(1, 2, 4), torch.ones(1, 2, dtype=torch.bool), 0.5) == "torchvision"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"boxes": torch.zeros(3, 4)}, ValueError, "boxes must have 3 dimensions, the last of size 4"),
        ({"boxes": torch.zeros(1, 3, 4).half()}, TypeError, "boxes must be float32, got torch.float16"),
        ({"boxes": [1.0]}, TypeError, "boxes must be a tensor, got list"),
        ({"valid": torch.ones(1, 3)}, TypeError, "valid must be a bool tensor"),
        ({"valid": torch.ones(1, 2).bool()}, ValueError, r"valid must have shape \[1, 3\], got \(1, 2\)"),
        ({"valid": torch.ones(1, 3, device="meta").bool()}, ValueError, "all tensors must be on one device"),
        ({"groups": torch.zeros(1, 3)}, TypeError, "groups must be an integer tensor"),
        ({"groups": torch.zeros(1, 3).bool()}, TypeError, "groups must be an integer tensor"),
        ({"groups": [1, 2, 3]}, TypeError, "groups must be an integer tensor"),
        ({"groups": torch.zeros(3).long()}, ValueError, r"groups must have shape \[1, 3\], got \(3,\)"),
        ({"groups": torch.zeros(1, 3, device="meta").long()}, ValueError, "all tensors must be on one device"),
        ({"threshold": "0.5"}, TypeError, "threshold must be a number, got str"),
        ({"threshold": float("nan")}, ValueError, "threshold must not be NaN"),
        ({"backend": "cuda"}, ValueError, "unknown backend 'cuda'"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"boxes": torch.zeros(1, 3, 4), "valid": torch.ones(1, 3).bool(), "threshold": 0.5} | change
    with pytest.raises(error, match=message):
        nms_mask(**arguments)


def near_the_threshold(threshold: float, n: int) -> torch.Tensor:
    """Pairs of boxes [n, 2, 4], the second inside the first, with IoUs within some 2^-14 of the threshold."""
    corner, side = torch.rand(n, 2) * 100, 10 ** (torch.rand(n, 2) * 5 - 2)
    inner = side * torch.tensor([1.0, threshold]) * (1 + (torch.rand(n, 2) - 0.5) * 2.0**-14)
    return torch.stack([torch.cat([corner, corner + side], 1), torch.cat([corner, corner + inner], 1)], dim=1)


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.7, 0.95])
def test_ious_around_the_threshold(threshold, device):
    # Where the kernel has to divide to know; products alone decide the last group's pairs.
    pairs = torch.cat([near_the_threshold(threshold, 120), crowded(60, 2)])
    valid = torch.ones(180, 2, dtype=torch.bool)
    groups, wanted = torch.arange(60).repeat_interleave(2).expand(3, 120), expected(pairs, valid, threshold)
    keep = kept(pairs.view(3, 120, 4), valid.view(3, 120), threshold, device, groups=groups)
    assert torch.equal(keep, wanted.view(3, 120))
    assert 0.2 < wanted[:120, 1].float().mean() < 0.8


@pytest.mark.parametrize("threshold", [0.0, 1e-30, 0.01, 0.3, 0.5, 0.7, 0.95, 1.0, 1.5, 1e38, float("inf")])
def test_the_screen_is_never_wrong(threshold):
    # What the kernel decides without a division, a million pairs close to the threshold and far from it: areas as fp32,
    # the intersection what it takes to have such an IoU.
    share, slack = (torch.tensor(number) for number in reference.screen(threshold))
    a, b = 10 ** (torch.rand(2, 1_000_000) * 14 - 7)
    spread = torch.tensor([2.0**-20, 2.0**-16, 2.0**-4, 1.0]).repeat(250_000)
    iou = min(threshold, 1.0) * (1 + (torch.rand(1_000_000) - 0.5) * spread)
    intersection = torch.minimum(iou / (1 + iou) * (a + b), torch.minimum(a, b))
    above = intersection / (a + b - intersection) > reference.round_down(threshold)
    enough = share * a + share * b
    assert above[intersection > enough].all() and not above[intersection <= slack * enough].any()
    undecided = (intersection > slack * enough) & ~(intersection > enough)
    assert undecided[spread == 1.0].float().mean() < 0.001 or threshold == 1e-30  # there it leaves all to the division


@pytest.mark.parametrize("n", [70, 130])
@pytest.mark.parametrize("threshold", [-0.1, 0.0, 0.3, 0.7])
def test_more_than_one_block(n, threshold, device):
    # Several words, several tiles of pairs, words that begin with what earlier ones suppress; groups with no box, with
    # boxes at the end alone, in the middle alone, and with holes. A negative threshold: the best box suppresses all.
    boxes, valid = crowded(5, n), torch.zeros(5, n, dtype=torch.bool)
    valid[0], valid[1, -3:], valid[2, 40:60], valid[3] = True, True, True, torch.rand(n) < 0.5
    wanted = expected(boxes, valid, threshold)
    assert torch.equal(kept(boxes, valid, threshold, device), wanted)
    assert threshold < 0.3 or (wanted[0, 64:].any() and not wanted[0].all())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_groups_do_not_suppress_each_other(dtype, device):
    # As one call for each class. Some ids agree in their low 32 bits: a kernel that narrowed them would mix them up.
    boxes, valid, groups = crowded(2, 100), torch.rand(2, 100) < 0.9, torch.randint(0, 4, (2, 100))
    ids = torch.tensor([7, 3, 0, 127] if dtype != torch.int64 else [7, 7 + 2**32, -1, 2**62])
    wanted = sum(expected(boxes, valid & (groups == i), 0.3).int() for i in range(4)).bool()
    for backend in BACKENDS:
        found = kept(boxes, valid, 0.3, device, backend, ids[groups].to(dtype))
        assert torch.equal(found, wanted), backend
    assert not torch.equal(wanted, expected(boxes, valid, 0.3))


def test_garbage_in_invalid_boxes_reaches_nobody(device):
    # Their rows of bits may be anything: NaN, infinities, boxes without area, inside out or over everything.
    boxes, valid = crowded(1, 100), torch.ones(1, 100, dtype=torch.bool)
    wanted = expected(boxes, valid, 0.4)
    padded, real = torch.zeros(1, 200, 4), torch.zeros(1, 200, dtype=torch.bool)
    padded[0, ::2], real[0, ::2] = boxes[0], True
    nan, inf = float("nan"), float("inf")
    padded[0, 1::2] = torch.tensor(
        [[nan, 0, 10, 10], [-inf, -inf, inf, inf], [5, 5, 5, 5], [9, 9, 1, 1], [0, 0, 99, 99]]
    ).repeat(20, 1)
    assert torch.equal(kept(padded, real, 0.4, device)[0, ::2], wanted[0])


def test_odd_boxes_among_real_ones(device):
    # Valid ones this time: infinite, tiny, without area, inside out. As the reference, and as torchvision.
    inf = float("inf")
    odd = [[0.0, 0, inf, 10], [-inf, -inf, inf, inf], [5, 5, 5, 5], [9, 9, 1, 1], [9, 1, 1, 9], [1, 1, 1 + 1e-5, 2]]
    odd += [[0, 0, 1e-22, 1e-22], [0, 0, 1e-22, 1e-22], [0, 0, 1e30, 1e30], [0, 0, 9e29, 1e30]]
    odd += [[0, 0, 1.5e19, 1.5e19], [0, 0, 1.5e19, 1.5e19]]  # each area is finite, their sum is not
    boxes = torch.cat([torch.tensor(odd), crowded(1, 30)[0]])[torch.randperm(len(odd) + 30)][None]
    valid = torch.ones(boxes.shape[:2], dtype=torch.bool)
    for threshold in (-0.5, 0.0, 0.5):
        wanted = expected(boxes, valid, threshold)
        for backend in BACKENDS:
            assert torch.equal(kept(boxes, valid, threshold, device, backend), wanted), (threshold, backend)


def test_tiles_of_a_gpus_shape(device, monkeypatch):
    # Wider than high, where the interpreter's are square: which tiles below the diagonal may be left out differs. (All
    # rows of a tile in one step, which takes the interpreter a second instead of twenty.)
    monkeypatch.setattr(op, "tile", lambda on_gpu, interpreted: max(on_gpu, 32))
    boxes, valid = crowded(1, 300), torch.rand(1, 300) < 0.9
    boxes[:, 150:] += 30  # fewer of them suppressed from afar
    assert torch.equal(kept(boxes, valid, 0.3, device), expected(boxes, valid, 0.3))


def test_twice_the_same(device):
    # Words that nobody wrote hold what memory held: none of it may show.
    boxes, valid = crowded(2, 130), torch.rand(2, 130) < 0.7
    first = kept(boxes, valid, 0.5, device)
    assert torch.equal(kept(boxes, valid, 0.5, device), first) and torch.equal(first, expected(boxes, valid, 0.5))


def by_score(n: int, levels: int, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Crowded boxes with scores full of ties, and classes."""
    return crowded(1, n)[0], torch.randint(0, levels, (n,)) / levels, torch.randint(0, classes, (n,))


def indices(result, device):
    """The indices that `nms` means, on the CPU, having looked at its padding."""
    keep, count = result
    assert keep.dtype == torch.int64 and count.dtype == torch.int32 and count.shape == ()
    assert keep.device.type == count.device.type == device.type
    assert (keep[count:] == 0).all()
    return keep[:count].cpu()


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.7])
@pytest.mark.parametrize(("n", "levels"), [(1, 1), (60, 4), (60, 1000), (100, 1)])
def test_nms_is_torchvisions(n, levels, threshold, device):
    # In its order: ties by index, which its sort, a stable one, leaves so.
    boxes, scores, _ = by_score(n, levels)
    wanted = torchvision.ops.nms(boxes, scores, threshold)
    for backend in BACKENDS if device.type == "cpu" else BACKENDS[:2]:
        found = nms(boxes.to(device), scores.to(device), threshold, backend=backend)
        assert len(found[0]) == n and torch.equal(indices(found, device), wanted), backend


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.7])
def test_batched_nms_is_torchvisions_loop_over_classes(threshold, device):
    # By score over all classes, ties by index, where that loop leaves their order to an unstable sort.
    boxes, scores, idxs = by_score(90, 7)
    wanted = torchvision.ops.boxes._batched_nms_vanilla(boxes, scores, idxs, threshold).sort().values
    wanted = wanted[scores[wanted].sort(descending=True, stable=True).indices]
    for backend in BACKENDS if device.type == "cpu" else BACKENDS[:2]:
        found = batched_nms(boxes.to(device), scores.to(device), idxs.to(device), threshold, backend=backend)
        assert torch.equal(indices(found, device), wanted), backend
    assert len(wanted) > len(torchvision.ops.nms(boxes, scores, threshold))


def test_no_offsets_are_added_to_coordinates(device):
    # An IoU a hair above the threshold; moved by the offset of class 40, coordinates are rounded to 1/256 and it is
    # below. So torchvision decides for few boxes; its loop over classes, for many boxes, as this op.
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5.001], [0, 0, 1300, 1300]])
    scores, idxs = torch.tensor([0.9, 0.8, 0.7]), torch.tensor([40, 40, 0])
    loop = torchvision.ops.boxes._batched_nms_vanilla(boxes, scores, idxs, 0.5)
    assert loop.tolist() == [0, 2] and torchvision.ops.batched_nms(boxes, scores, idxs, 0.5).tolist() == [0, 1, 2]
    for backend in ("triton", "torch"):
        found = batched_nms(boxes.to(device), scores.to(device), idxs.to(device), 0.5, backend=backend)
        assert torch.equal(indices(found, device), loop), backend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("max_output", [1, 5, 100])
def test_max_output(max_output, backend, device):
    # Fewer than are kept: the best of them. More than there are boxes: as long as asked for.
    boxes, scores, idxs = (x.to(device) for x in by_score(40, 9))
    everything = indices(nms(boxes, scores, 0.5, backend=backend), device)
    found = nms(boxes, scores, 0.5, max_output=max_output, backend=backend)
    assert len(found[0]) == max_output and torch.equal(indices(found, device), everything[:max_output])
    assert 5 < len(everything) < 40
    everything = indices(batched_nms(boxes, scores, idxs, 0.5, backend=backend), device)
    found = batched_nms(boxes, scores, idxs, 0.5, max_output=max_output, backend=backend)
    assert len(found[0]) == max_output and torch.equal(indices(found, device), everything[:max_output])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_boxes(backend, device):
    # Nothing was detected; a fixed number of slots is asked for all the same.
    boxes, scores, idxs = (x.to(device) for x in (torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long()))
    for call in (lambda **k: nms(boxes, scores, 0.5, **k), lambda **k: batched_nms(boxes, scores, idxs, 0.5, **k)):
        assert len(call(backend=backend)[0]) == 0
        keep, count = call(max_output=3, backend=backend)
        assert keep.tolist() == [0, 0, 0] and count == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_scores_come_first(backend, device):
    # As in torchvision, where a NaN sorts above every number: seen at once, where it would hide at the end.
    boxes, scores = crowded(1, 12)[0], torch.rand(12)
    scores[5] = scores[8] = float("nan")
    found = nms(boxes.to(device), scores.to(device), 0.6, backend=backend)
    assert torch.equal(indices(found, device), torchvision.ops.nms(boxes, scores, 0.6)) and found[0][0] == 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_types_are_widened(dtype, backend, device):
    # The boxes that the halves are, in fp32; half scores tie often.
    boxes, scores, _ = by_score(50, 1000)
    boxes, scores = boxes.to(dtype), scores.to(dtype)
    wanted = torchvision.ops.nms(boxes.float(), scores.float(), 0.5)
    assert torch.equal(indices(nms(boxes.to(device), scores.to(device), 0.5, backend=backend), device), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_scores_are_compared_as_doubles(backend, device):
    # Equal in fp32: the last box is the best all the same.
    boxes, scores = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 9.5]]), torch.ones(3).double()
    scores += torch.tensor([0.0, 1e-12, 2e-12])
    found = nms(boxes.to(device), scores.to(device), 0.5, backend=backend)
    assert indices(found, device).tolist() == [2]


def test_no_gradient_is_asked_of_anybody(device):
    # Boxes straight from a head: the result is integers.
    boxes, scores = crowded(1, 6)[0].to(device).requires_grad_(), torch.rand(6, device=device, requires_grad=True)
    keep, count = nms(boxes, scores, 0.5, backend="triton")
    assert not keep.requires_grad and not count.requires_grad


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"boxes": torch.zeros(3, 5)}, ValueError, "boxes must have 2 dimensions, the last of size 4"),
        ({"boxes": torch.zeros(3, 4).double()}, TypeError, "boxes must be float32, float16 or bfloat16, got torch.flo"),
        ({"boxes": torch.zeros(3, 4).int()}, TypeError, "boxes must be float16, bfloat16, float32 or float64"),
        ({"scores": torch.zeros(2)}, ValueError, r"scores must have shape \[3\], got \(2,\)"),
        ({"scores": torch.zeros(3, 1)}, ValueError, "scores must have 1 dimensions"),
        ({"scores": torch.zeros(3).long()}, TypeError, "scores must be float16"),
        ({"scores": torch.zeros(3, device="meta")}, ValueError, "all tensors must be on one device"),
        ({"idxs": torch.zeros(2).long()}, ValueError, r"idxs must have shape \[3\], got \(2,\)"),
        ({"idxs": torch.zeros(3)}, TypeError, "idxs must be an integer tensor"),
        ({"idxs": None}, TypeError, "idxs must be an integer tensor"),
        ({"iou_threshold": None}, TypeError, "iou_threshold must be a number, got NoneType"),
        ({"iou_threshold": float("nan")}, ValueError, "iou_threshold must not be NaN"),
        ({"max_output": 0}, ValueError, "max_output must be a positive integer or None, got 0"),
        ({"max_output": 1.5}, ValueError, "max_output must be a positive integer or None, got 1.5"),
        ({"backend": "cuda"}, ValueError, "unknown backend 'cuda'"),
    ],
)
def test_bad_arguments_by_score(change, error, message):
    arguments = {
        "boxes": torch.zeros(3, 4), "scores": torch.zeros(3), "idxs": torch.zeros(3).long(), "iou_threshold": 0.5
    } | change  # fmt: skip
    with pytest.raises(error, match=message):
        batched_nms(**arguments)
    if "idxs" not in change:
        del arguments["idxs"]
        with pytest.raises(error, match=message):
            nms(**arguments)
