"""The pool of bitmaps: what goes in comes out, bit for bit, and nothing of a neighbour."""

import pytest
import torch
from torch import Tensor

from kernels import MaskPool
from kernels.mask_pool import mask_extents

SIZES = torch.tensor([[30, 41], [17, 9]])
PADDED = (32, 48)
# Widths of a byte, of less, of more, of one pixel; at all borders of the image; the whole of it.
EXTENTS = [
    torch.tensor([[3, 4, 11, 9], [0, 0, 41, 30], [40, 29, 41, 30], [20, 7, 37, 8]]),
    torch.tensor([[0, 2, 9, 17], [2, 0, 5, 17]]),
]
PACKED = pytest.mark.parametrize("packed", [True, False], ids=["bits", "bytes"])


def masks(dtype: torch.dtype = torch.bool) -> list[Tensor]:
    """Masks of noise inside their extents, the corner pixels set."""
    out = []
    for (height, width), extents in zip(SIZES.tolist(), EXTENTS, strict=True):
        of_image = torch.zeros(len(extents), height, width, dtype=dtype)
        for mask, (x0, y0, x1, y1) in zip(of_image, extents.tolist(), strict=True):
            mask[y0:y1, x0:x1] = (torch.rand(y1 - y0, x1 - x0) > 0.5).to(dtype)
            mask[y0, x0] = mask[y1 - 1, x1 - 1] = 1
        out.append(of_image)
    return out


