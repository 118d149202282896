"""`mask_bce_loss`: argument checks, backends, and the kernels as torch.library ops."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import choose_backend
from ..checks import check_indices, check_same_device, check_tensor
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
        weights: [N] floating, by default 1.
        backend: see `BACKENDS`. "torchvision" is its way of computing this, which is also the reference's.

    Returns:
        Scalar loss, fp32 (fp64 for fp64 logits). Sums are fp32 (fp64). Autocast changes nothing.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device.
        IndexError: a label of K or more (CPU tensors; on a GPU the Triton kernel makes the loss NaN).
    """
    _check(logits, labels, targets, weights)
    backend = choose_backend(backend, logits)
    rows = (_rows if backend == "triton" else reference.mask_bce_rows)(logits, labels, targets)
    weights = torch.ones_like(rows) if weights is None else weights.to(rows.dtype)
    weights = torch.where(labels >= 0, weights, 0)  # chosen, not multiplied: an empty slot's weight may be NaN
    return (weights * rows).sum() / weights.sum().clamp(min=1)


def _check(logits: Tensor, labels: Tensor, targets: Tensor, weights: Tensor | None) -> None:
    check_tensor(logits, "logits", 4)
    n, k, height, width = logits.shape
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        raise TypeError("labels must be an int64 tensor")
    if not isinstance(targets, Tensor) or not (
        targets.is_floating_point() or targets.dtype in (torch.bool, torch.uint8)
    ):
        raise TypeError("targets must be a floating, bool or uint8 tensor")
    if labels.shape != (n,):
        raise ValueError(f"labels must have shape [{n}], got {tuple(labels.shape)}")
    if targets.shape != (n, height, width):
        raise ValueError(f"targets must have shape [{n}, {height}, {width}], got {tuple(targets.shape)}")
    if targets.requires_grad:
        raise ValueError("no gradient flows to the targets: pass targets.detach()")
    if 0 in (k, height, width):
        raise ValueError(f"logits must not be empty beyond the first dimension, got {tuple(logits.shape)}")
    extra = {}
    if weights is not None:
        check_tensor(weights, "weights", 1)
        if weights.shape != (n,):
            raise ValueError(f"weights must have shape [{n}], got {tuple(weights.shape)}")
        extra["weights"] = weights
    check_same_device(logits=logits, labels=labels, targets=targets, **extra)
    check_indices(labels.clamp(min=0), k, "labels (negative ones aside)")


def _constants(logits: Tensor) -> dict:
    pixels = logits.shape[2] * logits.shape[3]
    return {
        "PIXELS": pixels,
        "WIDTH": logits.shape[3],
        "BLOCK": min(next_power_of_2(pixels), tile(1024, 1 << 16)),
    }


@torch.library.custom_op(f"{NAMESPACE}::mask_bce_rows", mutates_args=())
def _rows(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Mean BCE of each RoI's class channel: [N]."""
    from .kernel import mask_bce_forward_kernel

    loss = _rows_fake(logits, labels, targets)
    launch(
        mask_bce_forward_kernel, (len(labels),), logits, labels.contiguous(), _loadable(targets), loss,
        logits.shape[1], *logits.stride(), **_constants(logits), device=logits.device,
    )  # fmt: skip
    return loss


@_rows.register_fake
def _rows_fake(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(logits.shape[0], dtype=dtype)


@torch.library.custom_op(f"{NAMESPACE}::mask_bce_rows_backward", mutates_args=())
def _rows_backward(grad_loss: Tensor, logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    from .kernel import mask_bce_backward_kernel

    grad = torch.zeros_like(logits)
    launch(
        mask_bce_backward_kernel, (len(labels),), logits, labels.contiguous(), _loadable(targets),
        grad_loss.contiguous(), grad, logits.shape[1], *logits.stride(), *grad.stride(),
        **_constants(logits), device=logits.device,
    )  # fmt: skip
    return grad


@_rows_backward.register_fake
def _(grad_loss: Tensor, logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    return torch.zeros_like(logits)


def _loadable(targets: Tensor) -> Tensor:
    targets = targets.contiguous()
    return targets.view(torch.uint8) if targets.dtype == torch.bool else targets


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:  # noqa: ANN001
    ctx.save_for_backward(*inputs)


def _autograd(ctx, grad_loss: Tensor) -> tuple:  # noqa: ANN001
    return _rows_backward(grad_loss, *ctx.saved_tensors), None, None


_rows.register_autograd(_autograd, setup_context=_setup_context)
