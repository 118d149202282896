"""RoIAlign: the Triton kernels against the fp64 reference and against torchvision, edge by edge."""

import itertools

import pytest
import torch
import torchvision
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from kernels import multiscale_roi_align, roi_align
from kernels.roi_align import library, reference

SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]


def random_rois(number: int, images: int, side: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Boxes from a few pixels to larger than the image, some sticking out of it, images in no order."""
    corner = torch.rand(number, 2, dtype=dtype) * side * 1.1 - 0.1 * side
    size = torch.exp(torch.rand(number, 2, dtype=dtype) * 4) * side / 64
    image = torch.randint(0, images, (number, 1)).to(dtype)
    return torch.cat([image, corner, corner + size], dim=1)


def rounding(dtype: torch.dtype, device: torch.device) -> float:
    """Largest relative error of a number rounded to `dtype`. (Triton's interpreter truncates to bf16.)"""
    if dtype == torch.bfloat16 and device.type == "cpu":
        return 2**-7
    return torch.finfo(dtype).eps / 2


def pyramid(channels: int, side: int, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    return [torch.randn(2, channels, side >> i, side >> i, dtype=dtype, device=device) for i in range(4)]


# Adaptive, one, torchvision's two and an odd number of samples; both alignments; bins that divide no tile evenly.
OPTIONS = list(itertools.product([-1, 1, 2, 3], [False, True], [(7, 7), (3, 5)]))


@pytest.mark.parametrize(("sampling_ratio", "aligned", "size"), OPTIONS)
def test_forward_is_as_exact_as_torchvision(sampling_ratio, aligned, size, device):
    features = torch.randn(2, 5, 13, 17)  # H and W differ, 5 channels fill no tile: mix-ups of either would show
    rois = random_rois(6, 2, 60)
    truth = reference.multiscale_roi_align(
        [features.double()], rois.double(), size, [0.25], sampling_ratio, aligned, 224, 4
    )
    ours = roi_align(features.to(device), rois.to(device), size, 0.25, sampling_ratio, aligned, backend="triton")
    theirs = torchvision.ops.roi_align(features, rois, size, 0.25, sampling_ratio, aligned)
    allowed = 2 * (theirs - truth).abs().max() + 1e-6
    assert (ours.cpu() - truth).abs().max() <= allowed
    assert truth.abs().max() > 0.1


@pytest.mark.parametrize(
    ("y", "inside"),
    [(-1.0, True), (-1.001, False), (0.0, True), (8.0, True), (8.001, False), (float("nan"), False)],
)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_samples_at_the_border(y, inside, backend, device):
    # One sample exactly at y: torchvision counts [-1, H], both ends included, and drops everything beyond.
    features = torch.rand(1, 1, 8, 8, device=device) + 1
    rois = torch.tensor([[0, 3, y - 0.5, 4, y + 0.5]], device=device)
    out = roi_align(features, rois, 1, 1.0, 1, backend=backend)
    assert (out.item() > 0.9) is inside
    if y == y:
        theirs = torchvision.ops.roi_align(features.cpu(), rois.cpu(), 1, 1.0, 1)
        torch.testing.assert_close(out.cpu(), theirs)


@pytest.mark.parametrize(("sampling_ratio", "is_zero"), [(-1, True), (2, False)])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_inverted_box_when_aligned(sampling_ratio, is_zero, backend, device):
    # ceil() of a negative bin leaves no samples; a fixed ratio still takes some. Both as torchvision.
    features = torch.rand(1, 2, 8, 8, device=device) + 1
    rois = torch.tensor([[0, 6.0, 6.0, 2.0, 3.0]], device=device)
    out = roi_align(features, rois, 2, 1.0, sampling_ratio, True, backend=backend)
    theirs = torchvision.ops.roi_align(features.cpu(), rois.cpu(), 2, 1.0, sampling_ratio, True)
    torch.testing.assert_close(out.cpu(), theirs)
    assert (out == 0).all() == is_zero


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(
    ("column", "bad"), [(1, float("nan")), (3, float("nan")), (3, float("inf")), (2, -float("inf")), (3, 1e12)]
)
@pytest.mark.parametrize("sampling_ratio", [-1, 2])
def test_box_that_is_not_finite_gives_zeros(column, bad, sampling_ratio, backend, device):
    # Adaptive sampling of an infinite box, or one as good as that, would ask for 2**31 samples and hang the GPU.
    rois = torch.tensor([[0, 1.0, 1.0, 5.0, 5.0], [0, 1.0, 1.0, 5.0, 5.0]], device=device)
    rois[0, column] = bad
    out = roi_align(torch.ones(1, 2, 8, 8, device=device), rois, 2, 1.0, sampling_ratio, backend=backend)
    assert (out[0] == 0).all()
    torch.testing.assert_close(out[1], torch.ones_like(out[1]))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_sample_outside_the_map_ignores_infinities_in_it(backend, device):
    # Zero because it is outside, not because a weight of 0 was multiplied with inf (which gives NaN).
    features = torch.full((1, 1, 4, 4), float("inf"), device=device)
    out = roi_align(features, torch.tensor([[0, 10.0, 10.0, 12.0, 12.0]], device=device), 2, backend=backend)
    assert (out == 0).all()


@pytest.mark.parametrize("backend", ["triton", "torch", "torchvision", "auto"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_types_compute_in_fp32(dtype, tolerance, backend, autocast, device):
    # Coordinates far from the origin, where fp16 is half a pixel coarse: only the result may be rounded. (Triton's
    # interpreter truncates to bf16, hence a full unit in the last place there.)
    features = torch.randn(2, 4, 8, 400).to(dtype)
    rois = random_rois(5, 2, 8)
    rois[:, [1, 3]] += 380
    truth = roi_align(features.double(), rois.double(), 3, 1.0, 2, backend="torch")
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        ours = roi_align(features.to(device), rois.to(device), 3, 1.0, 2, backend=backend)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.cpu().double(), truth, rtol=tolerance, atol=tolerance / 8)


@pytest.mark.parametrize("sampling_ratio", [-1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradcheck(sampling_ratio, layout, device):
    # The backward kernel is the exact adjoint of the forward kernel, in fp64, in both layouts.
    features = torch.randn(2, 2, 5, 6, dtype=torch.float64, device=device).contiguous(memory_format=layout)
    rois = random_rois(3, 2, 6, torch.float64).to(device)
    function = lambda x: roi_align(x, rois, 2, 0.7, sampling_ratio, backend="triton")
    assert torch.autograd.gradcheck(function, features.requires_grad_(), fast_mode=True)


def test_multiscale_gradcheck(device):
    # Each level's gradient goes to its own map: RoIs on all four.
    features = [f.requires_grad_() for f in pyramid(2, 16, torch.float64, device)]
    side = torch.tensor([20.0, 60.0, 130.0, 300.0], dtype=torch.float64)
    rois = torch.stack([torch.tensor([1.0, 0, 1, 0]), side * 0, side * 0, side, side], dim=1).to(device)
    function = lambda *maps: multiscale_roi_align(maps, rois, 2, SCALES, canonical_scale=112, backend="triton")
    assert reference.assign_levels(rois, reference.level_thresholds(SCALES, 112, 4)).tolist() == [0, 1, 2, 3]
    assert torch.autograd.gradcheck(function, features, fast_mode=True)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_multiscale_is_torchvisions_pooler(layout, device):
    # Values and gradients of torchvision's own MultiScaleRoIAlign on RoIs that fall on all four levels.
    features = [f.contiguous(memory_format=layout).requires_grad_() for f in pyramid(3, 32, torch.float32, device)]
    rois = random_rois(12, 2, 128).to(device)
    rois[:4, 3:] = rois[:4, 1:3] + torch.tensor([20.0, 40.0, 90.0, 200.0], device=device)[:, None]
    ours = multiscale_roi_align(features, rois, 3, SCALES, canonical_scale=56, backend="triton")
    assert ours.is_contiguous(memory_format=layout)

    pooler = MultiScaleRoIAlign(["0", "1", "2", "3"], 3, 2, canonical_scale=56)
    maps = {str(i): f for i, f in enumerate(features)}
    order = torch.cat([(rois[:, 0] == b).nonzero()[:, 0] for b in range(2)])  # it wants RoIs image by image
    theirs = pooler(maps, [rois[rois[:, 0] == b, 1:] for b in range(2)], [(128, 128)] * 2)
    torch.testing.assert_close(ours[order], theirs, rtol=1e-5, atol=1e-6)

    weight = torch.randn_like(theirs)
    ours_grad = torch.autograd.grad((ours[order] * weight).sum(), features)
    theirs_grad = torch.autograd.grad((theirs * weight).sum(), features)
    for mine, other in zip(ours_grad, theirs_grad, strict=True):
        assert other.abs().max() > 0  # every level got RoIs
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


# The epsilon of torchvision's formula moves the border a little below 112, 224 and 448. A box without positive area
# is undefined there; here it belongs to the lowest level.
SIDES = [1.0, 111.999, 112.0, 223.9, 223.9999, 224.0, 447.9, 448.0, 5000.0, 0.0, -300.0, float("nan")]
SIDE_LEVELS = [0, 0, 1, 1, 2, 2, 2, 3, 3, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_levels_at_the_thresholds(dtype, device):
    # The kernel chooses for itself: every level's map is filled with the level's number.
    side = torch.tensor(SIDES, dtype=dtype)
    rois = torch.stack([side * 0, side * 0, side * 0, side.abs(), side], dim=1).nan_to_num_(0).to(device)
    rois[-1, 3] = float("nan")
    assert reference.assign_levels(rois, reference.level_thresholds(SCALES, 224, 4)).tolist() == SIDE_LEVELS
    maps = [torch.full((1, 1, 200, 200), level + 1.0, dtype=dtype, device=device) for level in range(4)]
    pooled = multiscale_roi_align(maps, rois, 1, SCALES, backend="triton").flatten()
    found = pooled[:9].round() - 1
    assert found.tolist()[:-1] == SIDE_LEVELS[:8]  # the last one leaves its map
    assert pooled[9] == pooled[10] == 1.0 and pooled[11] == 0


def test_levels_are_torchvisions_on_many_boxes():
    # Comparing areas replaces a logarithm: no box may change its level. Half have whole-pixel sides.
    size = torch.exp(torch.rand(200_000, 2) * 7)
    size[::2] = size[::2].round().clamp(min=1)
    boxes = torch.cat([torch.zeros_like(size), size], dim=1)
    levels = reference.assign_levels(
        torch.cat([boxes[:, :1], boxes], dim=1), reference.level_thresholds(SCALES, 224, 4)
    )
    assert torch.equal(levels, LevelMapper(2, 5)([boxes]))
    assert levels.unique().tolist() == [0, 1, 2, 3]


def test_strided_inputs(device):
    # Slices, transposes and an expanded gradient: strides are read or copied, never assumed.
    base = torch.randn(4, 16, 6, 20, device=device)
    features = base.transpose(1, 2)[::2, 1:5, :, 3:17].requires_grad_()
    rois = random_rois(4, 2, 12).to(device)
    wide = torch.cat([rois, rois], dim=1)[:, :5]
    ours = roi_align(features, wide, 2, 1.0, 2, backend="triton")
    (ours_grad,) = torch.autograd.grad(ours.sum(), features)  # sum() gives a gradient of stride 0
    theirs = roi_align(features.contiguous(), rois, 2, 1.0, 2, backend="torchvision")
    (theirs_grad,) = torch.autograd.grad(theirs.sum(), features)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(ours_grad, theirs_grad)


def test_strided_maps_of_one_cell(device):
    # Once copied, such a map is contiguous in both layouts: the output must still have the one that the kernel writes.
    features = torch.randn(2, 8, 1, 1, device=device)[:, ::2]
    rois = torch.tensor([[0, 0.0, 0, 1, 1], [1, 0, 0, 1, 1]], device=device)
    ours = roi_align(features, rois, 2, backend="triton")
    torch.testing.assert_close(ours, features[:, :, :1, :1].expand(2, 4, 2, 2), rtol=0, atol=0)
    assert not ours.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", ["triton", "torch", "torchvision"])
@pytest.mark.parametrize("sampling_ratio", [-1, 2])
def test_no_rois(sampling_ratio, backend, device):
    # An image without proposals: an empty result, and a backward that gives zeros. (No RoIs, no samples: nothing of the
    # maps is read.)
    features = [f.requires_grad_() for f in pyramid(3, 16, torch.float32, device)]
    out = multiscale_roi_align(features, torch.zeros(0, 5, device=device), 7, SCALES, sampling_ratio, backend=backend)
    assert out.shape == (0, 3, 7, 7)
    for grad in torch.autograd.grad(out.sum(), features, materialize_grads=True):
        assert (grad == 0).all()


def test_boxes_as_a_list_an_image(device):
    # torchvision's other form of boxes, one image of the batch having none.
    features = torch.randn(3, 2, 8, 8, device=device)
    boxes = [torch.tensor([[1.0, 1, 5, 6]]), torch.zeros(0, 4), torch.tensor([[0.0, 2, 7, 7], [2, 2, 3, 3]])]
    ours = roi_align(features, [b.to(device) for b in boxes], (2, 3), 1.0, 2, backend="triton")
    torch.testing.assert_close(ours.cpu(), torchvision.ops.roi_align(features.cpu(), boxes, (2, 3), 1.0, 2))


@pytest.mark.parametrize("batch", [-1.0, 2.0, 1e9, float("nan")])
def test_batch_index_out_of_range(batch, device):
    # On a GPU nobody may wait to look, so the kernel itself must not read outside; checked by calling it directly.
    features = torch.ones(2, 2, 4, 4, device=device)
    rois = torch.tensor([[batch, 0.0, 0.0, 3.0, 3.0]], device=device)
    options = ([1.0], 2, False, 224, 4)
    out, table = library.roi_align_forward([features], [rois], [2, 2], *options, False, False)
    assert (out == 0).all()
    for atomics in (False, True):
        (grad,) = library.roi_align_backward([torch.ones_like(out)], table, 2, [4, 4], False, *options, atomics)
        assert (grad == 0).all()
    with pytest.raises(IndexError, match=r"batch indices .* must lie in \[0, 2\)"):
        roi_align(features.cpu(), rois.cpu(), 2, backend="torch")


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_samples_of_whole_pixels_are_torchvisions(backend, device):
    # Three samples a bin: (i + 0.5) * (bin / 3) rounds differently, and moves the one at -1 out of the map.
    features = torch.ones(1, 1, 50, 50, device=device)
    rois = torch.tensor([[0, 0.0, -16, 100, 104]], device=device)
    ours = roi_align(features, rois, 7, 0.25, backend=backend)
    torch.testing.assert_close(ours.cpu(), torchvision.ops.roi_align(features.cpu(), rois.cpu(), 7, 0.25))


def test_no_bin_is_lost_at_the_far_edge(device):
    # Tiny bins at x = W: their samples count in full, one ulp further they would not; the list of bins has to be wide
    # enough in cells, not only in bins.
    features = torch.ones(1, 1, 16, 1000, device=device, requires_grad=True)
    rois = torch.tensor([[0, 1000.5, 4, 1000.5001, 9]], device=device)
    out = roi_align(features, rois, (2, 7), 1.0, 2, True, backend="triton")
    (grad,) = torch.autograd.grad(out.sum(), features)
    assert out.sum() > 0
    torch.testing.assert_close(grad.sum(), out.sum())  # the map is 1 everywhere


@pytest.mark.skipif(not torch.cuda.is_available(), reason="25,600 samples a bin take the interpreter an hour")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_large_bins_keep_their_bits(dtype, device):
    # One bin over 160 x 160 cells: each weighs 4e-5, of which fp16 would keep 9 bits, all rounded the same way.
    features = torch.ones(1, 16, 160, 160, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)
    rois = torch.tensor([[0, 0.0, 0, 160, 160]], device=device)
    out = roi_align(features.requires_grad_(), rois, 1, backend="triton")
    torch.testing.assert_close(out, torch.ones_like(out), rtol=2**-8, atol=0)
    (grad,) = torch.autograd.grad(out, features, torch.full_like(out, 1024.0))
    inner = grad[:, :, 1:-1, 1:-1].double()
    torch.testing.assert_close(
        inner, torch.full_like(inner, 1024 / 160**2), rtol=2e-3 if dtype == torch.float16 else 2**-7, atol=0
    )


@pytest.mark.parametrize("backend", ["triton", "torch", "torchvision", "auto"])
def test_box_that_is_not_finite_crashes_nothing(backend, device):
    # torchvision's own op reads outside its tensors for NaN: one diverged step would take the process with it.
    features = torch.ones(1, 2, 8, 8, device=device, requires_grad=True)
    rois = torch.tensor([[0, float("nan"), 1, 2, 3], [0, 1, 1, float("inf"), 3], [0, 1, 1, 5, 5]], device=device)
    for sampling_ratio in (-1, 2):
        out = roi_align(features, rois, 2, 1.0, sampling_ratio, backend=backend)
        assert (out[:2] == 0).all() and (out[2] == 1).all()
        assert torch.autograd.grad(out.sum(), features)[0].isfinite().all()


@pytest.mark.parametrize("backend", ["triton", "torch", "torchvision"])
def test_no_gradient_flows_to_boxes(backend, device):
    # With boxes that are not detached, a backend that differed would train another model.
    features = torch.randn(1, 2, 8, 8, device=device, requires_grad=True)
    rois = torch.tensor([[0, 1.0, 1, 5, 5]], device=device, requires_grad=True)
    roi_align(features, rois, 2, 1.0, 2, backend=backend).sum().backward()
    assert rois.grad is None and features.grad.abs().sum() > 0


@pytest.mark.parametrize("backend", ["triton", "torch", "torchvision"])
def test_half_gradients_are_summed_in_fp32(backend, device):
    # 300 RoIs on one spot: each addition in bf16 would lose what is below 1/256 of the sum.
    features = torch.zeros(1, 1, 8, 8, dtype=torch.bfloat16, device=device, requires_grad=True)
    rois = torch.tensor([[0, 2.0, 2, 4, 4]], device=device).repeat(300, 1)
    out = roi_align(features, rois, 1, 1.0, 1, backend=backend)
    (grad,) = torch.autograd.grad(out.sum(), features)
    torch.testing.assert_close(grad.double().sum().item(), 300.0, rtol=2**-7, atol=0)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace(device):
    # Who traces gets the registered op.
    features = torch.randn(1, 2, 8, 8, device=device)
    rois = torch.tensor([[0, 1.0, 1, 5, 5]], device=device)
    function = lambda x, r: roi_align(x, r, 2, 1.0, 2, backend="triton")
    traced = torch.jit.trace(function, (features, rois), check_trace=False)
    torch.testing.assert_close(traced(features + 1, rois), function(features + 1, rois))


def test_no_second_derivative(device):
    # Asking for one must be an error, not a silent zero.
    features = torch.randn(1, 1, 4, 4, device=device, requires_grad=True)
    out = roi_align(features, torch.tensor([[0, 0.0, 0, 3, 3]], device=device), 2, 1.0, 2, backend="triton")
    (grad,) = torch.autograd.grad((out**2).sum(), features, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), features)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.zeros(2, 4, 4)}, ValueError, "input must have 4 dimensions"),
        ({"input": torch.zeros(1, 2, 4, 4, dtype=torch.int64)}, TypeError, "input must be float16"),
        ({"input": [[0.0]]}, TypeError, "input must be a tensor, got list"),
        ({"input": torch.zeros(1, 2, 0, 4)}, ValueError, "features must not be empty"),
        ({"boxes": torch.zeros(3, 4)}, ValueError, r"rois must have 2 dimensions, the last of size 5"),
        ({"boxes": [torch.zeros(3, 5)]}, ValueError, r"boxes\[0\] must have 2 dimensions, the last of size 4"),
        ({"boxes": torch.zeros(3, 5, dtype=torch.int32)}, TypeError, "rois must be float16"),
        ({"boxes": torch.zeros(3, 5, device="meta")}, ValueError, "all tensors must be on one device"),
        ({"boxes": [torch.zeros(3, 4)] * 2}, ValueError, "boxes holds boxes of 2 images, the features are of 1"),
        ({"output_size": 0}, ValueError, "output_size must be a positive integer or two of them"),
        ({"output_size": (7, 2.5)}, ValueError, "output_size must be a positive integer or two of them"),
        ({"output_size": None}, ValueError, "output_size must be a positive integer or two of them"),
        ({"spatial_scale": 0.0}, ValueError, "spatial_scale and scales must be positive and finite"),
        ({"spatial_scale": float("nan")}, ValueError, "spatial_scale and scales must be positive and finite"),
        ({"sampling_ratio": 2.0}, TypeError, "sampling_ratio must be an integer"),
        ({"backend": "cuda"}, ValueError, "unknown backend 'cuda'"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"input": torch.zeros(1, 2, 4, 4), "boxes": torch.zeros(1, 5), "output_size": 2} | change
    with pytest.raises(error, match=message):
        roi_align(**arguments)


def test_bad_pyramids():
    maps, rois = [torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 4, 4)], torch.zeros(1, 5)
    with pytest.raises(ValueError, match="2 feature maps but 1 scales"):
        multiscale_roi_align(maps, rois, 2, [0.25])
    with pytest.raises(ValueError, match="each scale must be half the one before"):
        multiscale_roi_align(maps, rois, 2, [0.125, 0.25])
    with pytest.raises(ValueError, match="each scale must be half the one before"):
        multiscale_roi_align(maps, rois, 2, [0.25, 0.0625])
    with pytest.raises(ValueError, match="positive and finite"):
        multiscale_roi_align(maps, rois, 2, [0.25, 0.0])
    with pytest.raises(ValueError, match="must share batch size, channels and dtype"):
        multiscale_roi_align([maps[0], torch.zeros(1, 3, 4, 4)], rois, 2, [0.25, 0.125])
    with pytest.raises(ValueError, match="non-empty list"):
        multiscale_roi_align([], rois, 2, [])
