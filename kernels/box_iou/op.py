"""`box_iou`: argument checks, backends, and the kernels as torch.library ops."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import choose_backend
from ..checks import check_same_device, check_tensor
from ..runtime import NAMESPACE, launch, next_power_of_2, tile
from . import reference


def box_iou(boxes1: Tensor, boxes2: Tensor, *, backend: str = "auto") -> Tensor:
    """Intersection over union of every pair of boxes; `torchvision.ops.box_iou`, also in batches.

    Autocast changes nothing: fp32 is computed and returned, whatever it says.

    Args:
        boxes1: [N, 4] or [B, N, 4] xyxy boxes, fp16, bf16, fp32 or fp64.
        boxes2: [M, 4] or [B, M, 4], of the same dtype.
        backend: see `BACKENDS`. On a CPU "auto" is the PyTorch reference.

    Returns:
        [N, M] or [B, N, M], fp32 (fp64 for fp64 boxes), bit-equal to torchvision's for fp32; 0/0 is NaN as there. Half
        types are widened before the first subtraction, where torchvision subtracts in half. Differentiable.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device.
    """
    ndim = 3 if all(isinstance(b, Tensor) and b.ndim == 3 for b in (boxes1, boxes2)) else 2
    check_tensor(boxes1, "boxes1 (unless both are batched)", ndim, last=4)
    check_tensor(boxes2, "boxes2 (unless both are batched)", ndim, last=4)
    check_same_device(boxes1=boxes1, boxes2=boxes2)
    if boxes1.dtype != boxes2.dtype:
        raise TypeError(f"boxes1 and boxes2 must share a dtype, got {boxes1.dtype} and {boxes2.dtype}")
    if boxes1.shape[:-2] != boxes2.shape[:-2]:
        raise ValueError(f"batch sizes differ: boxes1 {tuple(boxes1.shape)}, boxes2 {tuple(boxes2.shape)}")

    backend = choose_backend(backend, boxes1)
    if backend == "triton":
        if ndim == 3:
            return _forward(boxes1, boxes2)
        return _forward(boxes1[None], boxes2[None])[0]
    if backend == "torchvision":
        from torchvision.ops import box_iou as op

        return op(boxes1, boxes2) if ndim == 2 else torch.stack([op(a, b) for a, b in zip(boxes1, boxes2, strict=True)])
    return reference.box_iou(boxes1, boxes2)


def _blocks(n: int, m: int, rows: int, columns: int) -> dict[str, int]:
    return {
        "BLOCK_N": min(next_power_of_2(n), tile(rows, 1024)),
        "BLOCK_M": min(next_power_of_2(m), tile(columns, 1024)),
    }


@torch.library.custom_op(f"{NAMESPACE}::box_iou", mutates_args=())
def _forward(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    from .kernel import box_iou_kernel

    iou = _forward_fake(boxes1, boxes2)
    batch, n, m = iou.shape
    blocks = _blocks(n, m, 16, 128)
    launch(
        box_iou_kernel,
        (batch * -(-n // blocks["BLOCK_N"]) * -(-m // blocks["BLOCK_M"]),),
        boxes1.contiguous(),
        boxes2.contiguous(),
        iou,
        n,
        m,
        **blocks,
        device=iou.device,
    )
    return iou


@_forward.register_fake
def _forward_fake(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    dtype = torch.float64 if boxes1.dtype == torch.float64 else torch.float32
    return boxes1.new_empty(boxes1.shape[0], boxes1.shape[1], boxes2.shape[1], dtype=dtype)


@torch.library.custom_op(f"{NAMESPACE}::box_iou_backward", mutates_args=())
def _backward(grad_iou: Tensor, boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    return _gradient(grad_iou, boxes1, boxes2), _gradient(grad_iou.transpose(1, 2), boxes2, boxes1)


@_backward.register_fake
def _(grad_iou: Tensor, boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    return boxes1.new_empty(boxes1.shape), boxes2.new_empty(boxes2.shape)  # contiguous, whatever the boxes are


def _gradient(grad_iou: Tensor, boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Gradient of `boxes1` from grad_iou [B, N, M], any strides."""
    from .kernel import box_iou_backward_kernel

    boxes1, boxes2 = boxes1.contiguous(), boxes2.contiguous()
    batch, n, m = grad_iou.shape
    grad = torch.zeros_like(boxes1)
    blocks = _blocks(n, m, 8, 64)  # a larger tile spills registers on every NVIDIA GPU
    launch(
        box_iou_backward_kernel,
        (batch * -(-n // blocks["BLOCK_N"]),),
        boxes1,
        boxes2,
        grad_iou,
        grad,
        n,
        m,
        *grad_iou.stride(),
        **blocks,
        device=grad.device,
    )
    return grad


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:  # noqa: ANN001
    ctx.save_for_backward(*inputs)


def _autograd(ctx, grad_iou: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN001
    return _backward(grad_iou, *ctx.saved_tensors)


_forward.register_autograd(_autograd, setup_context=_setup_context)
