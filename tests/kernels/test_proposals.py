"""Proposals before NMS: a top-k whose ties are settled, and boxes as torchvision decodes and clips them."""

import math

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import clip_boxes_to_image

from kernels import AnchorGrid, decode_proposals, stable_topk
from kernels.anchors import kernel_arguments
from kernels.device_anchors import grid_anchor
from kernels.proposals import op, reference
from kernels.runtime import INTERPRETED, launch, record_launches

BACKENDS = ["triton", "torch"]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAN, INF = float("nan"), float("inf")
# Levels of different heights and widths, the last of one row; strides that differ between the axes.
GRID = AnchorGrid(
    torch.tensor([[-8.2, -4.1, 8.2, 4.1], [-5.3, -6.7, 5.3, 6.7]]) * torch.tensor([1.0, 1.7, 3.1])[:, None, None],
    ((5, 7), (3, 4), (1, 2)),
    ((4, 4), (8, 9), (16, 25)),
)
ANCHORS = len(GRID)


def best(values: Tensor, k: int) -> list[list[int]]:
    """The k largest of each row by falling value, then by rising index, NaN as -inf: in Python."""
    rows = [[-INF if math.isnan(v) else v for v in row] for row in values.double().tolist()]
    return [sorted(range(len(row)), key=lambda i, row=row: (-row[i], i))[:k] for row in rows]


def chosen(values: Tensor, k: int, device: torch.device, backend: str = "triton") -> list[list[int]]:
    index = stable_topk(values.to(device), k, backend=backend)
    assert index.dtype == torch.int64 and index.shape == (len(values), min(k, values.shape[1]))
    return index.tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_many_ties(dtype, backend, device):
    # Scores as a head in bf16 gives them: some hundred distinct values among 3000. The last one taken is one of many
    # that are equal, and which of them it is must not be luck.
    values = (torch.randn(2, 3000) * 12).round().div(8).to(dtype)
    index = chosen(values, 1000, device, backend)
    assert index == best(values, 1000)
    last = values[0, index[0][-1]]
    assert 60 < len(values.unique()) < 120 and (values[0] == last).sum() > (values[0, index[0]] == last).sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_distinct_values(backend, device):
    # Without ties it is torch.topk's order; every value of fp32 is one number, its sign and exponent in their places.
    values = torch.randn(3, 500) * torch.tensor(10.0) ** torch.randint(-38, 38, (3, 500))
    assert chosen(values, 60, device, backend) == values.topk(60, dim=1).indices.tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_nan_infinities_and_zeros(dtype, backend, device):
    # A NaN, of either sign, must not win: it is among the -inf, in order. -0.0 and 0.0 are equal; numbers below the
    # normal ones are not 0, and the largest finite one is not inf.
    most = torch.finfo(dtype).max
    # (In bf16 the interpreter, not the kernel, makes them 0.)
    tiny = torch.finfo(dtype).smallest_normal / (1 if dtype == BF16 and INTERPRETED else 2)
    row = [-0.0, NAN, 0.0, -INF, INF, -NAN, -tiny, tiny, -most, 0.0, -0.0, most, INF, -INF]
    values = torch.tensor([row, row[::-1]]).to(dtype)
    values[1, 4] = -values[1, 4]
    wanted = [4, 12, 11, 7, 0, 2, 9, 10, 6, 8, 1, 3, 5, 13]
    assert chosen(values, 14, device, backend)[0] == wanted == best(values, 14)[0]
    assert chosen(values, 5, device, backend) == best(values, 5)


def test_a_level_is_a_slice(device):
    # A level's scores are a part of all levels' rows, or every other number of them: read where they lie, not copied.
    values = (torch.randn(3, 200) * 4).round().to(BF16).to(device)
    level = values[:, 31:157]
    assert not level.is_contiguous()
    assert stable_topk(level, 40, backend="triton").tolist() == best(level, 40)
    assert stable_topk(values[:, 1::2], 40, backend="triton").tolist() == best(values[:, 1::2], 40)
    with record_launches() as launches:
        stable_topk(level, 40, backend="triton")
    assert launches[0].args[0].data_ptr() == level.data_ptr()


