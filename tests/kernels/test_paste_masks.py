"""Masks in the image: torchvision's `paste_masks_in_image`, in the memory of the output alone."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection.roi_heads import expand_boxes, paste_masks_in_image

from kernels import mask_windows, paste_mask_crops, paste_masks
from kernels.paste_masks import op, reference

SIZE = (57, 83)
BACKENDS = ["triton", "torch", "torchvision"]


def random_boxes(n, reach=0.25):
    """Some lie across the image's edges, none wholly outside, where torchvision raises errors."""
    extent = torch.tensor([SIZE[1], SIZE[0]])
    corner = (torch.rand(n, 2) * (1 + reach) - reach) * extent
    return torch.cat([corner, corner + reach * extent + 2 + torch.rand(n, 2) * extent], dim=1)


def inputs(n=7, shape=(28, 28)):
    return torch.rand(n, *shape), random_boxes(n)


def expected(masks, boxes, size=SIZE):
    """torchvision's, on the CPU."""
    return paste_masks_in_image(masks[:, None], boxes, size)[:, 0]


# torchvision's 28 x 28; a size of which (M + 2) / M is no binary fraction; one cell; not square: M' decides by how much
# the box grows, on both axes.
@pytest.mark.parametrize("shape", [(28, 28), (7, 7), (1, 1), (5, 9)])
def test_is_torchvisions_paste(shape, device):
    masks, boxes = inputs(shape=shape)
    values = expected(masks, boxes)
    ours = {b: paste_masks(masks.to(device), boxes.to(device), SIZE, None, backend=b).cpu() for b in BACKENDS[:2]}
    assert torch.equal(ours["triton"], ours["torch"]) and (values > 0).any() and (values == 0).any()
    torch.testing.assert_close(ours["torch"], values, rtol=0, atol=1e-6)
    for threshold in (0.5, 0.3):
        ours = {b: paste_masks(masks.to(device), boxes.to(device), SIZE, threshold, backend=b) for b in BACKENDS}
        certain = (values - threshold).abs() > 1e-6
        for pasted in ours.values():
            assert pasted.dtype == torch.bool
            assert torch.equal(pasted.cpu() & certain, (values > threshold) & certain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_values(backend, device):
    # A box that grows from 27.07 to 29.0 pixels covers 30, as many as the mask has cells with its border: a copy. A box
    # of no width and height is one pixel, the middle of the mask.
    masks = torch.rand(2, 28, 28)
    masks[1] = masks[1].mean()
    boxes = torch.tensor([[11.0, 21, 38.07, 48.07], [70, 5, 70, 5]])
    pasted = paste_masks(masks.to(device), boxes.to(device), SIZE, None, backend=backend).cpu()
    wanted = torch.zeros(2, *SIZE)
    wanted[0, 21:49, 11:39], wanted[1, 5, 70] = masks[0], masks[1, 0, 0]
    torch.testing.assert_close(pasted, wanted, rtol=0, atol=1e-6)


def test_boxes_end_where_torchvisions_end(device):
    # Truncated towards zero once grown, in fp32: of 7 by 9 / 7 about their centres, boxes of sevenths end on or next to
    # whole pixels, below 0 too, where another order of operations moves an edge.
    corner = torch.randint(-200, 200, (4000, 2)) / 7
    boxes = torch.cat([corner, corner + torch.randint(1, 99, (4000, 2)) / 7], dim=1)
    theirs = expand_boxes(boxes, float(7 + 2) / 7)
    assert ((theirs - theirs.round()).abs() < 1e-5).any() and (theirs.double() != exactly_expanded(boxes)).any()
    assert torch.equal(reference.integer_boxes(boxes.to(device), 7).cpu(), theirs.to(torch.int64))
    near = (theirs - theirs.round()).abs().amin(1).argsort()[:40]
    masks, near = torch.rand(40, 7, 7, device=device), boxes[near].to(device)
    ours, others = (paste_masks(masks, near, 40, None, backend=b) for b in BACKENDS[:2])
    assert torch.equal(ours, others)


def exactly_expanded(boxes):
    return expand_boxes(boxes.double(), 9 / 7)


BROKEN = [
    [-50.0, 5, -30, 25],
    [5, -50, 25, -30],
    [200, 5, 220, 25],
    [5, 200, 25, 220],
    [30, 10, 10, 30],  # its right edge left of the left one
    [float("nan"), 5, 20, 20],
    [5, 5, 20, float("nan")],
    [5, 5, float("inf"), 20],
    [float("-inf"), 5, float("inf"), 20],
    [-3e9, 5, 3e9, 20],  # reaches across, but beyond what is taken for a box
    [5, 1e30, 20, 2e30],
]


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_broken_boxes_are_empty_masks(backend, device):
    # Outside on each side, inverted, NaN, infinite, too far: nothing pasted, no address astray, the next mask unharmed.
    boxes = torch.tensor([*BROKEN, [5, 5, 20, 20]], device=device)
    masks = torch.ones(len(boxes), 4, 4, device=device)
    for threshold in (None, 0.5, 0.0):
        pasted = paste_masks(masks, boxes, SIZE, threshold, backend=backend)
        assert not pasted[:-1].any() and pasted[-1].any()
    crops = paste_mask_crops(masks, boxes, SIZE, backend=backend)
    assert (crops.windows[:-1] == 0).all() and (crops.offsets[:-1] == 0).all()
    assert len(crops.pixels) == crops.offsets[-1] == crops.windows[-1, 2:].prod() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_masks(backend, device):
    masks, boxes = torch.rand(0, 28, 28, device=device), torch.rand(0, 4, device=device)
    pasted = paste_masks(masks, boxes, SIZE, backend=backend)
    assert pasted.shape == (0, *SIZE) and pasted.dtype == torch.bool
    crops = paste_mask_crops(masks, boxes, SIZE, None, backend=backend)
    assert crops.pixels.shape == (0,) and crops.windows.shape == (0, 4) and crops.offsets.tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_half_types(dtype, backend, device):
    # Computed in fp32: as if both had been widened first. (torchvision's boxes would be whole pixels off.)
    masks, boxes = (x.to(dtype).to(device) for x in inputs(3))
    pasted = paste_masks(masks, boxes, SIZE, None, backend=backend)
    assert pasted.dtype == torch.float32
    assert torch.equal(pasted, paste_masks(masks.float(), boxes.float(), SIZE, None, backend="torch"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_threshold_is_exceeded(backend, device):
    # A value equal to the threshold is outside, as in `> threshold`; compared in fp32, where 0.3 is above the double.
    for threshold in (0.5, 0.3):
        masks = torch.full((2, 2, 2), threshold, device=device)
        masks[1] = torch.nextafter(masks[1], masks[1] + 1)
        boxes = torch.tensor([[4.0, 4, 5, 5]], device=device).expand(2, 4)
        below, above = paste_masks(masks, boxes, 10, threshold, backend=backend)
        assert not below.any() and above.any()


def test_strided_inputs(device):
    # Every other mask, transposed; boxes with the coordinate first.
    masks, boxes = (x.to(device) for x in inputs(6))
    wide, narrow = masks[::2].transpose(1, 2), boxes.T.contiguous().T[::2]
    assert not wide.is_contiguous() and not narrow.is_contiguous()
    assert torch.equal(
        paste_masks(wide, narrow, SIZE, backend="triton"),
        paste_masks(wide.contiguous(), narrow.contiguous(), SIZE, backend="torch"),
    )


# In the interpreter a window is one block: here are small ones as on a GPU, some without a pixel of the box. Rows are
# longer and shorter than a part and a block, and of one pixel; masks begin at a multiple of 16 numbers and elsewhere.
@pytest.mark.parametrize("size", [(9, 37), (8, 48), (40, 7), (33, 1), (1, 90)])
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_tiles_of_a_gpus_shape(size, threshold, device, monkeypatch):
    monkeypatch.setattr(op, "_blocks", lambda largest: (3, 64, 16))
    extent = torch.tensor([size[1], size[0]])
    corner = torch.rand(3, 2) * extent - 2
    boxes = torch.cat([corner, corner + 1 + torch.rand(3, 2) * extent / 2], dim=1).to(device)
    boxes[1] = torch.tensor([-3, -3, size[1] + 3, size[0] + 3])  # every pixel: each is the first of some row, or block
    masks = torch.rand(3, 6, 6, device=device)
    dense = paste_masks(masks, boxes, size, threshold, backend="torch")
    assert dense.any() and torch.equal(paste_masks(masks, boxes, size, threshold, backend="triton"), dense)
    check_crops(paste_mask_crops(masks, boxes, size, threshold, backend="triton"), dense)


def check_crops(crops, dense):
    """The crops are where they say they are."""
    assert crops.pixels.dtype == dense.dtype and crops.pixels.shape == (crops.offsets[-1],)
    for i, (x, y, width, height) in enumerate(crops.windows.tolist()):
        crop = crops.pixels[crops.offsets[i] : crops.offsets[i + 1]]
        assert torch.equal(crop.view(height, width), dense[i, y : y + height, x : x + width])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_crops_are_windows_of_the_whole(backend, threshold, device):
    # By default all that is not 0; given, any window: a part of the box, one beyond it, one beside it, none, the image.
    masks, boxes = (x.to(device) for x in inputs(5))
    dense = paste_masks(masks, boxes, SIZE, threshold, backend=backend)
    crops = paste_mask_crops(masks, boxes, SIZE, threshold, backend=backend)
    check_crops(crops, dense)
    assert crops.windows.equal(mask_windows(masks, boxes, SIZE).cpu())
    assert (crops.pixels > 0).sum() == (dense > 0).sum() > 0
    x, y, width, height = crops.windows[0].tolist()
    windows = [[x + 3, y + 2, width - 5, height - 6], [0, 0, 83, 9], [82, 56, 1, 1], [10, 10, 0, 4], [0, 0, 83, 57]]
    crops = paste_mask_crops(masks, boxes, SIZE, threshold, windows=torch.tensor(windows), backend=backend)
    check_crops(crops, dense)
    assert crops.windows.tolist() == windows


def test_nothing_is_written_beside_the_output(device):
    # The stores of 16 numbers and the ragged ones at both ends: what lies before and behind stays as it was.
    masks, boxes = (x.to(device) for x in inputs(3))
    windows = torch.tensor([[3, 4, 21, 11], [40, 20, 17, 30], [0, 0, 5, 1]], device=device)
    areas = windows[:, 2] * windows[:, 3]
    memory = torch.full((2048,), 7, dtype=torch.uint8, device=device)
    offsets = areas.cumsum(0) - areas + 5
    op._launch(masks, boxes, windows, offsets, memory[64:1600], 0, 0, 0.5, 510, True)
    written = torch.zeros(2048, dtype=torch.bool, device=device)
    written[69 : 69 + int(areas.sum())] = True
    assert (memory[written] <= 1).all() and (memory[~written] == 7).all()


def test_places_beyond_32_bits(device):
    # Output of 2 GiB and more: on a CPU it is memory that the system never gives, but for the crop at its end.
    masks, boxes = (x.to(device) for x in inputs(1))
    window = mask_windows(masks, boxes, SIZE)
    area, offset = int(window[0, 2:].prod()), (1 << 32) + 37
    storage = torch.UntypedStorage(offset + area, device=device)
    memory = torch.tensor([], dtype=torch.uint8, device=device).set_(storage, 0, (offset + area,))
    op._launch(masks, boxes, window, torch.tensor([offset], device=device), memory, 0, 0, 0.5, area, True)
    assert torch.equal(memory[offset:].bool(), paste_mask_crops(masks, boxes, SIZE, backend="torch").pixels)


def test_dense_places_beyond_32_bits(device):
    if device.type == "cpu":
        pytest.skip("3 GiB, and a program for each 64 KiB of them")
    masks, boxes = torch.ones(3, 4, 4, device=device), torch.tensor([[30_000.0, 32_700, 32_760, 32_760]], device=device)
    pasted = paste_masks(masks, boxes.expand(3, 4), 1 << 15, backend="triton")
    one = paste_mask_crops(masks[:1], boxes, 1 << 15, backend="torch")
    x, y, width, height = one.windows[0].tolist()
    assert torch.equal(pasted[2, y : y + height, x : x + width].flatten(), one.pixels)
    assert (pasted.sum((1, 2)) == one.pixels.sum()).all()


class LargestFloats(TorchDispatchMode):
    """Numbers in the largest floating tensor that any operation returns."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point():
            self.numbers = max(self.numbers, out.numel())
        return out


def test_the_reference_makes_no_floats_of_the_images_size(device):
    # A mask over all of an image, a band at a time: the same as at once.
    masks, boxes = torch.rand(1, 28, 28, device=device), torch.tensor([[0.0, 0, 1300, 900]], device=device)
    with LargestFloats() as largest:
        pasted = paste_masks(masks, boxes, (900, 1300), backend="torch")
    assert 0 < largest.numbers <= reference.BAND < 900 * 1300
    values = expected(masks.cpu(), boxes.cpu(), (900, 1300))
    certain = (values - 0.5).abs() > 1e-6
    assert torch.equal(pasted.cpu() & certain, (values > 0.5) & certain)


def test_crops_wait_once_and_not_at_all_for_given_windows(device):
    # The windows' sizes must be known; whoever knows them already does not wait again.
    from forbid_sync import WaitsForDevice, forbid_sync

    from kernels.runtime import record_launches

    masks, boxes = (x.to(device) for x in inputs(2))
    windows = mask_windows(masks, boxes, SIZE).cpu()
    with pytest.raises(WaitsForDevice), forbid_sync(), record_launches():
        paste_mask_crops(masks, boxes, SIZE, backend="triton")
    with forbid_sync(), record_launches() as launches:
        mask_windows(masks, boxes, SIZE)
        paste_masks(masks, boxes, SIZE, backend="triton")
    assert len(launches) == 1
    with record_launches() as launches:
        paste_mask_crops(masks, boxes, SIZE, windows=windows, backend="triton")
    assert len(launches) == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"masks": torch.zeros(2, 1, 6, 6)}, ValueError, "masks must have 3 dimensions"),
        ({"masks": torch.zeros(2, 6, 6).double()}, TypeError, "masks must be float16, bfloat16 or float32"),
        ({"masks": torch.zeros(2, 0, 6)}, ValueError, "masks must not be empty"),
        ({"boxes": torch.zeros(3, 4)}, ValueError, r"boxes must have shape \[2, 4\]"),
        ({"boxes": torch.zeros(2, 4).double()}, TypeError, "boxes must be float16, bfloat16 or float32"),
        ({"boxes": torch.zeros(2, 4, device="meta")}, ValueError, "all tensors must be on one device"),
        ({"image_size": (0, 9)}, ValueError, "image_size must be a positive integer"),
        ({"image_size": (1 << 15, (1 << 15) + 1)}, ValueError, "at most 1073741824 pixels"),
        ({"threshold": -0.1}, ValueError, "threshold must be at least 0"),
        ({"threshold": float("nan")}, ValueError, "threshold must be at least 0"),
        ({"threshold": "0.5"}, TypeError, "threshold must be a number or None"),
    ],
)
@pytest.mark.parametrize("function", [paste_masks, paste_mask_crops])
def test_bad_arguments(function, change, error, message):
    arguments = {"masks": torch.zeros(2, 6, 6), "boxes": torch.zeros(2, 4), "image_size": SIZE} | change
    with pytest.raises(error, match=message):
        function(**arguments)


@pytest.mark.parametrize(
    ("windows", "error", "message"),
    [
        (torch.zeros(2, 4), TypeError, "an int64 tensor on the CPU"),
        (torch.zeros(2, 4, dtype=torch.int64, device="meta"), TypeError, "an int64 tensor on the CPU"),
        (torch.zeros(1, 4, dtype=torch.int64), ValueError, r"windows must have shape \[2, 4\]"),
        (torch.tensor([[0, 0, 1, 1], [80, 0, 4, 1]]), ValueError, "in the image of 57 x 83 pixels"),
        (torch.tensor([[0, 0, 1, 1], [0, 57, 1, 1]]), ValueError, "in the image of 57 x 83 pixels"),
        (torch.tensor([[0, 0, 1, 1], [5, 5, -1, 1]]), ValueError, "in the image of 57 x 83 pixels"),
    ],
)
def test_bad_windows(windows, error, message):
    with pytest.raises(error, match=message):
        paste_mask_crops(torch.zeros(2, 6, 6), torch.zeros(2, 4), SIZE, windows=windows)
