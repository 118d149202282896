"""RoIAlign's edges on every dtype and layout: the border, boxes that are no boxes, no boxes, very large maps."""

import resource

import numpy as np
import pytest
import torch
import torchvision
from test_roi_align import rounding
from torch import Tensor

from kernels import joint_multiscale_roi_align, launch_counts, roi_align
from kernels.runtime import record_launches

DTYPES = FP16, BF16, FP32, FP64 = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LAYOUTS = NCHW, NHWC = [torch.contiguous_format, torch.channels_last]
NAN, INF = float("nan"), float("inf")
SCALE = 0.5


def every_kind(
    height: int, width: int, size: tuple[int, int], sampling_ratio: int, aligned: bool
) -> tuple[Tensor, list[bool]]:
    """Boxes of every kind in turn on two images of `height` x `width` cells: (rois [K, 5], which of them give zeros).

    Coordinates at the border are such that positions of samples are exact: 7 cells are 7 or 14 bins.
    """
    # From a box's edge to its first sample, if it is 7 cells wide and high.
    y, x = (3.5 / (bins * max(sampling_ratio, 1)) for bins in size)
    no_samples = aligned and sampling_ratio <= 0  # ceil(bin / 1 cell) of a bin without extent
    below, right, little = height + y, width + x, 2**-10
    kinds = [
        ((3.3, 2.2, 11.9, 8.1), False),  # inside
        ((-1 - x, -1 - y, 6 - x, 6 - y), False),  # first samples at exactly -1, which counts
        ((-1 - x - little, -1 - y - little, 6 - x - little, 6 - y - little), False),  # a little before, which does not
        ((right - 7, below - 7, right, below), False),  # last samples at exactly (W, H), which counts
        ((right - 7 + little, below - 7 + little, right + little, below + little), False),
        ((-9.0, 2.0, -3.0, 6.0), True),  # beside the map, on each side
        ((width + 2.0, 2.0, width + 7.0, 6.0), True),
        ((3.0, -9.0, 7.0, -3.0), True),
        ((3.0, height + 2.0, 7.0, height + 7.0), True),
        ((14.0, 9.0, 3.0, 2.0), no_samples),  # inverted: without `aligned`, one cell wide and high
        ((8.3, 4.2, 8.3, 4.2), no_samples),  # empty
        ((8.3, 1.0, 8.3, 8.0), no_samples),  # empty in width alone
        ((0.0, 0.0, width, height), False),  # the whole map
        ((-20.0, -30.0, width + 20.0, height + 30.0), False),  # far beyond it on all sides
        ((1.0, 4.2, width - 1.0, 6.2), False),  # wide and flat
        ((3.1, -30.0, 5.1, 40.0), False),  # tall and narrow
        ((NAN, 2.0, 9.0, 8.0), True),  # not finite
        ((2.0, 2.0, INF, 8.0), True),
        ((2.0, -INF, 9.0, 8.0), True),
    ]
    cells = torch.tensor([box for box, _ in kinds], dtype=torch.float64) + (0.5 if aligned else 0.0)
    image = torch.arange(len(kinds))[:, None] % 2
    return torch.cat([image, cells / SCALE], dim=1).float(), [zeros for _, zeros in kinds]


# (channels, width of the map, bins, sampling ratio, aligned, layout, dtypes)
CASES = [
    (5, 72, (7, 7), 2, False, NCHW, DTYPES),  # fewer channels than fill a tile, and no power of two
    (5, 72, (7, 7), 2, False, NHWC, DTYPES),
    (20, 24, (14, 14), -1, True, NCHW, [FP16, FP32]),  # enough channels that the map is transposed first
    (20, 24, (14, 14), -1, True, NHWC, [BF16, FP64]),  # many samples: half types are pooled by products of matrices
    (20, 24, (14, 14), 2, True, NHWC, [FP16]),  # so also with a fixed ratio, where inverted boxes have samples
    (20, 72, (7, 14), -1, False, NHWC, [FP16]),
    (6, 72, (7, 7), 2, True, NHWC, [BF16]),  # an even number of bf16 channels is read in pairs
    (1, 72, (14, 7), 2, True, NCHW, DTYPES),  # a single channel has but one layout
]


