"""RoIAlign's rounding against fp64: no worse than twice torchvision's own, and of half types only the result's."""

import pytest
import torch
import torchvision
from test_roi_align import rounding
from test_roi_align_edges import BF16, FP16, LAYOUTS, NCHW, NHWC
from torch import Tensor

from kernels import launch_counts, roi_align

LAYOUT_IDS = ["nchw", "nhwc"]
STRIDE = 1 / 4


def rois_of_an_image(number: int, height: int) -> Tensor:
    """Boxes of 20 to 100 pixels anywhere in `height` x 1344, where a coordinate's last bit is 1e-4."""
    size = 20 + torch.rand(number, 2) * 80
    corner = torch.rand(number, 2) * torch.tensor([1344.0, height]) - size / 2
    return torch.cat([torch.zeros(number, 1), corner, corner + size], dim=1)


def errors(found: Tensor, truth: Tensor) -> Tensor:
    """The largest and the root mean square."""
    error = (found.cpu().double() - truth).abs()
    return torch.stack([error.max(), error.square().mean().sqrt()])


def run(op, features: Tensor, rois: Tensor, grad_out: Tensor | None, *options, **keywords) -> Tensor:
    """`op`'s result, or the gradient of the features where `grad_out` is given."""
    if grad_out is None:
        return op(features, rois, 7, *options, **keywords)
    leaf = features.detach().requires_grad_()
    return torch.autograd.grad(op(leaf, rois, 7, *options, **keywords), leaf, grad_out)[0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize(("sampling_ratio", "aligned"), [(2, False), (-1, True)])
def test_forward_error_in_a_large_image(sampling_ratio, aligned, layout, device):
    # P2 of 800 x 1344: positions carry errors of 1e-5 cells, which every fp32 implementation has.
    features, rois = torch.randn(1, 3, 200, 336), rois_of_an_image(30, 800)
    options = (STRIDE, sampling_ratio, aligned)
    truth = run(roi_align, features.double(), rois.double(), None, *options, backend="torch")
    theirs = run(torchvision.ops.roi_align, features, rois, None, *options)
    features = features.contiguous(memory_format=layout)
    ours = run(roi_align, features.to(device), rois.to(device), None, *options, backend="triton")
    assert (errors(ours, truth) <= 2 * errors(theirs, truth)).all()
    assert errors(theirs, truth)[1] < 2e-5  # and theirs is of that size: the inputs are no special case


@pytest.mark.parametrize(
    ("sampling_ratio", "aligned", "layout", "backward"),
    [(2, False, NHWC, "gather"), (-1, True, NCHW, "gather"), (2, True, NHWC, "atomic")],
    ids=["fixed", "adaptive", "atomic"],
)
def test_gradient_error_in_a_large_image(sampling_ratio, aligned, layout, backward, device):
    # A strip of that image, the full coordinates in fewer tiles.
    features, rois, grad_out = torch.zeros(1, 3, 16, 336), rois_of_an_image(12, 64), torch.randn(12, 3, 7, 7)
    options = (STRIDE, sampling_ratio, aligned)
    truth = run(roi_align, features.double(), rois.double(), grad_out.double(), *options, backend="torch")
    theirs = run(torchvision.ops.roi_align, features, rois, grad_out, *options)
    features = features.contiguous(memory_format=layout)
    on_device = (features.to(device), rois.to(device), grad_out.to(device))
    ours = run(roi_align, *on_device, *options, backward=backward, backend="triton")
    assert (errors(ours, truth) <= 2 * errors(theirs, truth)).all()
    assert (truth != 0).float().mean() > 0.2


SAMPLES, PRODUCTS = "roi_align_forward_kernel", "roi_align_matrix_kernel"


@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize(
    ("channels", "sampling_ratio", "kernel"),
    [(5, 2, SAMPLES), (8, 2, SAMPLES), (20, -1, PRODUCTS), (20, 3, PRODUCTS), (15, 3, SAMPLES)],
    ids=["samples", "pairs", "products", "fixed", "few"],
)
def test_results_in_halves_round_but_once(channels, sampling_ratio, kernel, dtype, device):
    # Each way of computing them: sample by sample, bf16 in pairs of channels, and as a product of matrices where there
    # are many samples, whose weights no half type holds. Values of one sign: a mean is as large as its terms.
    rois = torch.tensor([[1, 1.3, 0.7, 12.4, 11.8], [0, -2.1, 3.9, 9.2, 15.0], [1, 5.1, 5.2, 6.3, 5.9]])
    features = (torch.rand(2, channels, 13, 14) + 1).to(dtype).contiguous(memory_format=NHWC)
    truth = run(roi_align, features.double(), rois.double(), None, 1.0, sampling_ratio, backend="torch")
    launch_counts.clear()
    ours = run(roi_align, features.to(device), rois.to(device), None, 1.0, sampling_ratio, backend="triton")
    assert launch_counts[kernel] == 1
    torch.testing.assert_close(ours.cpu().double(), truth, rtol=rounding(dtype, device) * 1.01, atol=1e-5)


@pytest.mark.parametrize("backward", ["gather", "atomic"])
@pytest.mark.parametrize("dtype", [FP16, BF16])
def test_gradients_in_halves_round_but_once(dtype, backward, device):
    # Large terms that cancel: with weights rounded to a half type, or sums kept in one, the small differences that are
    # left would be off by far more than their own last bit. Weights of 7 bins on 9.1 cells need many bits.
    rois = torch.tensor([[0, 1.3, 0.7, 10.4, 9.8], [0, 2.1, 1.9, 11.2, 11.0], [0, 0.2, 2.4, 9.3, 11.5]])
    features = torch.zeros(1, 16, 12, 12, dtype=dtype).contiguous(memory_format=NHWC)
    grad_out = (torch.randn(3, 16, 7, 7) * 100).to(dtype)
    truth = run(roi_align, features.double(), rois.double(), grad_out.double(), 1.0, 2, backend="torch")
    on_device = (features.to(device), rois.to(device), grad_out.to(device))
    ours = run(roi_align, *on_device, 1.0, 2, backward=backward, backend="triton")
    # fp32 positions and sums: 1e-5 of the terms, whatever is left of them.
    torch.testing.assert_close(ours.cpu().double(), truth, rtol=rounding(dtype, device), atol=2e-3)
    assert truth.abs().max() > 100