@PACKED
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_round_trip(dtype, packed, device):
    given = masks(dtype)
    pool = MaskPool.of([m.to(device) for m in given], [e.to(device) for e in EXTENTS], 5, PADDED, packed)
    for b, mask in enumerate(given):
        dense = pool.dense(b)
        assert dense.dtype == torch.bool and dense.shape == (5, *PADDED)
        expected = torch.zeros_like(dense)
        expected[: len(mask), : mask.shape[1], : mask.shape[2]] = mask.to(device) != 0
        assert torch.equal(dense, expected)
    areas = sum(((e[:, 2] - e[:, 0] + 7) // 8 if packed else e[:, 2] - e[:, 0]) @ (e[:, 3] - e[:, 1]) for e in EXTENTS)
    assert torch.equal(pool.sizes.cpu(), SIZES)
    assert pool.bitmaps.dtype == torch.uint8 and len(pool.bitmaps) == areas
    assert not pool.extent[0, 4:].any() and not pool.extent[1, 2:].any() and not pool.offset[1, 2:].any()


def test_the_first_pixel_is_the_lowest_bit():
    # What a kernel, and whoever fills a pool by other means, rely on.
    mask = torch.zeros(1, 2, 11, dtype=torch.bool)
    mask[0, 0, [0, 3]], mask[0, 1, [7, 8, 10]] = True, True
    pool = MaskPool.of([mask], [torch.tensor([[0, 0, 11, 2]])], 1, (2, 11))
    assert pool.bitmaps.tolist() == [0b1001, 0, 0b10000000, 0b101]


@PACKED
def test_without_objects(packed):
    # In any image: one empty slot each, or as many as asked for.
    none = torch.zeros(0, 4, dtype=torch.int64)
    pool = MaskPool.of([torch.zeros(0, 30, 41), torch.zeros(0, 17, 9)], [none, none], 3, PADDED, packed)
    assert len(pool.bitmaps) == 0 and not pool.dense(1).any() and pool.dense(1).shape == (3, *PADDED)


def test_moves_whole(monkeypatch):
    # Every tensor, and what is no tensor along; the pool itself stays where it is.
    pool = MaskPool.of(masks(), EXTENTS, 4, PADDED, packed=False)
    moved = pool.to("meta")
    for name in ("bitmaps", "offset", "extent", "sizes"):
        assert getattr(moved, name).is_meta and not getattr(pool, name).is_meta
        assert getattr(moved, name).shape == getattr(pool, name).shape
    assert moved.padded_size == PADDED and moved.packed is False
    pinned = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda t: pinned.append(t) or t.clone())
    copy = pool.pin_memory()
    assert len(pinned) == 4 and torch.equal(copy.dense(0), pool.dense(0)) and copy.packed is False


def test_flat_is_what_an_operator_takes():
    # In the order of the class's own arguments, padded_size as a list of integers.
    pool = MaskPool.of(masks(), EXTENTS, 4, PADDED)
    bitmaps, offset, extent, sizes, padded_size, packed = pool.flat()
    again = MaskPool(bitmaps, offset, extent, sizes, tuple(padded_size), packed)
    assert padded_size == list(PADDED) and torch.equal(again.dense(0), pool.dense(0))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"bitmaps": torch.zeros(9)},
            TypeError,
            "bitmaps of a mask pool must be a tensor of torch.uint8, got torch.fl",
        ),
        ({"bitmaps": [1, 2]}, TypeError, "bitmaps of a mask pool must be a tensor of torch.uint8, got list"),
        ({"offset": torch.zeros(2, 3).int()}, TypeError, "offset of a mask pool must be a tensor of torch.int64"),
        ({"extent": torch.zeros(2, 3, 4).long()}, TypeError, "extent of a mask pool must be a tensor of torch.int32"),
        ({"sizes": torch.zeros(2, 2)}, TypeError, "sizes of a mask pool must be a tensor of torch.int64"),
        ({"bitmaps": torch.zeros(3, 3, dtype=torch.uint8)}, ValueError, "bitmaps must have 1 dimension and offset 2"),
        ({"offset": torch.zeros(6).long()}, ValueError, "bitmaps must have 1 dimension and offset 2"),
        ({"extent": torch.zeros(2, 3, 2).int()}, ValueError, r"extent must have shape \[2, 3, 4\], got \(2, 3, 2\)"),
        ({"sizes": torch.zeros(3, 2).long()}, ValueError, r"sizes must have shape \[2, 2\], got \(3, 2\)"),
        ({"padded_size": 32}, ValueError, "padded_size must be a height and a width, got 32"),
        ({"padded_size": (3, 32, 32)}, ValueError, "padded_size must be a height and a width"),
        ({"sizes": torch.zeros(2, 2, device="meta").long()}, ValueError, "all tensors must be on one device"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {
        "bitmaps": torch.zeros(9, dtype=torch.uint8), "offset": torch.zeros(2, 3).long(),
        "extent": torch.zeros(2, 3, 4).int(), "sizes": torch.zeros(2, 2).long(), "padded_size": (8, 8),
    } | change  # fmt: skip
    with pytest.raises(error, match=message):
        MaskPool(**arguments)


def test_extents_and_sizes_are_found():
    # What is not given: the tightest rectangles, zeros for a mask without pixels; as many slots as objects, the largest
    # size.
    mask = torch.zeros(3, 6, 8)
    mask[0, 1:3, 2:5], mask[2, 5, 7] = 1, 255
    assert mask_extents(mask).tolist() == [[2, 1, 5, 3], [0, 0, 0, 0], [7, 5, 8, 6]]
    pool = MaskPool.of([mask, torch.zeros(0, 9, 4)])
    assert pool.offset.shape == (2, 3) and pool.padded_size == (9, 8) and pool.sizes.tolist() == [[6, 8], [9, 4]]
    assert torch.equal(pool.dense(0)[:, :6], mask != 0) and len(pool.bitmaps) == 3


@pytest.mark.parametrize(
    ("given", "options", "error", "message"),
    [
        ([], {}, TypeError, "for each image, of at least one"),
        (torch.zeros(2, 4, 4), {}, TypeError, "must be a list"),
        ([torch.zeros(4, 4)], {}, ValueError, r"must be \[n, h, w\]"),
        ([torch.zeros(1, 0, 4)], {}, ValueError, "h and w at least 1"),
        ([torch.ones(3, 4, 4)], {"slots": 2}, ValueError, "3 objects, and there are 2 slots"),
        ([torch.ones(1, 4, 9)], {"padded_size": (8, 8)}, ValueError, "smaller than an image"),  # reads beyond weights
    ],
)
def test_what_cannot_be_packed(given, options, error, message):
    with pytest.raises(error, match=message):
        MaskPool.of(given, **options)


@pytest.mark.parametrize("extent", [[-5, -5, 10, 10], [0, 0, 100, 100], [9, 9, 3, 3], [0, 0, 24, 21]])
def test_extents_outside_the_image(extent):
    # A kernel would read beyond the object's bitmap.
    with pytest.raises(ValueError, match="extents of image 1 must lie inside its 20 x 24 pixels"):
        MaskPool.of(
            [torch.ones(1, 8, 8), torch.ones(1, 20, 24)], [torch.tensor([[0, 0, 8, 8]]), torch.tensor([extent])]
        )


def test_extents_of_another_form():
    with pytest.raises(ValueError, match=r"whole numbers of shape \[2, 4\], got \(1, 4\) of torch.float32"):
        MaskPool.of([torch.ones(2, 8, 8)], [torch.ones(1, 4)])