@pytest.mark.parametrize(
    ("channels", "width", "size", "sampling_ratio", "aligned", "layout", "dtype"),
    [(*case, dtype) for *case, dtypes in CASES for dtype in dtypes],
)
def test_every_kind_of_box(channels, width, size, sampling_ratio, aligned, layout, dtype, device):
    # A box of 70 x 2 (where there are 72 cells) and one of 2 x 70 that leaves the map are longer than any tile. The map
    # lies between two images of NaN: a cell read beyond it shows, even one that has no weight.
    rois, zeros = every_kind(10, width, size, sampling_ratio, aligned)
    surrounded = torch.full((4, channels, 10, width), NAN, dtype=dtype, device=device).contiguous(memory_format=layout)
    surrounded[1:3] = torch.randn(2, channels, 10, width, device=device)
    features = surrounded[1:3]
    options = (size, SCALE, sampling_ratio, aligned)
    truth = roi_align(features.cpu().double(), rois.double(), *options, backend="torch")
    assert (truth == 0).flatten(1).all(1).tolist() == zeros

    wanted = NHWC if channels == 5 else NCHW  # for each layout of the maps, both of the result
    ours = roi_align(features, rois.to(device), *options, memory_format=wanted, backend="triton")
    assert ours.dtype == dtype and ours.is_contiguous(memory_format=wanted)
    coordinates = 1e-12 if dtype == FP64 else 5e-5  # 72 cells in fp32, times the slope of the map
    torch.testing.assert_close(ours.cpu().double(), truth, rtol=rounding(dtype, device), atol=coordinates)
    assert (ours[torch.tensor(zeros)] == 0).all()

    if dtype == FP32:
        finite = rois.isfinite().all(1)  # what torchvision makes of the others is undefined
        theirs = torchvision.ops.roi_align(features.cpu(), rois[finite], *options)
        torch.testing.assert_close(ours[finite].cpu(), theirs, rtol=0, atol=coordinates)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wanted", [None, *LAYOUTS])
def test_layout_of_the_result(layout, wanted, device):
    # The convolutions behind choose their algorithms by it: on every backend it is the same, and the values too.
    features = torch.randn(1, 6, 5, 7, device=device).contiguous(memory_format=layout)
    rois = torch.tensor([[0, 1.0, 0, 5, 4], [0, 2, 2, 9, 9]], device=device)
    outs = [roi_align(features, rois, 3, memory_format=wanted, backend=b) for b in ("triton", "torch", "torchvision")]
    for out in outs:
        assert out.is_contiguous(memory_format=wanted or layout)
        torch.testing.assert_close(out, outs[0], rtol=1e-5, atol=1e-6)


def test_bf16_maps_at_an_odd_address(device):
    # A slice of a larger buffer need not begin at a multiple of 4 bytes, where a GPU faults on reading two channels at
    # once. (Recorded, not run: the fault would end the whole run.)
    maps = torch.zeros(1 + 4 * 5 * 8, dtype=BF16, device=device)
    rois = torch.tensor([[0, 1.0, 1, 3, 3]], device=device)
    for start, in_pairs in [(0, True), (1, False)]:
        features = maps[start : start + 4 * 5 * 8].view(1, 4, 5, 8).permute(0, 3, 1, 2)
        with record_launches() as recorded:
            roi_align(features, rois, 2, 1.0, 2, backend="triton")
        assert recorded[-1].meta["PAIRS"] is in_pairs


