"""Mask targets: torchvision's and detectron2's, from bitmaps that hold the objects' own rectangles alone."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection.roi_heads import project_masks_on_boxes
from torchvision.ops import roi_align

from kernels import MaskPool, mask_targets
from kernels.mask_targets import op, reference

STYLES = pytest.mark.parametrize("style", op.STYLES)
PACKED = pytest.mark.parametrize("packed", [True, False], ids=["bits", "bytes"])
NAN, INF = float("nan"), float("inf")
# Two images, neither of the padded size (64, 96), and neither the larger in both directions.
SIZES = ((57, 90), (64, 41))
# xyxy of the objects: widths that fill bytes and do not, all of an image, one pixel in its corner, its right and its
# bottom border.
OBJECTS = (
    ((3, 5, 40, 33), (0, 0, 90, 57), (89, 56, 90, 57), (70, 20, 90, 37)),
    ((8, 10, 24, 41), (0, 0, 41, 64), (20, 63, 21, 64), (1, 50, 30, 64)),
)


def masks(sizes=SIZES, objects=OBJECTS) -> list[Tensor]:
    """uint8 masks [G, H, W] of noise: every pixel matters. The last object of an image is solid."""
    out = []
    for (height, width), extents in zip(sizes, objects, strict=True):
        of_image = torch.zeros(len(extents), height, width, dtype=torch.uint8)
        for g, (x0, y0, x1, y1) in enumerate(extents):
            noise = torch.rand(y1 - y0, x1 - x0) < (1.0 if g == len(extents) - 1 else 0.6)
            of_image[g, y0:y1, x0:x1] = noise
        out.append(of_image)
    return out


def pool_of(given: list[Tensor], packed: bool = True, objects=OBJECTS, padded=(64, 96), slots=5) -> MaskPool:
    return MaskPool.of(given, [torch.tensor(e, dtype=torch.int64).view(-1, 4) for e in objects], slots, padded, packed)


def theirs(given: list[Tensor], boxes: Tensor, matched: Tensor, size: int, style: str) -> Tensor:
    """torchvision's RoIAlign of each image's full masks, on a CPU: the soft targets, for detectron2 too."""
    soft = []
    for mask, box, index in zip(given, boxes.cpu(), matched.cpu(), strict=True):
        rois = torch.cat([index[:, None].to(box.dtype), box], dim=1)
        soft.append(roi_align(mask[:, None].to(box.dtype), rois, (size, size), 1.0, -1, style == "detectron2")[:, 0])
    return torch.stack(soft)


def check(ours: Tensor, soft: Tensor, style: str, tolerance: float = 2e-7) -> None:
    """Ours are theirs: soft to rounding, hard where the soft value is not as good as 0.5."""
    if style == "torchvision":
        assert ours.dtype == soft.dtype
        torch.testing.assert_close(ours.cpu(), soft, rtol=0, atol=tolerance)
    else:
        decided = (soft - 0.5).abs() > 1e-6
        assert ours.dtype == torch.bool and decided.float().mean() > 0.5
        assert torch.equal(ours.cpu()[decided], (soft >= 0.5)[decided])


def run(pool: MaskPool, boxes: Tensor, matched: Tensor, size: int, style: str, device, backend="triton") -> Tensor:
    return mask_targets(pool.to(device), boxes.to(device), matched.to(device), size, style, backend=backend)


# Of both images: inside, on whole pixels, thin both ways, below a pixel, a point; the object's own and the image's;
# beyond the image on each side, and all around; inverted, which torchvision widens to a pixel and detectron2 leaves
# empty.
BOXES = torch.tensor(
    [
        [5.3, 7.1, 30.2, 29.9], [8, 12, 36, 40], [4.0, 4.0, 4.2, 30.0], [3.0, 11.3, 40.0, 11.5],
        [10.2, 20.3, 10.6, 20.8], [9.0, 9.0, 9.0, 9.0], [3, 5, 40, 33], [1, 50, 30, 64], [0, 0, 90, 57],
        [0, 0, 41, 64], [-9.5, 3.2, 20.1, 30.0],
        [60.3, 8.8, 101.7, 44.0], [2.0, -20.0, 38.0, 9.5], [11.0, 50.2, 33.0, 80.7], [-30.0, -20.0, 120.0, 90.0],
        [30.0, 33.0, 20.0, 21.0], [-80.0, 2.0, -50.0, 30.0], [89.0, 56.0, 90.0, 57.0],
    ]
)  # fmt: skip


@STYLES
def test_every_kind_of_box(style, device):
    # As bits and as bytes: the same targets to the last bit.
    given, boxes = masks(), BOXES.expand(2, -1, 4)
    matched = torch.tensor(
        [[0, 1, 3, 0, 1, 0, 0, 3, 0, 1, 0, 3, 0, 1, 3, 0, 0, 2], [1, 0] * 3 + [3] + [0, 1, 3] * 3 + [1, 3]]
    )
    ours = run(pool_of(given), boxes, matched, 14, style, device)
    check(ours, theirs(given, boxes, matched, 14, style), style)
    part = slice(5, 13)
    bytes_too = run(pool_of(given, packed=False), boxes[:, part], matched[:, part], 14, style, device)
    assert torch.equal(bytes_too, ours[:, part])


def test_theirs_are_torchvisions_targets():
    # What the tests compare to is its own function; detectron2 has no other test here than its threshold.
    given, boxes = masks(), torch.tensor([[5.3, 7.1, 30.2, 29.9], [0, 0, 41, 57]]).expand(2, -1, 4)
    matched = torch.tensor([[0, 3], [1, 2]])
    projected = [project_masks_on_boxes(m, b, i, 28) for m, b, i in zip(given, boxes, matched, strict=True)]
    assert torch.equal(theirs(given, boxes, matched, 28, "torchvision"), torch.stack(projected))


# One bin; the usual; as many as a tile of bins has (32), one more, and four tiles. Extents differ between the axes.
@STYLES
@pytest.mark.parametrize("size", [1, 7, 28, 32, 33, 56])
def test_sizes(size, style, device):
    given = masks()
    scale = min(1.0, size / 7)  # boxes of few samples a bin, which are what the interpreter takes long for
    corner = torch.tensor([[21.3, 12.7], [2.1, 3.6], [12.0, 51.0]])
    boxes = torch.cat([corner, corner + scale * torch.tensor([[29.9, 17.2], [37.1, 50.0], [20.5, 13.0]])], dim=1)
    boxes, matched = boxes.expand(2, -1, 4), torch.tensor([[0, 1, 3], [1, 0, 3]])
    check(run(pool_of(given), boxes, matched, size, style, device), theirs(given, boxes, matched, size, style), style)


@pytest.mark.parametrize("backend", ["triton", "torch", "torchvision"])
def test_the_known_threshold_counts_as_object(backend, device):
    # detectron2's >= 0.5, of a mask of alternate columns: a bin of two has exactly half of them.
    columns = torch.zeros(1, 8, 8)
    columns[..., ::2] = 1
    boxes, matched = torch.tensor([[[0.0, 0.0, 8.0, 8.0]]]), torch.zeros(1, 1, dtype=torch.int64)
    assert run(MaskPool.of([columns]), boxes, matched, 4, "detectron2", device, backend).all()


@STYLES
@pytest.mark.parametrize(("bins", "cells"), [(4, 2), (8, 4)])
def test_several_tables(bins, cells, style, device, monkeypatch):
    # A bin of more cells than a table has weights of, along one axis and both; several tiles of bins, the last ragged.
    monkeypatch.setattr(op, "BINS", bins)
    monkeypatch.setattr(op, "CELLS", cells)
    given = masks()
    boxes = torch.tensor([[[2.3, 3.1, 30.0, 24.9]], [[-3.0, 20.0, 33.3, 24.0]]])
    matched = torch.tensor([[0], [0]])
    check(run(pool_of(given), boxes, matched, 9, style, device), theirs(given, boxes, matched, 9, style), style)


@STYLES
def test_the_border_of_the_objects_own_image(style, device):
    # torchvision clamps at the border of the mask that it is given: a sample up to a pixel beyond sees the last pixel.
    # So not of the padded batch, and not of the object's rectangle, beyond which there is background.
    given = masks()
    pool = pool_of(given)
    boxes = torch.tensor([[83.5, 30.0, 90.5, 36.0], [66.0, 15.0, 73.0, 22.0], [60.0, 52.0, 67.0, 58.0]]).expand(
        2, -1, 4
    )
    boxes = boxes.clone()
    boxes[1] = torch.tensor([[10.0, 60.0, 16.0, 65.0], [36.0, 2.0, 42.0, 9.0], [27.0, 49.0, 34.0, 55.0]])
    matched = torch.tensor([[3, 3, 1], [3, 1, 3]])
    soft = theirs(given, boxes, matched, 7, style)
    assert (soft[0, 0, :, -1] == 1).all() and (soft[0, 1, :, 0] == 0).all()
    check(run(pool, boxes, matched, 7, style, device), soft, style)


@STYLES
@PACKED
def test_nothing_else_in_memory_is_seen(style, packed, device):
    # Neighbours in the buffer, and the bits that fill up a row's last byte: set or not, the targets are the same.
    # Objects that no box is matched to are all set.
    given = masks()
    pool = pool_of(given, packed)
    boxes, matched = torch.stack([BOXES[[6, 17]], BOXES[[2, 7]]]), torch.tensor([[0, 2], [0, 3]])
    clean = run(pool, boxes, matched, 14, style, device)
    check(clean, theirs(given, boxes, matched, 14, style), style)
    dirty = torch.full((len(pool.bitmaps) + 200,), 255, dtype=torch.uint8)
    for b, g in ((0, 0), (0, 2), (1, 0), (1, 3)):
        x0, y0, x1, y1 = OBJECTS[b][g]
        pitch = (x1 - x0 + 7) // 8 if packed else x1 - x0
        begin, length = pool.offset[b, g].item(), pitch * (y1 - y0)
        rows = pool.bitmaps[begin : begin + length].view(y1 - y0, pitch).clone()
        if packed:
            rows[:, -1] |= 255 << ((x1 - x0 - 1) % 8 + 1) & 255
        dirty[100 + begin : 100 + begin + length] = (
            rows.flatten() if packed else rows.flatten() * 255
        )  # any but 0 is set
    surrounded = MaskPool(dirty, pool.offset + 100, pool.extent, pool.sizes, pool.padded_size, packed)
    assert torch.equal(run(surrounded, boxes, matched, 14, style, device), clean)


@STYLES
@pytest.mark.parametrize("backend", ["triton", "torch", "torchvision"])
def test_boxes_that_are_none(backend, style, device):
    # NaN, infinite, a million pixels wide: zeros, at once, where torchvision would take a sample a pixel of it. A box
    # of an ordinary size far away sees nothing anyway. The box after them is as it is alone.
    good = [5.0, 6.0, 33.0, 30.0]
    bad = [
        [NAN, 6, 33, 30], [5, NAN, 33, 30], [5, 6, NAN, 30], [5, 6, 33, NAN], [NAN] * 4, [5, 6, INF, 30],
        [-INF, 6, 33, 30], [-INF, -INF, INF, INF], [INF] * 4, [-INF] * 4, [-1e6, 6, 1e6, 30],
        [5, -1e30, 33, 1e30], [5, 6, 3e38, 3e38],
        [1e6, 1e6, 1e6 + 20, 1e6 + 20], [-1e30, 6, -1e30, 30], [1e30, 6, -1e30, 30], [-3e38, -3e38, 3e38, 3e38],
    ]  # fmt: skip
    given, matched = masks(), torch.zeros(2, len(bad) + 1, dtype=torch.int64)
    ours = run(pool_of(given), torch.tensor([*bad, good]).expand(2, -1, 4), matched, 7, style, device, backend)
    assert not ours[:, :-1].any() and ours[:, -1].any()
    alone = theirs(given, torch.tensor([[good]]).expand(2, 1, 4), matched[:, :1], 7, style)
    check(ours[:, -1:], alone, style, 5e-7)


@STYLES
def test_a_long_image(style, device):
    # The bound on what is looked at counts from the image's border: with one bin it is less than this image is long.
    pool = MaskPool.of([torch.ones(1, 3, 5000)])
    boxes, matched = torch.tensor([[[4700.0, 0.0, 4702.0, 2.0]]]), torch.zeros(1, 1, dtype=torch.int64)
    for backend in ("triton", "torch"):
        assert run(pool, boxes, matched, 1, style, device, backend) == 1


@STYLES
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_match_out_of_range(dtype, style, device):
    # An IndexError on a CPU; the operator itself, as on a GPU: zeros, and the neighbours' targets as they are.
    pool, boxes = pool_of(masks()).to(device), torch.tensor([5.0, 6.0, 33.0, 30.0], device=device).expand(2, 5, 4)
    largest = torch.iinfo(dtype).max
    matched = torch.tensor([[0, 5, -1, largest, 1], [1, -largest, 10, 4, 0]], dtype=dtype, device=device)
    ours = op._targets(*pool.flat(), boxes, matched, 7, style == "detectron2", "triton")
    assert not ours[:, 1:4].any()  # slot 4 is empty
    expected = op._targets(*pool.flat(), boxes, matched.clamp(0, 1), 7, style == "detectron2", "triton")
    assert torch.equal(ours[:, [0, 4]], expected[:, [0, 4]]) and expected[:, [0, 4]].flatten(2).any(-1).all()
    with pytest.raises(IndexError, match=r"matched_idx must lie in \[0, 5\)"):
        mask_targets(pool.to("cpu"), boxes.cpu(), matched.cpu(), 7, style)


@STYLES
@pytest.mark.parametrize("backend", ["triton", "torch", "torchvision"])
def test_nothing(backend, style, device):
    # No object in the pool, no RoI, no image, and no slot that a match could mean.
    dtype = torch.bool if style == "detectron2" else torch.float32
    none = pool_of([torch.zeros(0, 57, 90), torch.zeros(0, 64, 41)], objects=((), ()))
    assert len(none.bitmaps) == 0
    boxes = torch.tensor([5.0, 6.0, 33.0, 30.0]).expand(2, 3, 4)
    ours = run(none, boxes, torch.zeros(2, 3, dtype=torch.int64), 7, style, device, backend)
    assert ours.dtype == dtype and ours.shape == (2, 3, 7, 7) and not ours.any()
    ours = run(pool_of(masks()), boxes[:, :0], torch.zeros(2, 0, dtype=torch.int64), 7, style, device, backend)
    assert ours.dtype == dtype and ours.shape == (2, 0, 7, 7)
    nobody = pool_of(masks()).map(lambda t: t[:0])
    ours = run(nobody, boxes[:0], torch.zeros(0, 3, dtype=torch.int64), 7, style, device, backend)
    assert ours.dtype == dtype and ours.shape == (0, 3, 7, 7)


def test_pool_without_slots(device):
    # Its tables are empty: as on a GPU, where nobody looks at the matches first, nothing may be read of them.
    nothing = pool_of([torch.zeros(0, 57, 90), torch.zeros(0, 64, 41)], objects=((), ()), slots=0).to(device)
    boxes = torch.tensor([5.0, 6.0, 33.0, 30.0], device=device).expand(2, 3, 4)
    matched = torch.zeros(2, 3, dtype=torch.int64, device=device)
    assert not op._targets(*nothing.flat(), boxes, matched, 7, False, "triton").any()


@STYLES
@PACKED
def test_fp64(style, packed, device):
    # To fp64's own rounding, which one constant or scalar in fp32 would not leave.
    given, boxes = masks(), BOXES[[0, 4, 7, 10, 13, 15]].double().expand(2, -1, 4) + 0.1
    matched = torch.tensor([[0, 1, 3, 0, 1, 3], [1, 0, 3, 1, 3, 0]])
    ours = run(pool_of(given, packed), boxes, matched, 7, style, device)
    check(ours, theirs(given, boxes, matched, 7, style), style, 1e-15)


@STYLES
def test_strided_arguments(style, device):
    # Boxes with the coordinate first, every other match, tables of a larger batch.
    pool, boxes = pool_of(masks()), BOXES[:6].expand(2, -1, 4)
    matched = torch.tensor([[0, 1, 3, 0, 1, 3], [1, 0, 3, 1, 3, 0]])
    expected = run(pool, boxes, matched, 7, style, device)
    spread = pool.map(lambda t: t if t.ndim == 1 else torch.stack([t, t], dim=-1)[..., 0])
    assert not spread.extent.is_contiguous() and not spread.offset.is_contiguous()
    wide, every = boxes.transpose(1, 2).contiguous().transpose(1, 2), matched.repeat_interleave(2, dim=1)[:, ::2]
    on_device = [t.to(device) for t in (wide, every)]
    assert torch.equal(mask_targets(spread.to(device), *on_device, 7, style, backend="triton"), expected)


def test_no_gradient_flows(device):
    boxes = torch.tensor([5.0, 6.0, 33.0, 30.0], device=device).expand(2, 1, 4).clone().requires_grad_()
    for backend in ("triton", "torch", "torchvision"):
        matched = torch.zeros(2, 1, dtype=torch.int64, device=device)
        assert not mask_targets(pool_of(masks()).to(device), boxes, matched, 7, backend=backend).requires_grad


@STYLES
@PACKED
@pytest.mark.parametrize("chunk", [1, 1 << 24])
def test_reference(chunk, packed, style, monkeypatch):
    # A product of matrices; a mask at full size at a time, and all.
    monkeypatch.setattr(reference, "CHUNK_PIXELS", chunk)
    given, boxes = masks(), BOXES.expand(2, -1, 4)
    matched = torch.arange(boxes[..., 0].numel()).view(2, -1) % 4
    ours = run(pool_of(given, packed), boxes, matched, 28, style, "cpu", "torch")
    check(ours, theirs(given, boxes, matched, 28, style), style, 1e-6)
    exact = run(pool_of(given, packed), boxes, matched, 28, style, "cpu", "torchvision")
    soft = theirs(given, boxes, matched, 28, style)
    assert torch.equal(exact, soft if style == "torchvision" else soft >= 0.5)


def test_auto_on_a_cpu_is_torchvisions_op(monkeypatch):
    # The faster of the two there; the reference where torchvision is not installed.
    answer = torch.rand(2, 3, 7, 7)
    boxes, matched = torch.tensor([5.0, 6.0, 33.0, 30.0]).expand(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)
    for name, installed in (("torchvision_way", True), ("mask_targets", False)):
        monkeypatch.setattr("kernels.backend._HAS_TORCHVISION", installed)
        monkeypatch.setattr(reference, name, lambda *arguments: answer.clone())
        assert torch.equal(mask_targets(pool_of(masks()), boxes, matched, 7), answer)
        monkeypatch.undo()


@st.composite
def cases(draw: st.DrawFn) -> tuple:
    """An image, an object in it, boxes of at most 4 samples a bin, and a size; coordinates in eighths of a pixel."""
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    x0, y0 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    extent = (x0, y0, draw(st.integers(x0 + 1, width)), draw(st.integers(y0 + 1, height)))
    size = draw(st.integers(1, 9))

    def edges(length: int) -> tuple[float, float]:
        low = draw(st.integers(-32, 8 * length + 16))
        return low / 8, (low + draw(st.integers(-8, 8 * min(4 * size, length + 8)))) / 8

    (left, right), (top, bottom) = edges(width), edges(height)
    return height, width, extent, (left, top, right, bottom), size, draw(st.booleans()), draw(st.integers(0, 1000))


@STYLES
@settings(
    max_examples=20,
    deadline=None,  # the interpreter's
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(case=cases())
def test_drawn_boxes(style, device, case):
    # torchvision's, in fp32, in which both place their samples by the same operations.
    height, width, extent, box, size, packed, seed = case
    torch.manual_seed(seed)
    given = masks([(height, width)], [(extent, extent)])
    pool = pool_of(given, packed, [(extent, extent)], (height + 3, width + 1), 2)
    boxes, matched = torch.tensor([[box, box]]), torch.tensor([[0, 1]])
    soft = theirs(given, boxes, matched, size, style)
    ours = run(pool, boxes, matched, size, style, device)
    if style == "torchvision":
        torch.testing.assert_close(ours.cpu(), soft, rtol=0, atol=2e-7)
    else:
        assert ((ours.cpu() == (soft >= 0.5)) | ((soft - 0.5).abs() <= 1e-6)).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mask_pool": torch.zeros(2, 8, 8)}, TypeError, "mask_pool must be a MaskPool, got Tensor"),
        ({"boxes": torch.zeros(3, 4)}, ValueError, "boxes must have 3 dimensions, the last of size 4"),
        ({"boxes": torch.zeros(2, 3, 4).half()}, TypeError, "boxes must be float32 or float64, got torch.float16"),
        ({"boxes": torch.zeros(3, 3, 4)}, ValueError, "boxes must be those of the pool's 2 images"),
        ({"matched_idx": torch.zeros(2, 3)}, TypeError, "matched_idx must be an int32 or int64 tensor"),
        ({"matched_idx": torch.zeros(2, 4).long()}, ValueError, r"matched_idx must have shape \[2, 3\]"),
        ({"matched_idx": torch.zeros(2, 3, device="meta").long()}, ValueError, "all tensors must be on one device"),
        ({"size": 0}, ValueError, "size must be a positive integer, got 0"),
        ({"size": (28, 28)}, ValueError, "size must be a positive integer"),
        ({"style": "mmdet"}, ValueError, "unknown style 'mmdet'; choose one of torchvision, detectron2"),
        ({"backend": "cuda"}, ValueError, "unknown backend"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {
        "mask_pool": pool_of(masks()), "boxes": torch.zeros(2, 3, 4), "matched_idx": torch.zeros(2, 3).long(),
        "size": 28,
    } | change  # fmt: skip
    with pytest.raises(error, match=message):
        mask_targets(**arguments)
