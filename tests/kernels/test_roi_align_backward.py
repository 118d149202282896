"""RoIAlign's backward: both ways of summing, their determinism, and lists of RoIs that cannot overflow."""

from collections.abc import Iterator

import pytest
import torch
from test_roi_align import SCALES, random_rois, rounding
from test_roi_align_edges import DTYPES, LAYOUTS, NHWC, every_kind
from torch import Tensor

from kernels import launch_counts, multiscale_roi_align, roi_align
from kernels.roi_align import library
from kernels.runtime import record_launches

BACKWARDS = ["gather", pytest.param("atomic", id="atomics")]
ONE_LEVEL = ([1.0], 2, False, 224, 4)  # what the library's ops take between sizes and flags


def gradients(features: Tensor, rois: Tensor, grad_out: Tensor, *options, **keywords) -> tuple[Tensor, Tensor]:
    """(RoIAlign in bins of the size of `grad_out`'s, the gradient of the features)."""
    leaf = features.detach().requires_grad_()
    out = roi_align(leaf, rois, tuple(grad_out.shape[2:]), *options, **keywords)
    return out.detach(), torch.autograd.grad(out, leaf, grad_out)[0]


# Every type and layout gathered; atomics, which add in the type of the sums, for each type once.
EVERY_KIND = [(dtype, layout, "gather") for dtype in DTYPES for layout in LAYOUTS]
EVERY_KIND += [pytest.param(dtype, LAYOUTS[i % 2], "atomic", id=f"atomics{i}") for i, dtype in enumerate(DTYPES)]


