"""`box_iou` and `generalized_box_iou`: argument checks, backends, and the kernels as torch.library ops."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..backend import choose_backend
from ..checks import check_same_device, check_tensor
from ..runtime import NAMESPACE, launch, next_power_of_2, tile
from . import reference

PROGRAMS = 512
"""So many programs fill a GPU: where the rows alone make fewer, each takes a share of the columns."""


def box_iou(boxes1: Tensor, boxes2: Tensor, *, backend: str = "auto") -> Tensor:
    """Intersection over union of every pair of boxes; `torchvision.ops.box_iou`, also in batches.

    Autocast changes nothing: fp32 is computed and returned, whatever it says.

    Args:
        boxes1: [N, 4] or [B, N, 4] xyxy boxes, fp16, bf16, fp32 or fp64.
        boxes2: [M, 4] or [B, M, 4], of the same dtype.
        backend: see `BACKENDS`. On a CPU "auto" is the PyTorch reference.

    Returns:
        [N, M] or [B, N, M], fp32 (fp64 for fp64 boxes), equal to torchvision's in every number for fp32; 0/0 is NaN as
        there. Half types are widened before the first subtraction, where torchvision subtracts in half. Differentiable.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device.
    """
    return _matrix(boxes1, boxes2, backend, generalized=False)


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor, *, backend: str = "auto") -> Tensor:
    """Generalised IoU of every pair of boxes; `torchvision.ops.generalized_box_iou`, also in batches.

    IoU minus the share of the hull, the smallest box around both, that neither covers (arXiv:1902.09630): from -1, far
    apart, to 1, equal. Autocast changes nothing: fp32 is computed and returned, whatever it says.

    Args:
        boxes1: [N, 4] or [B, N, 4] xyxy boxes, fp16, bf16, fp32 or fp64.
        boxes2: [M, 4] or [B, M, 4], of the same dtype.
        backend: see `BACKENDS`. On a CPU "auto" is the PyTorch reference.

    Returns:
        [N, M] or [B, N, M], fp32 (fp64 for fp64 boxes), equal to torchvision's in every number for fp32: NaN where
        neither box has an area, or the hull has none. Half types are widened before the first subtraction, where
        torchvision subtracts in half. Differentiable.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device.
    """
    return _matrix(boxes1, boxes2, backend, generalized=True)


def _matrix(boxes1: Tensor, boxes2: Tensor, backend: str, generalized: bool) -> Tensor:
    ndim = 3 if all(isinstance(b, Tensor) and b.ndim == 3 for b in (boxes1, boxes2)) else 2
    check_tensor(boxes1, "boxes1 (unless both are batched)", ndim, last=4)
    check_tensor(boxes2, "boxes2 (unless both are batched)", ndim, last=4)
    check_same_device(boxes1=boxes1, boxes2=boxes2)
    if boxes1.dtype != boxes2.dtype:
        raise TypeError(f"boxes1 and boxes2 must share a dtype, got {boxes1.dtype} and {boxes2.dtype}")
    if boxes1.shape[:-2] != boxes2.shape[:-2]:
        raise ValueError(f"batch sizes differ: boxes1 {tuple(boxes1.shape)}, boxes2 {tuple(boxes2.shape)}")

    backend = choose_backend(backend, boxes1, "box_iou")
    if backend == "triton":
        if ndim == 3:
            return _forward(boxes1, boxes2, generalized)
        return _forward(boxes1[None], boxes2[None], generalized)[0]
    if backend == "torchvision":
        from torchvision import ops

        op = ops.generalized_box_iou if generalized else ops.box_iou
        return op(boxes1, boxes2) if ndim == 2 else torch.stack([op(a, b) for a, b in zip(boxes1, boxes2, strict=True)])
    return (reference.generalized_box_iou if generalized else reference.box_iou)(boxes1, boxes2)


def _tile(n: int, m: int, dtype: torch.dtype, generalized: bool) -> dict[str, int]:
    """Rows and columns at a time, by what fits into registers: threads that store fewer columns at once have more rows.

    Runs of 16 columns, 64 bytes, write fewer halves of sectors than runs of 8; generalised IoUs wait for two divisions
    and take more registers, so more threads at once are worth more to them.
    """
    vector = math.gcd(m, 4)
    rows, wide = {4: (64, 8 if generalized else 16), 2: (64, 8), 1: (32, 8)}[vector]
    if dtype == torch.float64:
        rows, wide = 16, 16
    return {
        "BLOCK_N": min(next_power_of_2(-(-n // 2)), tile(rows, 1024)),
        "BLOCK_M": tile(wide, 64),
        "NARROW": tile(4, 16),
        "VECTOR": vector,
    }


def _chunks(rows: int, m: int, wide: int) -> int:
    """Chunks of `wide` columns a program, for so many tiles of rows."""
    shares = -(-tile(PROGRAMS, 2) // rows)
    return -(-m // (shares * wide))


@torch.library.custom_op(f"{NAMESPACE}::box_iou", mutates_args=())
def _forward(boxes1: Tensor, boxes2: Tensor, generalized: bool) -> Tensor:
    from .kernel import box_iou_kernel

    iou = _forward_fake(boxes1, boxes2, generalized)
    batch, n, m = iou.shape
    if iou.numel() == 0:
        return iou
    blocks = _tile(n, m, iou.dtype, generalized)
    rows = batch * -(-n // (2 * blocks["BLOCK_N"]))
    chunks = _chunks(rows, m, blocks["BLOCK_M"])
    launch(
        box_iou_kernel,
        (rows, -(-m // (chunks * blocks["BLOCK_M"]))),
        boxes1.contiguous(),
        boxes2.contiguous(),
        iou,
        n,
        m,
        chunks,
        BATCHED=batch > 1,
        GENERALIZED=generalized,
        **blocks,
        device=iou.device,
    )
    return iou


@_forward.register_fake
def _forward_fake(boxes1: Tensor, boxes2: Tensor, generalized: bool) -> Tensor:
    dtype = torch.float64 if boxes1.dtype == torch.float64 else torch.float32
    return boxes1.new_empty(boxes1.shape[0], boxes1.shape[1], boxes2.shape[1], dtype=dtype)


@torch.library.custom_op(f"{NAMESPACE}::box_iou_backward", mutates_args=())
def _backward(grad_iou: Tensor, boxes1: Tensor, boxes2: Tensor, generalized: bool) -> tuple[Tensor, Tensor]:
    grad1 = _gradient(grad_iou, boxes1, boxes2, generalized)
    return grad1, _gradient(grad_iou.transpose(1, 2), boxes2, boxes1, generalized)


@_backward.register_fake
def _(grad_iou: Tensor, boxes1: Tensor, boxes2: Tensor, generalized: bool) -> tuple[Tensor, Tensor]:
    return boxes1.new_empty(boxes1.shape), boxes2.new_empty(boxes2.shape)  # contiguous, whatever the boxes are


def _gradient(grad_iou: Tensor, boxes1: Tensor, boxes2: Tensor, generalized: bool) -> Tensor:
    """Gradient of `boxes1` from grad_iou [B, N, M], any strides."""
    from .kernel import box_iou_backward_kernel

    boxes1, boxes2 = boxes1.contiguous(), boxes2.contiguous()
    batch, n, m = grad_iou.shape
    grad = torch.zeros_like(boxes1)
    # Larger tiles spill registers on every NVIDIA GPU.
    block_n = min(next_power_of_2(n), tile(8, 1024))
    block_m = min(next_power_of_2(m), tile(32 if grad_iou.dtype == torch.float64 else 64, 1024))
    launch(
        box_iou_backward_kernel,
        (batch * -(-n // block_n),),
        boxes1,
        boxes2,
        grad_iou,
        grad,
        n,
        m,
        *grad_iou.stride(),
        GENERALIZED=generalized,
        BLOCK_N=block_n,
        BLOCK_M=block_m,
        device=grad.device,
    )
    return grad


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:  # noqa: ANN001
    *boxes, ctx.generalized = inputs
    ctx.save_for_backward(*boxes)


def _autograd(ctx, grad_iou: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: ANN001
    return *_backward(grad_iou, *ctx.saved_tensors, ctx.generalized), None


_forward.register_autograd(_autograd, setup_context=_setup_context)
