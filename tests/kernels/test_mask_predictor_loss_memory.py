"""The mask predictor's loss: what is not kept, not formed and not computed."""

import pytest
import torch
from test_mask_predictor_loss import ALL_BACKENDS, NHWC, inputs, with_gradients
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import mask_predictor_loss
from kernels.mask_predictor_loss import op
from kernels.runtime import launch_counts, record_launches


@pytest.mark.parametrize(
    ("backend", "relu", "kept"), [("triton", False, 0), ("triton", True, 0), ("torchvision", False, 1)]
)
def test_features_are_not_kept_for_the_backward(backend, relu, kept, device):
    # Their memory is free for what the backward needs, once the caller lets go of them too. A convolution keeps them:
    # the check can tell. Nothing is launched, since the interpreter holds on to what it is given.
    leaf, *arguments = inputs(2, 8, 2, layout=NHWC, device=device)
    alive = []
    with record_launches() as launches:
        for _ in range(2):  # the first call of an operator in a process leaves its frames behind (PyTorch 2.11)
            features = leaf * 2
            storage = StorageWeakRef(features.untyped_storage())
            loss = mask_predictor_loss(features, *arguments, relu=relu, backend=backend)
            assert not storage.expired()
            launches.clear()
            del features
            alive.append(not storage.expired())
            torch.autograd.grad(loss, leaf)
    assert alive[1] == kept


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation returns, those in the bodies of this op among them."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        bodies = {o._opoverload: o._init_fn for o in (op._forward, op._features, op._weight)}
        if function in bodies:
            with self:
                out = bodies[function](*args)
        else:
            out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


@pytest.mark.parametrize("relu", [True])
@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_no_tensor_has_all_channels(backend, relu, device):
    # Forward and backward: the K channels that the ordinary path has.
    arguments = inputs(2, 4, 50, (7, 7), device=device)
    launch_counts.clear()
    with Largest() as largest:
        with_gradients(arguments, relu, backend)
    assert sum(launch_counts.values()) == (4 if backend == "triton" else 0)
    assert (largest.numbers >= 2 * 50 * 49) == (backend == "torchvision") and largest.numbers >= 2 * 4 * 49


@pytest.mark.parametrize("frozen", ["features", "predictor"])
def test_what_needs_no_gradient_is_not_computed(frozen, device):
    # A frozen trunk, or a frozen predictor: half of the backward's work, and the one gradient as it is with both.
    leaves = list(inputs(3, 8, 2, device=device))
    full = torch.autograd.grad(mask_predictor_loss(*leaves, backend="triton"), leaves[:3])
    wanted = [0] if frozen == "predictor" else [1, 2]
    leaves[:3] = [leaf.detach().requires_grad_(i in wanted) for i, leaf in enumerate(leaves[:3])]
    launch_counts.clear()
    found = torch.autograd.grad(mask_predictor_loss(*leaves, backend="triton"), [leaves[i] for i in wanted])
    assert all(torch.equal(grad, full[i]) for grad, i in zip(found, wanted, strict=True))
    counts = [launch_counts[f"mask_predictor_{name}_kernel"] for name in ("features", "weight")]
    assert counts == ([1, 0] if frozen == "predictor" else [0, 1])
