"""`mask_bce_loss`: argument checks, backends, and the kernels as torch.library ops."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import choose_backend
from ..checks import check_indices, check_tensor
from ..layouts import is_channels_last, layout
from ..runtime import NAMESPACE, launch, next_power_of_2, tile
from . import reference


def mask_bce_loss(
    logits: Tensor,
    labels: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Mask R-CNN's mask loss: BCE with logits on each RoI's ground-truth channel (arXiv:1703.06870, section 3).

    The mean over pixels of each RoI, then the weighted mean over RoIs, sum(w * l) / max(sum(w), 1). Without empty slots
    and weights it is torchvision's `maskrcnn_loss`. A negative label marks an empty slot: it adds nothing to either
    sum, and NaN logits in it reach neither the loss nor the gradient.

    Args:
        logits: [N, K, M, M'] in fp16, bf16, fp32 or fp64, any strides.
        labels: [N] int64 class of each RoI, 0..K-1, or negative.
        targets: [N, M, M'] in [0, 1], floating, bool or uint8 {0, 1}; no gradient flows to them.
        weights: [N] floating, by default 1; no gradient flows to them.
        backend: see `BACKENDS`. "torchvision" is its way of computing this, which is also the reference's.

    Returns:
        Scalar loss, fp32 (fp64 for fp64 logits). Sums are fp32 (fp64). Autocast changes nothing.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device.
        IndexError: a label of K or more (CPU tensors; on a GPU the Triton kernel makes the loss NaN, or, with
            TRITON_DEBUG=1 in the environment, this is raised there, too).
    """
    _check(logits, labels, targets, weights)
    backend = choose_backend(backend, logits, "mask_bce_loss")
    if backend == "triton":
        return _forward(logits, labels, targets, None if weights is None else weights.detach())[0]
    return reference.weighted_mean(reference.mask_bce_rows(logits, labels, targets), labels, weights)


def _check(logits: Tensor, labels: Tensor, targets: Tensor, weights: Tensor | None) -> None:
    check_tensor(logits, "logits", 4)
    if 0 in logits.shape[1:]:
        raise ValueError(f"logits must not be empty beyond the first dimension, got {tuple(logits.shape)}")
    check_rows(logits.shape, labels, targets, weights, logits.device, "logits")


def check_rows(
    shape: tuple[int, ...],
    labels: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    device: torch.device,
    name: str,
) -> None:
    """Check what belongs to RoIs with logits of `shape` [N, K, M, M'] on `device`, which come from `name`."""
    n, k, height, width = shape
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        raise TypeError(f"labels must be an int64 tensor, got {getattr(labels, 'dtype', type(labels).__name__)}")
    if not isinstance(targets, Tensor) or not (
        targets.is_floating_point() or targets.dtype in (torch.bool, torch.uint8)
    ):
        found = getattr(targets, "dtype", type(targets).__name__)
        raise TypeError(f"targets must be a floating, bool or uint8 tensor, got {found}")
    if labels.shape != (n,):
        raise ValueError(f"labels must have shape [{n}], got {tuple(labels.shape)}")
    if targets.shape != (n, height, width):
        raise ValueError(f"targets must have shape [{n}, {height}, {width}], got {tuple(targets.shape)}")
    if targets.requires_grad:
        raise ValueError("no gradient flows to the targets: pass targets.detach()")
    tensors = {"labels": labels, "targets": targets}
    if weights is not None:
        tensors["weights"] = check_tensor(weights, "weights", 1)
        if weights.shape != (n,):
            raise ValueError(f"weights must have shape [{n}], got {tuple(weights.shape)}")
    for what, tensor in tensors.items():
        if tensor.device != device:
            raise ValueError(f"all tensors must be on one device, got {name} on {device}, {what} on {tensor.device}")
    check_indices(labels, k, "labels (negative ones aside)", negative=True)
    if targets.dtype == torch.uint8 and device.type == "cpu":
        check_indices(torch.where(labels[:, None, None] >= 0, targets, 0), 2, "targets of bytes")