@pytest.mark.parametrize("backward", ["gather", "atomic"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rois_at_all(dtype, layout, backward, device):
    # No proposals: nothing is launched on an empty grid, and still every cell of the gradient is written.
    features = torch.ones(2, 20, 4, 6, dtype=dtype, device=device).contiguous(memory_format=layout).requires_grad_()
    none = torch.zeros(0, 5, device=device)
    outs = joint_multiscale_roi_align([features], [none, none], [7, 14], [0.25], backward=backward, backend="triton")
    assert [tuple(out.shape) for out in outs] == [(0, 20, 7, 7), (0, 20, 14, 14)]
    (grad,) = torch.autograd.grad(sum(out.sum() for out in outs), features)
    assert (grad == 0).all() and grad.dtype == dtype and grad.is_contiguous(memory_format=layout)


def zeros_with_a_corner(
    batch: int, channels: int, side: int, layout: torch.memory_format, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(maps of a half type, 0 but for a corner, that corner: the last 8 x 8 cells of the last image's last 3 channels).

    numpy's zeros, unlike PyTorch's on a CPU, take no memory before they are written.
    """
    shape = (batch, channels, side, side) if layout == NCHW else (batch, side, side, channels)
    if device.type == "cpu":
        features = torch.from_numpy(np.zeros(shape, np.int16)).view(dtype)
    else:
        features = torch.zeros(shape, dtype=dtype, device=device)
    if layout == NHWC:
        features = features.permute(0, 3, 1, 2)
    corner = torch.randn(1, 3, 8, 8, device=device).to(dtype)
    features[-1:, -3:, -8:, -8:] = corner
    return features, corner


def boxes_in_the_corner(batch: int, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(RoIs in the last image's last corner, the same on the corner alone); the second one leaves the map."""
    corner = torch.tensor([[0, 1.0, 2, 5, 6], [0, 4, 4, 12, 8]], device=device)
    return corner + torch.tensor([batch - 1, *[side - 8] * 4], device=device), corner


# Past 2**31 by the place in one image, and by the image (the last of ten begins there).
LARGE = [(1, 256, 3000), (10, 128, 1400)]
large = pytest.mark.parametrize(("batch", "channels", "side"), LARGE, ids=["image", "batch"])


@large
@pytest.mark.parametrize(
    ("layout", "dtype", "sampling_ratio"),
    [(NCHW, FP16, 2), (NHWC, FP16, 2), (NHWC, FP16, -1), (NHWC, BF16, 2)],
    ids=["nchw", "nhwc", "products", "pairs"],
)
def test_maps_of_more_than_2_31_elements(batch, channels, side, layout, dtype, sampling_ratio, device):
    # 32-bit offsets would read another place, all zeros, or crash. Each kernel that reads maps.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    features, corner = zeros_with_a_corner(batch, channels, side, layout, dtype, device)
    assert features.numel() > 2**31
    rois, boxes = boxes_in_the_corner(batch, side, device)
    launch_counts.clear()
    out = roi_align(features, rois, 2, 1.0, sampling_ratio, backend="triton")
    # The products count an image's cells in fp32, and their offsets have 32 bits within it.
    assert launch_counts["roi_align_matrix_kernel"] == (sampling_ratio < 0 and batch > 1)
    truth = roi_align(corner.double(), boxes.double(), 2, 1.0, sampling_ratio, backend="torch")
    torch.testing.assert_close(out[:, -3:].double(), truth, rtol=rounding(dtype, device), atol=1e-5)
    assert truth.abs().amax((1, 2, 3)).min() > 0.1 and (out[:, :-3] == 0).all()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300_000 or device.type != "cpu"  # kB: the maps were not copied, nor committed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="writes up to 20 GB")
@large
@pytest.mark.parametrize("backward", ["gather", "atomic"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_more_than_2_31_elements(batch, channels, side, layout, backward, device):
    # Every cell is written, the RoIs' gradient at its place and zeros elsewhere.
    features, corner = zeros_with_a_corner(batch, channels, side, layout, FP16, device)
    rois, boxes = boxes_in_the_corner(batch, side, device)
    grad_out = torch.zeros(2, channels, 2, 2, device=device).half()
    grad_out[:, -3:] = torch.randn(2, 3, 2, 2, device=device).half()
    out = roi_align(features.requires_grad_(), rois, 2, 1.0, 2, backward=backward, backend="triton")
    (found,) = torch.autograd.grad(out, features, grad_out)
    small = roi_align(corner.requires_grad_(), boxes, 2, 1.0, 2, backward=backward, backend="triton")
    (expected,) = torch.autograd.grad(small, corner, grad_out[:, -3:])
    torch.testing.assert_close(found[-1:, -3:, -8:, -8:], expected)
    assert expected.abs().max() > 0.1
    found[-1:, -3:, -8:, -8:] = 0
    assert not found.any()