def test_keys_in_several_blocks(monkeypatch, device):
    # More values than a program takes, the last block ragged.
    values = (torch.randn(2, 150) * 4).round()
    monkeypatch.setattr(op, "tile", lambda on_gpu, interpreted: 64)
    assert chosen(values, 150, device) == best(values, 150)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "number", "k"), [(2, 5, 9), (2, 5, 0), (2, 0, 3), (0, 5, 3)])
def test_more_or_fewer_than_there_are(batch, number, k, backend, device):
    values = torch.randn(batch, number)
    assert chosen(values, k, device, backend) == best(values, k)


def test_topk_of_values_with_a_gradient(device):
    # The head's scores are part of a graph; which of them are largest is not.
    values = torch.randn(2, 5, device=device, requires_grad=True)
    for backend in BACKENDS:
        assert not stable_topk(values, 2, backend=backend).requires_grad


@pytest.mark.parametrize(
    ("values", "k", "error", "message"),
    [
        (torch.zeros(5), 2, ValueError, "values must have 2 dimensions"),
        (torch.zeros(2, 5).int(), 2, TypeError, "values must be float16"),
        (torch.zeros(2, 5).double(), 2, TypeError, "values must be float16, bfloat16 or float32, got torch.float64"),
        (torch.zeros(2, 5), -1, ValueError, "k must not be negative"),
        (torch.zeros(1, device="meta").expand(1, 2**30 + 1), 1, ValueError, "at most 1073741824 values"),
    ],
)
def test_bad_topk_arguments(values, k, error, message):
    with pytest.raises(error, match=message):
        stable_topk(values, k)


@triton.jit
def _anchors_kernel(
    index_ptr, out_ptr, cells_ptr, per_cell, heights, widths, strides_y, strides_x, BLOCK: tl.constexpr
):
    slot = tl.arange(0, BLOCK)
    index = tl.load(index_ptr + slot)
    x1, y1, x2, y2 = grid_anchor(cells_ptr, index, per_cell, heights, widths, strides_y, strides_x)
    tl.store(out_ptr + slot * 4, x1)
    tl.store(out_ptr + slot * 4 + 1, y1)
    tl.store(out_ptr + slot * 4 + 2, x2)
    tl.store(out_ptr + slot * 4 + 3, y2)


def level(height: int, width: int) -> AnchorGrid:
    """One level, three anchors a cell."""
    return AnchorGrid(torch.randn(1, 3, 4) * 9, ((height, width),), ((7, 5),))


@pytest.mark.parametrize(
    "grid",
    [
        GRID,
        level(4, 6),
        level(1, 9),  # extents of 1
        level(9, 1),
        AnchorGrid(torch.randn(3, 1, 4) * 9, ((0, 5), (2, 3), (4, 0)), ((4, 4), (8, 8), (16, 16))),  # empty levels
        AnchorGrid(torch.randn(1, 1, 4), ((2048, 2731),), ((8, 8),)),  # far out: cells and pixels in the thousands
        AnchorGrid.of(torch.randn(50, 4)),
    ],
    ids=["pyramid", "level", "row", "column", "empty levels", "large", "given"],
)
def test_grid_anchor_is_the_grids(grid, device):
    # Every anchor, or of millions some, the first and the last: the same bits. Cells are no round numbers.
    number = len(grid)
    index = torch.arange(number) if number < 200 else torch.cat([torch.randint(number, (126,)), torch.tensor([0, -1])])
    index = torch.nn.functional.pad(index % number, (0, 128 - len(index))).to(device)
    out = torch.full((128, 4), NAN, device=device)
    flat = AnchorGrid(grid.cells.to(device), grid.extents, grid.strides).flat()
    launch(_anchors_kernel, (1,), index, out, *kernel_arguments(*flat), BLOCK=128, device=device)
    assert torch.equal(out.cpu(), grid.anchors()[index.cpu()])


