"""The RPN loss: PyTorch's losses of the anchors drawn, and nothing of the others or of empty slots."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder

from kernels import AnchorGrid, rpn_loss
from kernels.rpn_loss import op, reference

BACKENDS = ["triton", "torch"]
FP64 = torch.float64
# Levels of different heights and widths, the last of one row; strides that differ between the axes.
GRID = AnchorGrid(
    torch.tensor([[-8.2, -4.1, 8.2, 4.1], [-5.3, -6.7, 5.3, 6.7]]) * torch.tensor([1.0, 1.7, 3.1])[:, None, None],
    ((5, 7), (3, 4), (1, 2)),
    ((4, 4), (8, 9), (16, 25)),
)
ANCHORS = len(GRID)


def inputs(dtype=torch.float32, device="cpu", slots=24, objects=3, batch=2) -> list:
    """Arguments of `rpn_loss`: some slots empty, with an index that exists nowhere; boxes that a box can be fitted to.

    The first and the last anchor of every level are drawn.
    """
    corner = torch.rand(batch, objects, 2) * 20
    boxes = torch.cat([corner, corner + 3 + torch.rand(batch, objects, 2) * 20], dim=-1)
    first = torch.tensor([0, *GRID.level_sizes[:-1]]).cumsum(0)
    ends = torch.cat([first, first + torch.tensor(GRID.level_sizes) - 1])
    rest = [i for i in range(ANCHORS) if i not in ends.tolist()]
    order = torch.rand(batch, len(rest)).argsort(dim=1)
    index = torch.cat([ends.expand(batch, -1), torch.tensor(rest)[order]], dim=1)
    drawn = torch.rand(batch, slots) < 0.8
    drawn[:, : len(ends)] = True
    positive = drawn & (torch.rand(batch, slots) < 0.5)
    logits = (torch.randn(batch, ANCHORS) * 3).to(dtype).to(device).requires_grad_()
    deltas = torch.randn(batch, ANCHORS, 4).to(dtype).to(device).requires_grad_()
    matched = torch.randint(0, max(objects, 1), (batch, ANCHORS), dtype=torch.int32)
    index = torch.where(drawn, index[:, :slots], 10**15)
    grid = AnchorGrid(GRID.cells.to(device), GRID.extents, GRID.strides)
    return [logits, deltas, grid, *(t.to(device) for t in (boxes, matched, index, drawn, positive))]


def with_gradients(arguments: list, beta: float = 1 / 9, backend: str = "triton") -> tuple[Tensor, ...]:
    """Both losses, and the gradients of twice the first minus three times the second."""
    objectness, box = rpn_loss(*arguments, beta, backend=backend)
    return objectness, box, *torch.autograd.grad(2 * objectness - 3 * box, arguments[:2])


def expected(arguments: list, beta: float) -> tuple[Tensor, ...]:
    """The same in fp64, a slot at a time, with torchvision's BoxCoder and PyTorch's losses."""
    logits, deltas, grid, boxes, matched, index, drawn, positive = (
        a if isinstance(a, AnchorGrid) else a.detach().cpu() for a in arguments
    )
    logits, deltas = logits.double().requires_grad_(), deltas.double().requires_grad_()
    anchors, coder = grid.anchors().cpu().double(), BoxCoder((1.0, 1.0, 1.0, 1.0))
    objectness, box = logits.sum() * 0, logits.sum() * 0
    for b, s in drawn.nonzero().tolist():
        i = index[b, s].item()
        objectness += F.binary_cross_entropy_with_logits(logits[b, i], positive[b, s].double())
        if positive[b, s]:
            wanted = coder.encode_single(boxes[b, matched[b, i]][None].double(), anchors[i][None])[0]
            box += F.smooth_l1_loss(deltas[b, i], wanted, beta=beta, reduction="sum")
    return objectness, box, *torch.autograd.grad(2 * objectness - 3 * box, (logits, deltas))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta", [1 / 9, 0.0, 1.0])
def test_is_torchvisions_loss(beta, backend, device):
    # torchvision's beta, detectron2's L1, PyTorch's default.
    arguments = inputs(device=device)
    theirs = expected(arguments, beta)
    for mine, other in zip(with_gradients(arguments, beta, backend), theirs, strict=True):
        torch.testing.assert_close(mine.cpu().double(), other, rtol=2e-6, atol=2e-6)
    assert (theirs[2] != 0).sum() == arguments[-2].sum() and (theirs[3] != 0).any(-1).sum() == arguments[-1].sum()


def test_reference_is_the_plain_composition():
    # To the last bit: the plain composition of the box arithmetic that the model is made of, too.
    from kernels.boxes import encode, take

    arguments = inputs()
    logits, deltas, grid, boxes, matched, index, drawn, positive = arguments
    index = torch.where(drawn, index, 0)
    z = torch.where(drawn, logits.gather(1, index), 0)
    moved = torch.where(positive[..., None], take(deltas, index), 0)
    objectness = F.binary_cross_entropy_with_logits(z, positive.float(), reduction="none")
    wanted = encode(take(boxes, matched.long().gather(1, index)), grid.anchors()[index])
    error = F.smooth_l1_loss(moved, wanted, beta=1 / 9, reduction="none").sum(-1)
    objectness, box = (objectness * drawn).sum(), (error * positive).sum()
    theirs = objectness, box, *torch.autograd.grad(2 * objectness - 3 * box, (logits, deltas))
    torch.testing.assert_close(with_gradients(arguments, backend="torch"), theirs, rtol=0, atol=0)


def test_a_grid_is_its_anchors(device):
    # Made up in the kernel or read from memory: the same bits, through the same operations.
    arguments = inputs(device=device)
    given = [*arguments[:2], arguments[2].anchors(), *arguments[3:]]
    torch.testing.assert_close(with_gradients(arguments), with_gradients(given), rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_anchors_and_empty_slots_do_not_count(backend, device):
    # NaN and inf in what is not drawn, or drawn as background (its deltas), change no bit and get no gradient. An empty
    # slot's index may be anything: it is not followed, whatever `positive` says.
    arguments = inputs(device=device)
    clean = with_gradients(arguments, backend=backend)
    logits, deltas, _, _, matched, index, drawn, positive = arguments
    used, fitted = torch.zeros_like(logits, dtype=torch.bool), torch.zeros_like(logits, dtype=torch.bool)
    place = torch.where(drawn, index, 0)  # anchor 0 is always drawn
    used.scatter_(1, place, True)
    fitted.scatter_(1, place, positive | (place == 0) & positive[:, :1])
    with torch.no_grad():
        logits[~used] = float("nan")
        deltas[~fitted] = float("inf")
        matched[~fitted] = 10**6
    anything = torch.tensor([-(10**12), -1, ANCHORS, 10**12, *range(ANCHORS)], device=device)
    index[~drawn] = anything[torch.randint(len(anything), index.shape, device=device)][~drawn]
    positive |= ~drawn
    dirty = with_gradients(arguments, backend=backend)
    torch.testing.assert_close(dirty, clean, rtol=0, atol=0)
    assert (dirty[2][~used] == 0).all() and (dirty[3][~fitted] == 0).all() and not drawn.all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_diverged_model_is_seen(value, backend, device):
    # In what does count, each in its own loss; on a GPU too, where max(NaN, 0) is 0.
    for positive in (True, False):
        arguments = inputs(device=device)
        slot = (arguments[-1][0] == positive) & arguments[-2][0]
        arguments[0].data[0, arguments[5][0, slot][0]] = value
        objectness, box = rpn_loss(*arguments, backend=backend)
        assert not objectness.isfinite() and box.isfinite()
    arguments = inputs(device=device)
    arguments[1].data[0, arguments[5][0, arguments[-1][0]][0], 2] = value
    objectness, box = rpn_loss(*arguments, backend=backend)
    assert objectness.isfinite() and not box.isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
def test_boxes_without_width_or_height_want_no_deltas(backend, device):
    # An empty ground truth, an anchor without height, both: as `encode`, zeros instead of NaN. Then one that is whole.
    anchors = torch.tensor([[0.0, 0, 8, 8], [0, 4, 8, 4], [3, 3, 3, 3], [0, 0, 8, 8]], device=device)
    boxes = torch.tensor([[[0.0, 0, 0, 0], [2, 1, 9, 9], [7, 2, 5, 9]]], device=device)
    deltas = torch.full((1, 4, 4), 0.5, device=device)
    matched = torch.tensor([[0, 1, 2, 1]], dtype=torch.int32, device=device)
    index, true = torch.arange(4, device=device)[None], torch.ones(1, 4, dtype=torch.bool, device=device)
    for rows, wanted in ((slice(0, 3), torch.zeros(3, 4)), (slice(3, 4), torch.tensor([[3 / 16, 1 / 8, -0.13353, 0]]))):
        slots = index[:, rows], true[:, rows], true[:, rows]
        _, box = rpn_loss(torch.zeros(1, 4, device=device), deltas, anchors, boxes, matched, *slots, 0, backend=backend)
        torch.testing.assert_close(box.cpu(), (0.5 - wanted).abs().sum(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("nothing", ["batch", "slots", "objects", "drawn"])
def test_nothing_to_learn_from(nothing, backend, device):
    # No image, no slot, images without objects, only empty slots: zeros, with a gradient path.
    arguments = inputs(device=device, **({nothing: 0} if nothing != "drawn" else {}))
    drawn, positive = arguments[-2:]
    positive.zero_()
    if nothing == "drawn":
        drawn.zero_()
    objectness, box, grad_logits, grad_deltas = with_gradients(arguments, backend=backend)
    assert box == 0 and (grad_deltas == 0).all() and grad_deltas.shape == arguments[1].shape
    background = nothing == "objects"
    assert (objectness > 0) == background and (grad_logits != 0).any() == background


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("objects", "match"), [(3, 3), (3, -1), (0, 0)])
def test_match_that_does_not_exist(objects, match, backend, device):
    # Nothing is read outside of `gt_boxes`, and the loss says so.
    arguments = inputs(device=device, objects=objects)
    arguments[4].fill_(match)
    objectness, box = rpn_loss(*arguments, backend=backend)
    assert objectness.isfinite() and box.isnan()


@pytest.mark.parametrize("bad", [ANCHORS, -1])
def test_anchor_that_does_not_exist(bad, device):
    # The kernels, called directly as on a GPU: NaN loss in that image, nothing read or written outside.
    arguments = inputs(device=device)
    logits, deltas, grid, boxes, matched, index, drawn, positive = arguments
    index[0, 1] = bad
    slots = logits.detach(), deltas.detach(), *grid.flat(), boxes, matched, index, drawn, positive, 1 / 9
    objectness, _ = op._rows(*slots)
    assert objectness[0].isnan() and objectness[1].isfinite()
    grad_logits, grad_deltas = op._rows_backward(*torch.ones(2, 2, device=device), *slots)
    assert grad_logits.isfinite().all() and grad_deltas.isfinite().all()
    assert (grad_logits != 0).sum() == drawn.sum() - 1
    with pytest.raises(IndexError, match=r"index \(of the slots drawn\) must lie in"):
        rpn_loss(*(a.cpu() if isinstance(a, Tensor) else GRID for a in arguments))


@pytest.mark.parametrize("beta", [1 / 9, 0.0])
def test_gradcheck(beta, device):
    # fp64 on the real kernels, with few anchors: positive ones, background, two that are not drawn; an empty slot.
    logits, deltas, grid, boxes, matched, *_ = inputs(FP64, device, batch=1)
    index = torch.tensor([[3, 10**15, 5, 0, 2]], device=device)
    positive = torch.tensor([[1, 0, 1, 0, 1]], device=device) > 0
    slots = boxes, matched[:, :6], index, index < 6, positive
    function = lambda z, d: rpn_loss(z, d, grid.anchors()[:6], *slots, beta, backend="triton")
    leaves = logits[:, :6].detach().requires_grad_(), deltas[:, :6].detach().requires_grad_()
    assert torch.autograd.gradcheck(function, leaves)


def test_fp64_is_the_references(device):
    # With a beta that fp32 does not hold.
    arguments = inputs(FP64, device)
    ours, theirs = (with_gradients(arguments, backend=b) for b in BACKENDS)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 2**-7)])
def test_half_types(dtype, tolerance, device):
    # Computed in fp32, so the losses are those of the rounded inputs; the gradients have the inputs' dtype.
    arguments = inputs(dtype, device)
    theirs = expected(arguments, 1 / 9)
    for backend in BACKENDS:
        ours = with_gradients(arguments, backend=backend)
        assert [o.dtype for o in ours] == [torch.float32] * 2 + [dtype] * 2
        torch.testing.assert_close([o.cpu().double() for o in ours[:2]], list(theirs[:2]), rtol=1e-6, atol=1e-6)
        for mine, other in zip(ours[2:], theirs[2:], strict=True):
            torch.testing.assert_close(mine.cpu().double(), other, rtol=tolerance, atol=1e-6)


def test_extreme_logits(device):
    # exp(1000) would overflow: the loss of a confident error is linear, its gradient 1. A confident success has a
    # gradient too: 1 - sigmoid(20), taken literally, would have lost half of its digits.
    logits = torch.tensor([[1000.0, -1000.0, 20.0, -20.0]], device=device, requires_grad=True)
    deltas, anchors = torch.zeros(1, 4, 4, device=device), torch.tensor([[0.0, 0, 4, 4]] * 4, device=device)
    index, drawn = torch.arange(4, device=device)[None], torch.ones(1, 4, dtype=torch.bool, device=device)
    matched = torch.zeros(1, 4, dtype=torch.int32, device=device)
    positive = torch.tensor([[False, True, True, False]], device=device)
    loss, _ = rpn_loss(logits, deltas, anchors, anchors[None, :1], matched, index, drawn, positive, backend="triton")
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 2000.0
    tail = 1 / (1 + torch.exp(torch.tensor(20.0, dtype=FP64)).item())
    torch.testing.assert_close(grad.cpu(), torch.tensor([[1.0, -1.0, -tail, tail]]), rtol=1e-6, atol=0)


def test_several_blocks(monkeypatch, device):
    # More slots than a program takes at once, the last block ragged: in the forward a loop, in the backward programs.
    arguments = inputs(device=device)
    whole = with_gradients(arguments)
    monkeypatch.setattr(op, "tile", lambda on_gpu, interpreted: 16)
    ours = with_gradients(arguments)
    torch.testing.assert_close(ours[:2], whole[:2])  # added in another order
    torch.testing.assert_close(ours[2:], whole[2:], rtol=0, atol=0)


def test_two_runs_agree(device):
    # To the last bit, on a GPU too: nothing is added in an order that is left to chance.
    arguments = inputs(device=device, batch=9)
    torch.testing.assert_close(with_gradients(arguments), with_gradients(arguments), rtol=0, atol=0)


@pytest.mark.parametrize("which", [0, 1])
def test_one_loss_alone(which, device):
    # The other's gradient never arrives: its half of the kernel adds nothing.
    arguments = inputs(device=device)
    grads = torch.autograd.grad(rpn_loss(*arguments, backend="triton")[which], arguments[:2])
    wanted = torch.autograd.grad(rpn_loss(*arguments, backend="torch")[which], arguments[:2], materialize_grads=True)
    torch.testing.assert_close(grads, wanted)
    assert (grads[which] != 0).any() and (grads[1 - which] == 0).all()


def test_strided_inputs(device):
    # What a head hands over without a copy: one of two logits, deltas with the coordinate first; slots cut from a sort.
    arguments = inputs(device=device)
    wanted = with_gradients(arguments)
    logits, deltas, grid, boxes, matched, *slots = (a.detach() if isinstance(a, Tensor) else a for a in arguments)
    wide = torch.stack([logits, logits + 1], dim=2).requires_grad_()
    first = deltas.transpose(1, 2).contiguous().requires_grad_()
    slots = [torch.cat([s, s], dim=1)[:, : s.shape[1]] for s in slots]
    rest = boxes.transpose(0, 1).contiguous().transpose(0, 1), matched.T.contiguous().T, *slots
    assert not any(t.is_contiguous() for t in rest)
    objectness, box = rpn_loss(wide[..., 0], first.transpose(1, 2), grid, *rest, backend="triton")
    grad_wide, grad_first = torch.autograd.grad(2 * objectness - 3 * box, (wide, first))
    ours = objectness, box, grad_wide[..., 0], grad_first.transpose(1, 2)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_boxes_get_no_gradient(backend, device):
    arguments = inputs(device=device)
    arguments[2] = arguments[2].anchors().requires_grad_()
    arguments[3].requires_grad_()
    sum(rpn_loss(*arguments, backend=backend)).backward()
    assert arguments[2].grad is None and arguments[3].grad is None and (arguments[1].grad != 0).any()


def test_auto_on_a_cpu_is_the_reference(monkeypatch):
    # On a CPU the interpreter would take minutes; what ran is seen by its being replaced.
    monkeypatch.setattr(reference, "rpn_loss", lambda *arguments: "the reference")
    assert rpn_loss(*inputs()) == "the reference"


NAMES = ["logits", "deltas", "anchors", "gt_boxes", "matched_idx", "index", "drawn", "positive"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(2, 3, 4)}, ValueError, "logits must have 2 dimensions"),
        ({"deltas": torch.zeros(2, ANCHORS, 5)}, ValueError, "deltas must have 3 dimensions, the last of size 4"),
        ({"deltas": torch.zeros(2, ANCHORS - 1, 4)}, ValueError, rf"deltas must have shape \[2, {ANCHORS}, 4\]"),
        ({"deltas": torch.zeros(2, ANCHORS, 4).half()}, TypeError, "logits and deltas must have one dtype"),
        ({"anchors": torch.zeros(5, 4)}, ValueError, r"logits must have shape \[2, 5\]"),
        ({"anchors": torch.zeros(ANCHORS, 4).half()}, TypeError, "anchors and gt_boxes must be float32"),
        ({"gt_boxes": torch.zeros(2, 3, 4).double()}, TypeError, "anchors and gt_boxes must be float32"),
        ({"gt_boxes": torch.zeros(1, 3, 4)}, ValueError, r"gt_boxes must have shape \[2, 3, 4\]"),
        ({"matched_idx": torch.zeros(2, ANCHORS)}, TypeError, "matched_idx must be a tensor of torch.int32"),
        ({"index": torch.zeros(2, 24, dtype=torch.int32)}, TypeError, "index must be a tensor of torch.int64"),
        ({"index": torch.zeros(2, dtype=torch.int64)}, ValueError, "index must have 2 dimensions"),
        ({"drawn": torch.zeros(2, 24)}, TypeError, "drawn must be a tensor of torch.bool"),
        ({"positive": torch.zeros(2, 23, dtype=torch.bool)}, ValueError, r"positive must have shape \[2, 24\]"),
        ({"drawn": torch.zeros(2, 24, dtype=torch.bool, device="meta")}, ValueError, "all tensors must be on one"),
        ({"box_beta": -0.1}, ValueError, "box_beta must not be negative"),
        ({"box_beta": float("nan")}, ValueError, "box_beta must not be negative"),
        (
            {"logits": torch.zeros(2, 0), "deltas": torch.zeros(2, 0, 4), "anchors": torch.zeros(0, 4)}
            | {"matched_idx": torch.zeros(2, 0, dtype=torch.int32)},
            ValueError,
            "slots need anchors",
        ),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        rpn_loss(**dict(zip(NAMES, inputs(), strict=True)) | change)
