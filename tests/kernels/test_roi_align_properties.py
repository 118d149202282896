"""RoIAlign on drawn shapes, options and RoIs: it is the reference, and its backward is its adjoint.

fp32 and fp64 can disagree by more than rounding in two places: where an adaptive grid is the ceiling of a whole number
of cells a bin, and where a sample lies exactly on the border, -1 or the map's length. Coordinates are drawn in eighths
of a pixel, which at these scales are exact in fp32: so is a RoI's size, and the division by its bins where the quotient
is whole, so that grids agree. A sample on the border is kept where its position is exact too, in bins and grids that
are powers of two; elsewhere such an example is not counted.
"""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from test_roi_align import rounding
from test_roi_align_edges import LAYOUTS
from torch import Tensor

from kernels import joint_multiscale_roi_align, roi_align
from kernels.roi_align import reference

few = settings(
    max_examples=25,
    deadline=None,  # the interpreter's
    derandomize=True,  # the same examples in every run
    phases=[Phase.generate],  # to shrink an example takes the interpreter minutes, and these are small
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture],
)


@dataclass
class Case:
    shape: tuple[int, int, int, int]
    layout: torch.memory_format
    scale: float
    size: tuple[int, int]
    sampling_ratio: int
    aligned: bool
    rois: list[tuple[float, ...]]
    seed: int

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """(features, rois, gradient of the output), values in [-1, 1]; coordinates are fp32 or better."""
        generator = torch.Generator().manual_seed(self.seed)
        uniform = lambda *shape: (torch.rand(*shape, generator=generator) * 2 - 1).to(dtype)
        features = uniform(*self.shape).contiguous(memory_format=self.layout)
        rois = torch.tensor(self.rois, dtype=torch.promote_types(dtype, torch.float32)).reshape(-1, 5)
        return features, rois, uniform(len(rois), self.shape[1], *self.size)

    @property
    def options(self) -> tuple:
        return self.size, self.scale, self.sampling_ratio, self.aligned


def edges(cells: int, longest: int) -> st.SearchStrategy[tuple[float, float]]:
    """Low and high edge of a RoI along an axis of so many cells: inside, across the border, outside, inverted."""
    low = st.integers(-32, 8 * cells + 16)
    extent = st.integers(-80, 8 * longest)
    return st.tuples(low, extent).map(lambda pair: (pair[0] / 8, (pair[0] + pair[1]) / 8))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    batch, channels = draw(st.integers(1, 2)), draw(st.integers(1, 15) | st.integers(16, 20))  # 16: other ways begin
    height, width = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    sampling_ratio, scale = draw(st.sampled_from([-1, 1, 2, 3])), draw(st.sampled_from([1.0, 0.5, 0.25]))
    size = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    # An adaptive grid of more than 3 x 3 samples takes the interpreter long and shows nothing new.
    longest = [3 * bins if sampling_ratio < 0 else 32 for bins in size]
    y, x = edges(height, min(height + 8, longest[0])), edges(width, min(width + 8, longest[1]))
    rois = draw(st.lists(st.tuples(st.integers(0, batch - 1), y, x), max_size=3))
    return Case(
        (batch, channels, height, width),
        draw(st.sampled_from(LAYOUTS)),
        scale,
        size,
        sampling_ratio,
        draw(st.booleans()),
        [(image, x1 / scale, y1 / scale, x2 / scale, y2 / scale) for image, (y1, y2), (x1, x2) in rois],
        draw(st.integers(0, 1000)),
    )


def borders_are_exact(case: Case) -> bool:
    """No sample lies on a border that fp32 may put it beyond."""
    _, rois, _ = case.inputs(torch.float64)
    for axis, length in enumerate(case.shape[2:]):
        bins = case.size[axis]
        low, high = (rois[:, column : column + 1] * case.scale for column in (2 - axis, 4 - axis))
        starts, grid = reference._axis_samples(low, high, bins, case.sampling_ratio, case.aligned)
        exact = (torch.log2(grid) % 1 == 0) & (bins & (bins - 1) == 0)
        for position, present in reference._each_sample(starts, grid, case.sampling_ratio):
            near = ((position + 1).abs() < 1e-3) | ((position - length).abs() < 1e-3)
            if (near & present & ~exact).any():
                return False
    return True


def both(case: Case, inputs: tuple[Tensor, ...], **keywords) -> list[Tensor]:
    """[the output, the gradient of the features], on the CPU in fp64."""
    features, rois, grad_out = inputs
    out = roi_align(features.requires_grad_(), rois, *case.options, **keywords)
    (grad,) = torch.autograd.grad(out, features, grad_out)
    assert grad.dtype == out.dtype == features.dtype
    return [out.detach().cpu().double(), grad.cpu().double()]


# Positions up to 32 cells have errors of 4e-6 in fp32, slopes are at most 2, sums at most of 3 x 49 terms.
BOUNDS = {torch.float16: 5e-5, torch.float32: 5e-5, torch.float64: 1e-12}


@pytest.mark.parametrize("dtype", BOUNDS)
@few
@given(case=cases())
def test_it_is_the_reference(dtype, device, case):
    # In value and in gradient; the fp64 reference with autograd, on the same rounded features, is the truth.
    assume(dtype == torch.float64 or borders_are_exact(case))
    inputs = case.inputs(dtype)
    truth = both(case, [t.double() for t in inputs], backend="torch")
    ours = both(case, [t.to(device) for t in inputs], backend="triton")
    for mine, other in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine, other, rtol=rounding(dtype, device), atol=BOUNDS[dtype])


@pytest.mark.parametrize("backward", ["gather", "atomic"])
@few
@given(case=cases())
def test_backward_is_the_adjoint(backward, device, case):
    # <pool(f), g> = <f, backward(g)>: forward and backward agree on which samples exist, whatever the reference says.
    features, _, grad_out = inputs = case.inputs(torch.float64)
    out, grad = both(case, [t.to(device) for t in inputs], backward=backward, backend="triton")
    forward, adjoint = out * grad_out, features * grad
    size = forward.abs().sum() + adjoint.abs().sum()
    assert (forward.sum() - adjoint.sum()).abs() <= 1e-13 * size


@few
@given(case=cases(), parts=st.lists(st.integers(0, 2), min_size=3, max_size=3))
def test_joint_pooling_is_pooling_each(device, case, parts):
    # The RoIs dealt to three sets with bins of their own: values and summed gradients of a call for each set.
    features, rois, _ = (t.to(device) for t in case.inputs(torch.float64))
    sets = [rois[[i for i in range(len(rois)) if parts[i] == part]] for part in range(3)]
    sizes = [case.size, case.size[::-1], (2, 3)]
    options = (case.scale, case.sampling_ratio, case.aligned)
    features.requires_grad_()
    ours = joint_multiscale_roi_align([features], sets, sizes, [options[0]], *options[1:], backend="triton")
    theirs = [roi_align(features, r, s, *options, backend="torch") for r, s in zip(sets, sizes, strict=True)]
    grads = [torch.rand_like(out) for out in ours]
    ours += torch.autograd.grad(ours, features, grads)
    theirs += torch.autograd.grad(theirs, features, grads)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)