def inputs(dtype: torch.dtype = FP32, device: torch.device | str = "cpu", slots: int = 40) -> list:
    """Arguments of `decode_proposals`: empty slots, repeated anchors, images of which one is smaller than the grid."""
    logits, deltas = (torch.randn(2, ANCHORS) * 3).to(dtype), torch.randn(2, ANCHORS, 4).to(dtype)
    deltas[:, ::7, 2:] *= 5  # some dw and dh beyond log(1000 / 16)
    index = torch.randint(-3, ANCHORS, (2, slots))
    index[0, :4] = torch.tensor([0, ANCHORS - 1, -1, -(10**12)])
    sizes = torch.tensor([[20, 28], [17, 11]])
    grid = AnchorGrid(GRID.cells.to(device), GRID.extents, GRID.strides)
    return [logits.to(device), deltas.to(device), index.to(device), grid, sizes.to(device)]


def assert_close(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    """But for the last bits of exp(), which a box of 62.5 anchors' width magnifies; the same slots are empty."""
    assert [o.dtype for o in ours] == [FP32, FP32]
    torch.testing.assert_close(ours[0].cpu().double(), theirs[0].double(), rtol=2e-6, atol=2e-4)
    torch.testing.assert_close(ours[1].cpu().double(), theirs[1].double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_is_torchvisions_decoding(dtype, backend, device):
    # In fp64, an image after the other: BoxCoder, clip_boxes_to_image, the sizes that remain.
    arguments = inputs(dtype, device)
    logits, deltas, index, _, sizes = (a.cpu() if isinstance(a, Tensor) else a for a in arguments)
    anchors, coder = GRID.anchors().double(), BoxCoder((1.0, 1.0, 1.0, 1.0))
    boxes, scores = torch.zeros(2, 40, 4).double(), torch.full((2, 40), -1.0).double()
    for b in range(2):
        slot = (index[b] >= 0).nonzero()[:, 0]
        place = index[b, slot]
        box = coder.decode_single(deltas[b, place].double(), anchors[place])
        box = clip_boxes_to_image(box, tuple(sizes[b].tolist()))
        large = ((box[:, 2:] - box[:, :2]) >= 1e-3).all(1)
        boxes[b, slot[large]], scores[b, slot[large]] = box[large], logits[b, place[large]].double().sigmoid()
    ours = decode_proposals(*arguments, backend=backend)
    assert_close(ours, (boxes, scores))
    scale = deltas.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, 4))[..., 2:]
    assert (scale > math.log(1000 / 16)).any() and 8 < (scores < 0).sum() < 60 and (boxes[..., 3] == 20).any()


def test_reference_is_the_plain_composition():
    # To the last bit: the plain composition of the box arithmetic that the model is made of, too.
    from kernels.boxes import clip, decode, take

    logits, deltas, index, grid, sizes = inputs()
    index = index.clamp(min=0)
    scores = logits.gather(1, index).sigmoid()
    boxes = clip(decode(take(deltas, index), grid.anchors()[index]), sizes)
    valid = (scores >= 0) & (boxes[..., 2:] - boxes[..., :2] >= 1e-3).all(-1)
    wanted = torch.where(valid[..., None], boxes, 0.0), torch.where(valid, scores, -1.0)
    ours = decode_proposals(logits, deltas, index, grid, sizes, backend="torch")
    torch.testing.assert_close(ours, wanted, rtol=0, atol=0)
    assert 0 < valid.sum() < valid.numel()


def test_a_grid_is_its_anchors(device):
    # Made up in the kernel or read from memory: the same bits, through the same operations.
    arguments = inputs(device=device)
    given = [*arguments[:3], arguments[3].anchors(), arguments[4]]
    ours, theirs = (decode_proposals(*a, backend="triton") for a in (arguments, given))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


