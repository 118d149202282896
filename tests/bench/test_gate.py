"""What lets a time or a demo through must not let NaN or a wrong number through."""

import pytest
import torch

import kernels
from bench.follow import KERNELS, Following
from bench.gate import WrongResultError, check_backward
from bench.workloads import WORKLOADS


@pytest.mark.parametrize("fault", ["nan", "wrong"])
def test_a_wrong_gradient_is_refused(fault):
    # In the second gradient, behind a right one: Python's max() would drop its NaN.
    workload = next(w for w in WORKLOADS if (w.op, w.suite) == ("box_iou", "cpu"))
    inputs = workload.build("cpu", torch.float32, "contiguous", grad=True)
    exact = [leaf.detach().clone().requires_grad_() for leaf in inputs.leaves]
    iou = kernels.box_iou(*exact, backend="torch")
    grads = list(torch.autograd.grad(iou, exact, torch.ones_like(iou)))
    check_backward("box_iou", inputs, grads, torch.ones_like(iou), torch.float32).require()
    grads[1] = grads[1] * (float("nan") if fault == "nan" else 1.1)
    with pytest.raises(WrongResultError):
        check_backward("box_iou", inputs, grads, torch.ones_like(iou), torch.float32).require()


@pytest.mark.parametrize("field", ["loss_errors", "gradient_errors", "pyramid_gradients"])
def test_following_refuses_nan(field):
    # make demo must not go green on a diverged model.
    good = Following(
        loss_errors=[0.0], gradient_errors=[0.0], pyramid_gradients=[1.0], rois=[9], levels=[3], anchors=2000
    )
    good.launches.update(k for names in KERNELS.values() for k in names)
    assert good.ok
    getattr(good, field).append(float("nan"))
    assert not good.ok