@pytest.mark.parametrize(("dtype", "layout", "backward"), EVERY_KIND)
def test_gradient_of_every_kind_of_box(dtype, layout, backward, device):
    # Autograd through the fp64 reference on the same rounded inputs. The box head's bins and fixed samples in one
    # layout, of inverted boxes too; more and adaptive ones in the other. Channels fill no tile.
    if layout == NHWC:
        channels, size, sampling_ratio, aligned = 20, (7, 7), 2, True
    else:
        channels, size, sampling_ratio, aligned = 12, (14, 7), -1, False
    rois, _ = every_kind(10, 24, size, sampling_ratio, aligned)
    features = torch.zeros(2, channels, 10, 24, dtype=dtype).contiguous(memory_format=layout)
    grad_out = torch.randn(len(rois), channels, *size).to(dtype)
    options = (0.5, sampling_ratio, aligned)
    _, truth = gradients(features.double(), rois.double(), grad_out.double(), *options, backend="torch")
    _, ours = gradients(
        features.to(device), rois.to(device), grad_out.to(device), *options, backward=backward, backend="triton"
    )
    assert ours.dtype == dtype and ours.is_contiguous(memory_format=layout)
    sums = 1e-12 if dtype == torch.float64 else 5e-5
    torch.testing.assert_close(ours.cpu().double(), truth, rtol=rounding(dtype, device), atol=sums)
    assert truth.abs().max() > 1


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_channels_than_a_program_takes(layout, backward, device):
    # The interpreter's tiles have up to 1024 channels, a GPU's 128: a last block that is not full begins past them.
    features, rois = torch.randn(1, 1030, 4, 4), torch.tensor([[0, 0.5, 0, 3, 3.5]])
    grad_out = torch.randn(1, 1030, 2, 2)
    truth = gradients(features, rois, grad_out, 1.0, 2, backend="torch")
    features = features.contiguous(memory_format=layout)
    ours = gradients(
        features.to(device), rois.to(device), grad_out.to(device), 1.0, 2, backward=backward, backend="triton"
    )
    for mine, other in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine.cpu(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tile_gets_the_rois_that_touch_it(layout, device):
    # A RoI of one sample in the middle of four cells, from each column to the next and from each row to the next: every
    # border of the tiles (8 x 8 cells, 4 x 16 in NCHW) is crossed in both axes. And a few across many tiles.
    height, width = 17, 35
    x = torch.arange(-1, width)
    y = x % (height + 1) - 1
    small = torch.stack([x * 0, x, y, x + 1, y + 1], dim=1).float()
    large = torch.tensor([[0, 2.3, 1.2, 33.1, 15.7], [0, -4, 6.5, 40, 9.1], [0, 15.2, -3, 17.4, 30]])
    rois = torch.cat([small, large])
    features = torch.zeros(1, 2, height, width).contiguous(memory_format=layout)
    for size, chosen in [(1, small), (7, rois[-6:])]:
        grad_out = torch.randn(len(chosen), 2, size, size)
        _, truth = gradients(features.double(), chosen.double(), grad_out.double(), 1.0, 1, backend="torch")
        _, ours = gradients(features.to(device), chosen.to(device), grad_out.to(device), 1.0, 1, backend="triton")
        torch.testing.assert_close(ours.cpu().double(), truth, rtol=1e-6, atol=5e-5)


@pytest.mark.parametrize(("number", "transposed"), [(2, False), (3, True)])
def test_maps_are_transposed_for_many_rois(number, transposed, device):
    # NCHW maps of 16 channels or more are copied to channels_last once RoIs read as much, 256 cells each: 544 are more
    # than 2 read, fewer than 3. 70 channels and 272 cells are more than one tile of the copy, and fill none.
    features, rois = torch.randn(2, 70, 16, 17, device=device), random_rois(number, 2, 16).to(device)
    grad_out = torch.randn(number, 70, 3, 3, device=device)
    launch_counts.clear()
    roi_align(features, rois, 3, 1.0, 2, backend="triton")
    assert launch_counts["transpose_kernel"] == transposed
    out, grad = gradients(features, rois, grad_out, 1.0, 2, backend="triton")
    assert out.is_contiguous() and grad.is_contiguous()

    features = features.contiguous(memory_format=NHWC)
    launch_counts.clear()
    roi_align(features, rois, 3, 1.0, 2, backend="triton")
    assert launch_counts["transpose_kernel"] == 0
    same, same_grad = gradients(features, rois, grad_out, 1.0, 2, backend="triton")
    torch.testing.assert_close(out, same, rtol=0, atol=0)
    torch.testing.assert_close(grad, same_grad, rtol=1e-5, atol=1e-5)  # its tiles are others


def test_few_channels_are_not_transposed(device):
    # Below 16 channels a copy's runs are short; and the levels of a pyramid are copied all or none.
    maps = [torch.randn(2, 15, side, side, device=device) for side in (8, 4)]
    rois = random_rois(4, 2, 32).to(device)
    launch_counts.clear()
    multiscale_roi_align(maps, rois, 2, SCALES[:2], backend="triton")
    assert launch_counts["transpose_kernel"] == 0
    launch_counts.clear()
    multiscale_roi_align([m[:, :1].expand(-1, 16, -1, -1) for m in maps], rois, 2, SCALES[:2], backend="triton")
    assert launch_counts["transpose_kernel"] == 2


def crowd(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Overlapping RoIs, so that every cell is a sum of many: (features, rois, gradient of the output)."""
    features, rois = torch.zeros(2, 20, 11, 13, dtype=dtype, device=device), random_rois(8, 2, 6)
    rois[:, 3:] = rois[:, 1:3] + 8
    return features, rois.to(device), torch.randn(8, 20, 3, 3, device=device).to(dtype)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_gather_gives_the_same_bits_every_time(dtype, device):
    features, rois, grad_out = crowd(device, dtype)
    _, first = gradients(features, rois, grad_out, 1.0, 1, backend="triton")  # "auto"
    for _ in range(99 if device.type == "cuda" else 2):
        _, again = gradients(features, rois, grad_out, 1.0, 1, backward="gather", backend="triton")
        assert torch.equal(again, first)


def test_order_of_rois_moves_only_the_last_bits(device):
    # Sums are made in the RoIs' order: another order is another rounding, and nothing else.
    features, rois, grad_out = crowd(device)
    order = torch.randperm(len(rois), device=device)
    _, one = gradients(features, rois, grad_out, 1.0, 1, backend="triton")
    _, other = gradients(features, rois[order], grad_out[order], 1.0, 1, backend="triton")
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_deterministic_algorithms_exclude_atomics(deterministic, device):
    # PyTorch's switch is a promise about all ops: it wins over what was asked for.
    features, rois, grad_out = crowd(device)
    launch_counts.clear()
    _, asked = gradients(features, rois, grad_out, 1.0, 1, backward="atomic", backend="triton")
    assert launch_counts["roi_align_atomic_kernel"] == 0 and launch_counts["roi_align_gather_kernel"] == 1
    _, gather = gradients(features, rois, grad_out, 1.0, 1, backward="gather", backend="triton")
    assert torch.equal(asked, gather)


def test_atomics_are_used_when_asked_for(device):
    # What the test above excludes, and "auto" must not take either.
    features, rois, grad_out = crowd(device)
    for backward, kernel in [("atomic", "roi_align_atomic_kernel"), ("auto", "roi_align_gather_kernel")]:
        launch_counts.clear()
        gradients(features, rois, grad_out, 1.0, 1, backward=backward, backend="triton")
        assert [k for k in launch_counts if "atomic" in k or "gather" in k] == [kernel]


def test_thousands_of_rois_on_one_spot(device):
    # Lists made for a usual number of RoIs would overflow. n equal RoIs give what one gives for the sum of their
    # gradients: small integers, so that one lost or counted twice changes the result far beyond rounding.
    number = 20_000 if device.type == "cuda" else 270  # more than a program lists at a time
    features = torch.zeros(1, 16, 8, 8, dtype=torch.float64, device=device).contiguous(memory_format=NHWC)
    rois = torch.tensor([[0, 1.5, 2, 4.5, 5]], dtype=torch.float64, device=device)
    _, table = library.roi_align_forward([features], [rois], [2, 2], *ONE_LEVEL, True, False)
    grad_out = torch.randint(1, 9, (number, 16, 2, 2), device=device).double()
    extent = (1, [8, 8], True, *ONE_LEVEL, False)
    (many,) = library.roi_align_backward([grad_out], table.repeat(number, 1), *extent)
    (one,) = library.roi_align_backward([grad_out.sum(0, keepdim=True)], table, *extent)
    torch.testing.assert_close(many, one, rtol=1e-11, atol=1e-11)
    assert one.max() > number / 10


@pytest.mark.parametrize("backward", BACKWARDS)
def test_batch_indices_in_any_order(backward, device):
    # RoIs of three images, shuffled among a thousand that lie in no image, as a caller's padding on a GPU would: more
    # than a program groups at a time. An image without RoIs lies between the others.
    real = random_rois(12, 2, 12)
    real[:, 0] *= 2
    unreal = real[:4].clone()
    unreal[:, 0] = torch.tensor([-1.0, 3, 1e9, float("nan")])
    rois = torch.cat([real, unreal]).to(device)
    features = torch.zeros(3, 4, 11, 13, device=device)
    _, table = library.roi_align_forward([features], [rois], [2, 3], *ONE_LEVEL, False, False)

    padding = 1100 if device.type == "cuda" or backward == "gather" else 50  # the interpreter's atomics take their time
    which = torch.cat([torch.arange(12), 12 + torch.arange(padding) % 4])
    which = which[torch.randperm(len(which))]
    grad_out = torch.randn(len(which), 4, 2, 3)
    (grad,) = library.roi_align_backward(
        [grad_out.to(device)], table[which.to(device)], 3, [11, 13], False, *ONE_LEVEL, backward == "atomic"
    )
    kept = which < 12
    _, truth = gradients(features.cpu(), real[which[kept]], grad_out[kept], 1.0, 2, backend="torch")
    torch.testing.assert_close(grad.cpu(), truth, rtol=1e-5, atol=1e-5)
    assert truth[0].any() and truth[2].any() and not truth[1].any()


def buffers_of_lists(maps: list[Tensor], rois: Tensor) -> tuple[list[int], int]:
    """(sizes of all tensors that list_rois_kernel gets, bytes of those that only the backward allocates)."""
    with record_launches() as recorded:
        out = multiscale_roi_align(maps, rois, 7, SCALES, backend="triton")
        torch.autograd.grad(out, maps, torch.zeros_like(out))
    (lists,) = [launch for launch in recorded if launch.kernel.__name__ == "list_rois_kernel"]
    table, *buffers = [argument for argument in lists.args if isinstance(argument, Tensor)]
    assert table.shape == (len(rois), 16)
    return [b.numel() for b in buffers], sum(b.numel() * b.element_size() for b in buffers)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_of_lists_is_bounded_by_shapes(layout):
    # Sixteen images of 800 x 1344 and 20,000 RoIs. A meta tensor holds no values: a size that came out of them, as that
    # of the longest list, would raise here. Every list has room for all RoIs of its map, 4 bytes each.
    maps = [torch.empty(16, 256, 800 // s, 1344 // s, device="meta").to(memory_format=layout) for s in (4, 8, 16, 32)]
    rois = torch.empty(20_000, 5, device="meta")
    sizes, memory = buffers_of_lists([m.requires_grad_() for m in maps], rois)
    tiles = 25 * 42  # of the largest map
    assert max(sizes) == 20_000 * tiles
    assert memory < 20_000 * tiles * 4 * 1.01  # 84 MB; the other buffers are of the size of the RoIs and of the tiles


def test_memory_of_lists_is_the_same_for_a_crowd():
    # All RoIs on one spot of one image, or spread over all.
    maps = [torch.zeros(2, 4, 32 >> i, 32 >> i, requires_grad=True) for i in range(4)]
    spread = random_rois(50, 2, 128)
    crowded = torch.tensor([[1.0, 10, 10, 30, 30]]).repeat(50, 1)
    assert buffers_of_lists(maps, spread) == buffers_of_lists(maps, crowded)