# (what, logit, deltas, whether there is a box); the anchor is 8 x 6 pixels in the middle of an image of 40 x 50
KINDS = [
    ("plain", 0.5, (0, 0, 0, 0), True),
    ("NaN dx", 0.5, (NAN, 0, 0, 0), False),
    ("NaN dy", 0.5, (0, NAN, 0, 0), False),
    ("NaN dw, which no limit may hide", 0.5, (0, 0, NAN, 0), False),
    ("NaN dh", 0.5, (0, 0, 0, NAN), False),
    ("dx beyond everything", 0.5, (INF, 0, 0, 0), False),
    ("dy beyond everything", 0.5, (0, -INF, 0, 0), False),
    ("dw that is limited", 0.5, (0, 0, INF, 0), True),
    ("dw that leaves no width", 0.5, (0, 0, -INF, 0), False),
    ("dh that leaves no height", 0.5, (0, 0, 0, -30), False),
    ("right of the image", 0.5, (9, 0, 0, 0), False),
    ("above the image", 0.5, (0, -9, 0, 0), False),
    ("NaN score", NAN, (0, 0, 0, 0), False),
    ("score of 1", INF, (0, 0, 0, 0), True),
    ("score of 0", -INF, (0, 0, 0, 0), True),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("min_size", [1e-3, 0.0])
def test_every_kind_of_box(min_size, backend, device):
    # What is no box is zeros and -1, also where no size is too small; the boxes around it are not touched.
    logits = torch.tensor([[k[1] for k in KINDS]], device=device)
    deltas = torch.tensor([[k[2] for k in KINDS]], dtype=FP32, device=device)
    anchors = torch.tensor([[21.0, 17, 29, 23]], device=device).repeat(len(KINDS), 1)
    index, sizes = torch.arange(len(KINDS), device=device)[None], torch.tensor([[40, 50]], device=device)
    boxes, scores = (
        t[0].cpu() for t in decode_proposals(logits, deltas, index, anchors, sizes, min_size, backend=backend)
    )
    lines = {"dw that leaves no width", "dh that leaves no height", "right of the image", "above the image"}
    for (what, logit, _, is_box), box, score in zip(KINDS, boxes, scores, strict=True):
        if min_size == 0 and what in lines:
            continue  # where no size is too small, a line is a box
        assert score == torch.tensor(logit).sigmoid() if is_box else score == -1, what
        assert (box != 0).any() == is_box, what
    assert boxes[0].tolist() == [21, 17, 29, 23] and boxes[7].tolist() == [0, 17, 50, 23]


@pytest.mark.parametrize("backend", BACKENDS)
def test_exactly_the_smallest_size(backend, device):
    # "At least": a box of 8 x 6 has a side of 6 for a limit of 6, and none for one above.
    anchors, sizes = torch.tensor([[21.0, 17, 29, 23]], device=device), torch.tensor([[40, 50]], device=device)
    arguments = torch.zeros(1, 1), torch.zeros(1, 1, 4), torch.zeros(1, 1, dtype=torch.int64)
    arguments = [*(a.to(device) for a in arguments), anchors, sizes]
    assert decode_proposals(*arguments, 6.0, backend=backend)[1] == 0.5
    assert decode_proposals(*arguments, 6.001, backend=backend)[1] == -1


def test_strided_inputs(device):
    # One of two logits, deltas with the coordinate first, an index cut from a sort, sizes that are columns.
    logits, deltas, index, grid, sizes = arguments = inputs(device=device)
    wide = torch.stack([logits, logits + 1], dim=2)[..., 0], deltas.transpose(1, 2).contiguous().transpose(1, 2)
    rest = torch.cat([index, index], dim=1)[:, : index.shape[1]], grid, torch.cat([sizes, sizes], dim=1).int()[:, :2]
    assert not any(t.is_contiguous() for t in (*wide, rest[0], rest[2]))
    ours, theirs = (decode_proposals(*a, backend="triton") for a in ((*wide, *rest), arguments))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_boxes_in_several_blocks(monkeypatch, device):
    # More slots than a program takes, the last block ragged.
    arguments = inputs(device=device)
    whole = decode_proposals(*arguments, backend="triton")
    monkeypatch.setattr(op, "tile", lambda on_gpu, interpreted: 16)
    torch.testing.assert_close(decode_proposals(*arguments, backend="triton"), whole, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "slots"), [(0, 3), (2, 0)])
