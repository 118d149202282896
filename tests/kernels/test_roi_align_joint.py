"""Several sets of RoIs pooled at once: the results of a call for each, one gradient for all."""

import pytest
import torch
from test_roi_align import SCALES, pyramid, random_rois
from test_roi_align_edges import NCHW, NHWC
from torch import Tensor

from kernels import joint_multiscale_roi_align, launch_counts, multiscale_roi_align, roi_align

SIZES = [(7, 7), (5, 4), (2, 3)]
# Both layouts, an empty set in each place, three sets.
SETS = [((4, 2), NCHW), ((0, 4), NCHW), ((4, 0), NHWC), ((2, 0, 3), NHWC), ((1, 2, 3), NCHW)]


def maps_and_sets(
    numbers: tuple[int, ...], layout: torch.memory_format, device: torch.device
) -> tuple[list[Tensor], list[Tensor], dict]:
    """A pyramid of four levels, sets of so many RoIs, which together lie on all levels, and options."""
    maps = [f.contiguous(memory_format=layout).requires_grad_() for f in pyramid(5, 16, torch.float32, device)]
    rois = random_rois(sum(numbers), 2, 32)
    rois[:, 3:] = rois[:, 1:3] + torch.tensor([10.0, 20, 40, 80])[torch.arange(len(rois)) % 4][:, None]
    return maps, list(rois.to(device).split(numbers)), {"canonical_scale": 28, "backend": "triton"}


@pytest.mark.parametrize(("numbers", "layout"), SETS)
def test_joint_pooling_is_pooling_each(numbers, layout, device):
    # The same kernels on the same table: forward bit for bit. The gradient sums in another order.
    maps, rois, options = maps_and_sets(numbers, layout, device)
    sizes = SIZES[: len(numbers)]
    joint = joint_multiscale_roi_align(maps, rois, sizes, SCALES, **options)
    each = [multiscale_roi_align(maps, r, size, SCALES, **options) for r, size in zip(rois, sizes, strict=True)]
    weights = [torch.randn_like(out) for out in each]
    for one, other in zip(joint, each, strict=True):
        assert torch.equal(one, other) and one.stride() == other.stride()

    launch_counts.clear()
    ours = torch.autograd.grad(joint, maps, weights)
    assert launch_counts["roi_align_gather_kernel"] == 1  # every cell is written once, not once a set
    theirs = torch.autograd.grad(each, maps, weights)
    for mine, other in zip(ours, theirs, strict=True):
        assert other.any()
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backward", ["gather", "atomic"])
def test_set_without_a_loss(backward, device):
    # Only the boxes' loss is asked for: the masks' part arrives as None and counts as zeros.
    maps, rois, options = maps_and_sets((3, 2), NHWC, device)
    boxes, _ = joint_multiscale_roi_align(maps, rois, SIZES[:2], SCALES, backward=backward, **options)
    alone = multiscale_roi_align(maps, rois[0], SIZES[0], SCALES, **options)
    weight = torch.randn_like(alone)
    ours = torch.autograd.grad(boxes, maps, weight)
    for mine, other in zip(ours, torch.autograd.grad(alone, maps, weight), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


class WithoutGradient(torch.autograd.Function):
    """Something that autograd goes through and that gives nothing back."""

    @staticmethod
    def forward(ctx, *tensors):
        return tensors[0].sum()

    @staticmethod
    def backward(ctx, grad):
        return None, None


def test_no_set_has_a_loss(device):
    # Every gradient is None: so are the maps', and nothing is launched.
    maps, rois, options = maps_and_sets((2, 1), NHWC, device)
    out = WithoutGradient.apply(*joint_multiscale_roi_align(maps, rois, [2, 2], SCALES, **options))
    launch_counts.clear()
    assert torch.autograd.grad(out, maps, allow_unused=True) == (None,) * 4
    assert not launch_counts


@pytest.mark.parametrize("used", [1, 2])
def test_joint_pooling_compiles(used, device):
    # In one graph, forward and backward, with and without a loss for the second set.
    torch.compiler.reset()
    maps, rois, options = maps_and_sets((3, 2), NHWC, device)

    def loss(a: Tensor, b: Tensor, first: Tensor, second: Tensor) -> Tensor:
        outs = joint_multiscale_roi_align([a, b], [first, second], [(3, 3), (2, 4)], SCALES[:2], **options)
        return sum(out.square().sum() for out in outs[:used])

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, expected = compiled(*maps[:2], *rois), loss(*maps[:2], *rois)
    torch.testing.assert_close(found, expected)
    launch_counts.clear()
    ours = torch.autograd.grad(found, maps[:2])
    assert launch_counts["roi_align_gather_kernel"] == 1
    for mine, other in zip(ours, torch.autograd.grad(expected, maps[:2]), strict=True):
        torch.testing.assert_close(mine, other)


def test_joint_gradcheck(device):
    # The exact adjoint in fp64 where sets differ in all they can: RoIs, bins, of which some are not square, levels.
    features = [f.requires_grad_() for f in pyramid(2, 16, torch.float64, device)[:2]]
    rois = [random_rois(n, 2, 16, torch.float64).to(device) for n in (2, 1)]
    function = lambda *maps: joint_multiscale_roi_align(
        maps, rois, [(3, 5), (14, 14)], SCALES[:2], -1, True, canonical_scale=28, backend="triton"
    )
    assert torch.autograd.gradcheck(function, features, fast_mode=True)


def test_sets_and_sizes_must_match():
    # A list too short would silently drop a set; an error names the set that is wrong.
    maps, rois = [torch.zeros(1, 2, 8, 8)], torch.zeros(1, 5)
    with pytest.raises(ValueError, match="must be lists of the same length"):
        joint_multiscale_roi_align(maps, [rois], [2, 2], [0.25])
    with pytest.raises(ValueError, match="must be lists of the same length"):
        joint_multiscale_roi_align(maps, [], [], [0.25])
    with pytest.raises(ValueError, match=r"rois\[1\] must have 2 dimensions, the last of size 5"):
        joint_multiscale_roi_align(maps, [rois, rois[:, 1:]], [2, 2], [0.25])
    with pytest.raises(IndexError, match=r"batch indices \(rois\[1\]\[:, 0\]\)"):
        joint_multiscale_roi_align(maps, [rois, rois + 1], [2, 2], [0.25])


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"backward": "scatter"}, "backward must be one of auto, gather, atomic"),
        ({"memory_format": torch.preserve_format}, "memory_format must be None"),
    ],
)
def test_bad_options(keywords, message):
    # On every backend, also where the option changes nothing.
    for backend in ("torch", "torchvision", "triton"):
        with pytest.raises(ValueError, match=message):
            roi_align(torch.zeros(1, 2, 4, 4), torch.zeros(1, 5), 2, backend=backend, **keywords)