def weighted_mean(rows: Tensor, labels: Tensor, weights: Tensor | None, num_classes: int, pixels: int) -> list[Tensor]:
    """The loss from sums [parts, N] over RoIs' pixels, and what a pixel of each RoI counts in it, [N]."""
    from ..device_bce import weighted_mean_kernel

    parts, n = rows.shape
    loss, scale = rows.new_empty(()), rows.new_empty(n)
    block = min(next_power_of_2(n), tile(1024, 1 << 16))
    launch(
        weighted_mean_kernel, (1,), rows, labels, labels if weights is None else weights.contiguous(), loss, scale,
        n, num_classes, PIXELS=pixels, PARTS=parts, WEIGHTED=weights is not None, BLOCK=block, device=rows.device,
    )  # fmt: skip
    return [loss, scale]


def _plane(logits: Tensor) -> dict[str, int]:
    """Constants of a plane of pixels: their number, and the width of its rows unless they lie end to end."""
    height, width = logits.shape[2:]
    end_to_end = height == 1 or logits.stride(2) == width * logits.stride(3)
    return {"PIXELS": height * width, "WIDTH": 0 if end_to_end else width}


@torch.library.custom_op(f"{NAMESPACE}::mask_bce_forward", mutates_args=())
def _forward(logits: Tensor, labels: Tensor, targets: Tensor, weights: Tensor | None) -> list[Tensor]:
    """The loss, and what a pixel of each RoI counts in it: [] and [N]."""
    from .kernel import mask_bce_forward_kernel

    n, num_classes = logits.shape[:2]
    rows = logits.new_empty(1, n, dtype=_forward_fake(logits)[0].dtype)
    plane, labels = _plane(logits), labels.contiguous()
    launch(
        mask_bce_forward_kernel, (n,), logits, labels, loadable(targets), rows, num_classes, *logits.stride(),
        **plane, BLOCK=min(next_power_of_2(plane["PIXELS"]), tile(1024, 1 << 16)), device=logits.device,
    )  # fmt: skip
    return weighted_mean(rows, labels, weights, num_classes, plane["PIXELS"])


@_forward.register_fake
def _forward_fake(logits: Tensor, *others: object) -> list[Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return [logits.new_empty((), dtype=dtype), logits.new_empty(logits.shape[0], dtype=dtype)]


@torch.library.custom_op(f"{NAMESPACE}::mask_bce_backward", mutates_args=())
def _backward(grad_loss: Tensor, logits: Tensor, labels: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
    from .kernel import mask_bce_backward_kernel

    grad = _backward_fake(grad_loss, logits)
    plane, block = _plane(logits), tile(4096, 1 << 16)
    step = grad.stride(3) if logits.shape[3] > 1 else grad.stride(2)
    launch(
        mask_bce_backward_kernel, (-(-grad.numel() // block),), logits, labels.contiguous(), loadable(targets),
        grad_loss, scale, grad, grad.numel(), logits.shape[1], *logits.stride(), grad.stride(1), step,
        **plane, BLOCK=block, OWN=tile(128, 1024), device=logits.device,
    )  # fmt: skip
    return grad


@_backward.register_fake
def _backward_fake(grad_loss: Tensor, logits: Tensor, *others: object) -> Tensor:
    return torch.empty_like(logits, memory_format=layout(is_channels_last([logits])))


def loadable(targets: Tensor) -> Tensor:
    """Contiguous, and of a type that kernels load."""
    targets = targets.contiguous()
    return targets.view(torch.uint8) if targets.dtype == torch.bool else targets


def _setup_context(ctx, inputs: tuple, output: list[Tensor]) -> None:  # noqa: ANN001
    logits, labels, targets, _ = inputs
    ctx.save_for_backward(logits, labels, targets, output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, grads: list[Tensor | None]) -> tuple:  # noqa: ANN001
    if grads[0] is None:
        return None, None, None, None
    return _backward(grads[0], *ctx.saved_tensors), None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