def test_nothing_to_decode(batch, slots, backend, device):
    logits, deltas, _, grid, sizes = inputs(device=device)
    index = torch.zeros(batch, slots, dtype=torch.int64, device=device)
    boxes, scores = decode_proposals(logits[:batch], deltas[:batch], index, grid, sizes[:batch], backend=backend)
    assert boxes.shape == (batch, slots, 4) and scores.shape == (batch, slots)


def test_anchor_that_does_not_exist(device):
    # The kernel, called directly as on a GPU: an empty slot, nothing read outside.
    logits, deltas, index, grid, sizes = arguments = inputs(device=device)
    index[1, :3] = torch.tensor([ANCHORS, 10**15, -1])
    boxes, scores = op._decode(logits, deltas, index, *grid.flat(), sizes, 1e-3)
    assert (boxes[1, :3] == 0).all() and (scores[1, :3] == -1).all()
    with pytest.raises(IndexError, match=r"index \(negative ones aside\) must lie in"):
        decode_proposals(*(a.cpu() if isinstance(a, Tensor) else GRID for a in arguments))


@pytest.mark.parametrize("backend", BACKENDS)
def test_there_is_no_gradient(backend, device):
    # Proposals are where the graph ends (arXiv:1506.01497, section 3.2.2, calls it ignored).
    logits, deltas, index, grid, sizes = inputs(device=device)
    outs = decode_proposals(logits.requires_grad_(), deltas.requires_grad_(), index, grid, sizes, backend=backend)
    assert not any(o.requires_grad for o in outs)


def test_auto_on_a_cpu_is_the_reference(monkeypatch):
    # On a CPU the interpreter would take minutes; what ran is seen by its being replaced.
    monkeypatch.setattr(reference, "decode_proposals", lambda *arguments: "the reference")
    monkeypatch.setattr(reference, "stable_topk", lambda *arguments: "the reference")
    assert decode_proposals(*inputs()) == stable_topk(torch.zeros(1, 2), 1) == "the reference"


NAMES = ["logits", "deltas", "index", "anchors", "image_sizes"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(ANCHORS)}, ValueError, "logits must have 2 dimensions"),
        ({"logits": torch.zeros(2, ANCHORS).double()}, TypeError, "logits must be float16, bfloat16 or float32"),
        ({"deltas": torch.zeros(2, ANCHORS, 4).double()}, TypeError, "deltas must be float16, bfloat16 or float32"),
        ({"deltas": torch.zeros(2, ANCHORS, 3)}, ValueError, "deltas must have 3 dimensions, the last of size 4"),
        ({"deltas": torch.zeros(1, ANCHORS, 4)}, ValueError, rf"deltas must have shape \[2, {ANCHORS}, 4\]"),
        ({"index": torch.zeros(2, 4)}, TypeError, "index must be an int64 tensor"),
        ({"index": torch.zeros(3, 4, dtype=torch.int64)}, ValueError, r"index must have shape \[2, 4\]"),
        ({"index": torch.zeros(4, dtype=torch.int64)}, ValueError, "index must have 2 dimensions"),
        ({"anchors": torch.zeros(5, 4)}, ValueError, r"logits must have shape \[2, 5\]"),
        ({"anchors": torch.zeros(ANCHORS, 4).half()}, TypeError, "anchors must be float32"),
        ({"image_sizes": torch.zeros(2, 2)}, TypeError, "image_sizes must be an int32 or int64 tensor"),
        ({"image_sizes": torch.zeros(2, 3).int()}, ValueError, r"image_sizes must have shape \[2, 2\]"),
        ({"image_sizes": torch.zeros(2, 2, device="meta").int()}, ValueError, "all tensors must be on one device"),
        (
            {"logits": torch.zeros(2, 0), "deltas": torch.zeros(2, 0, 4), "anchors": torch.zeros(0, 4)},
            ValueError,
            "slots need anchors",
        ),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        decode_proposals(**dict(zip(NAMES, inputs(), strict=True)) | change)
