"""`rpn_loss`: argument checks, backends, and the kernels as torch.library ops."""

from __future__ import annotations

import torch
from torch import Tensor

from ..anchors import MOST_ANCHORS, AnchorGrid, kernel_arguments
from ..backend import choose_backend
from ..checks import check_indices, check_same_device, check_tensor
from ..runtime import NAMESPACE, launch, next_power_of_2, tile
from . import reference


def rpn_loss(
    logits: Tensor,
    deltas: Tensor,
    anchors: Tensor | AnchorGrid,
    gt_boxes: Tensor,
    matched_idx: Tensor,
    index: Tensor,
    drawn: Tensor,
    positive: Tensor,
    box_beta: float = 1 / 9,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The two losses of a region proposal network, summed over a sample of the anchors (arXiv:1506.01497, 3.1.2).

    Objectness: binary cross-entropy with logits of the anchors drawn, wanted 1 where positive and 0 elsewhere. Boxes:
    smooth L1 (PyTorch's, L1 for a `box_beta` of 0) of the four deltas of positive anchors against those that move the
    anchor onto its ground truth (torchvision's BoxCoder with weights of 1). An anchor or ground truth without width or
    height wants deltas of 0. Neither sum is divided by anything. NaN and inf in the logits and deltas of other anchors
    reach neither the losses nor the gradients.

    The Triton kernels read the anchors of the slots alone, and store no deltas but the gradient's. They are
    deterministic: nothing is added atomically.

    Args:
        logits: [B, A] in fp16, bf16, fp32 or fp64, any strides.
        deltas: [B, A, 4] (dx, dy, dw, dh), of the same dtype, any strides.
        anchors: [A, 4] fp32 xyxy, or the pyramid they are of, at most 16,777,216; no gradient flows to them.
        gt_boxes: [B, G, 4] fp32 xyxy, padded; no gradient flows to them.
        matched_idx: int32 [B, A], the ground truth of each anchor, as `label_anchors` gives it; read for positive
            anchors only. One that does not exist makes the box loss NaN.
        index: int64 [B, S] of the anchors drawn, no anchor of an image twice.
        drawn: bool [B, S]; the other slots are empty, whatever they hold.
        positive: bool [B, S], of the slots drawn.
        box_beta: where smooth L1 passes from a square to a line, >= 0. The kernels are compiled for it.
        backend: see `BACKENDS`. "torchvision" is its way of computing this, which is also the reference's.

    Returns:
        objectness and box loss: two scalars, fp32 (fp64 for fp64 logits), as which everything is computed. Their
        gradients have the logits' dtype. Autocast changes nothing.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device, a negative `box_beta`, too many anchors.
        IndexError: an anchor that does not exist is drawn (CPU tensors; on a GPU the Triton kernel makes the objectness
            loss NaN).
    """
    number = len(anchors) if isinstance(anchors, AnchorGrid) else len(check_tensor(anchors, "anchors", 2, last=4))
    cells = anchors.cells if isinstance(anchors, AnchorGrid) else anchors
    _check(logits, deltas, cells, number, gt_boxes, matched_idx, index, drawn, positive)
    if not box_beta >= 0:
        raise ValueError(f"box_beta must not be negative, got {box_beta}")
    slots = (gt_boxes.detach(), matched_idx, index, drawn, positive, float(box_beta))
    if choose_backend(backend, logits, "rpn_loss") == "triton":
        grid = anchors if isinstance(anchors, AnchorGrid) else AnchorGrid.of(anchors.detach())
        rows = _rows(logits, deltas, *grid.flat(), *slots)
        return rows[0].sum(), rows[1].sum()
    anchors = anchors.anchors() if isinstance(anchors, AnchorGrid) else anchors.detach()
    return reference.rpn_loss(logits, deltas, anchors, *slots)


def _check(
    logits: Tensor,
    deltas: Tensor,
    cells: Tensor,
    number: int,
    gt_boxes: Tensor,
    matched_idx: Tensor,
    index: Tensor,
    drawn: Tensor,
    positive: Tensor,
) -> None:
    check_tensor(logits, "logits", 2)
    check_tensor(deltas, "deltas", 3, last=4)
    check_tensor(gt_boxes, "gt_boxes", 3, last=4)
    if deltas.dtype != logits.dtype:
        raise TypeError(f"logits and deltas must have one dtype, got {logits.dtype} and {deltas.dtype}")
    if cells.dtype != torch.float32 or gt_boxes.dtype != torch.float32:
        raise TypeError(f"anchors and gt_boxes must be float32, got {cells.dtype} and {gt_boxes.dtype}")
    others = {
        "matched_idx": (matched_idx, torch.int32),
        "index": (index, torch.int64),
        "drawn": (drawn, torch.bool),
        "positive": (positive, torch.bool),
    }
    for name, (value, dtype) in others.items():
        if not isinstance(value, Tensor) or value.dtype != dtype:
            raise TypeError(f"{name} must be a tensor of {dtype}, got {getattr(value, 'dtype', type(value).__name__)}")
    batch = len(logits)
    if index.ndim != 2:
        raise ValueError(f"index must have 2 dimensions, got shape {tuple(index.shape)}")
    shapes = {
        "logits": (logits, (batch, number)),
        "deltas": (deltas, (batch, number, 4)),
        "gt_boxes": (gt_boxes, (batch, *gt_boxes.shape[1:])),
        "matched_idx": (matched_idx, (batch, number)),
        "index": (index, (batch, index.shape[1])),
        "drawn": (drawn, (batch, index.shape[1])),
        "positive": (positive, (batch, index.shape[1])),
    }
    for name, (value, shape) in shapes.items():
        if value.shape != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {tuple(value.shape)}")
    if number > MOST_ANCHORS or (number == 0 and index.shape[1] > 0):
        raise ValueError(f"slots need anchors, and at most {MOST_ANCHORS} an image, got {number}")
    tensors = {name: value for name, (value, _) in shapes.items()}
    check_same_device(anchors=cells, **tensors)
    check_indices(torch.where(drawn, index, 0), number, "index (of the slots drawn)")


def _arguments(
    logits: Tensor,
    deltas: Tensor,
    cells: Tensor,
    extents: list[int],
    strides: list[int],
    gt_boxes: Tensor,
    matched_idx: Tensor,
    index: Tensor,
    drawn: Tensor,
    positive: Tensor,
) -> tuple[tuple, tuple]:
    """What both kernels take before and after their outputs."""
    inputs = (
        logits, deltas, gt_boxes.contiguous(), matched_idx.contiguous(), index.contiguous(),
        drawn.contiguous().view(torch.uint8), positive.contiguous().view(torch.uint8),
    )  # fmt: skip
    sizes = (index.shape[1], logits.shape[1], gt_boxes.shape[1], *logits.stride(), *deltas.stride())
    return inputs, (*sizes, *kernel_arguments(cells, extents, strides))


@torch.library.custom_op(f"{NAMESPACE}::rpn_loss_rows", mutates_args=())
def _rows(
    logits: Tensor,
    deltas: Tensor,
    cells: Tensor,
    extents: list[int],
    strides: list[int],
    gt_boxes: Tensor,
    matched_idx: Tensor,
    index: Tensor,
    drawn: Tensor,
    positive: Tensor,
    box_beta: float,
) -> tuple[Tensor, Tensor]:
    """The two losses of each image: [B] and [B]."""
    from .kernel import rpn_loss_forward_kernel

    slots = (gt_boxes, matched_idx, index, drawn, positive)
    objectness, box = _rows_fake(logits)
    inputs, sizes = _arguments(logits, deltas, cells, extents, strides, *slots)
    launch(
        rpn_loss_forward_kernel, (len(logits),), *inputs, objectness, box, *sizes,
        BETA=box_beta, BLOCK=min(next_power_of_2(index.shape[1]), tile(256, 1 << 16)), device=logits.device,
    )  # fmt: skip
    return objectness, box


@_rows.register_fake
def _rows_fake(logits: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return tuple(logits.new_empty(logits.shape[0], dtype=dtype) for _ in range(2))


@torch.library.custom_op(f"{NAMESPACE}::rpn_loss_rows_backward", mutates_args=())
def _rows_backward(
    grad_objectness: Tensor,
    grad_box: Tensor,
    logits: Tensor,
    deltas: Tensor,
    cells: Tensor,
    extents: list[int],
    strides: list[int],
    gt_boxes: Tensor,
    matched_idx: Tensor,
    index: Tensor,
    drawn: Tensor,
    positive: Tensor,
    box_beta: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of all anchors: [B, A] and [B, A, 4], zero but in the slots."""
    from .kernel import rpn_loss_backward_kernel

    grad_logits, grad_deltas = logits.new_zeros(logits.shape), deltas.new_zeros(deltas.shape)
    inputs, sizes = _arguments(logits, deltas, cells, extents, strides, gt_boxes, matched_idx, index, drawn, positive)
    slots = index.shape[1]
    block = min(next_power_of_2(slots), tile(128, 1 << 16))
    launch(
        rpn_loss_backward_kernel, (-(-slots // block), len(logits)), *inputs, grad_objectness, grad_box,
        grad_logits, grad_deltas, grad_objectness.stride(0), grad_box.stride(0), *sizes,
        BETA=box_beta, BLOCK=block, device=logits.device,
    )  # fmt: skip
    return grad_logits, grad_deltas


@_rows_backward.register_fake
def _(grad_objectness: Tensor, grad_box: Tensor, logits: Tensor, deltas: Tensor, *others) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape), deltas.new_empty(deltas.shape)


def _setup_context(ctx, inputs: tuple, output: tuple) -> None:  # noqa: ANN001
    logits, deltas, cells, ctx.extents, ctx.strides, *slots, ctx.box_beta = inputs
    ctx.save_for_backward(logits, deltas, cells, *slots)


def _autograd(ctx, grad_objectness: Tensor, grad_box: Tensor) -> tuple:  # noqa: ANN001
    logits, deltas, cells, *slots = ctx.saved_tensors
    grads = _rows_backward(
        grad_objectness, grad_box, logits, deltas, cells, ctx.extents, ctx.strides, *slots, ctx.box_beta
    )
    return *grads, *[None] * 9


_rows.register_autograd(_autograd, setup_context=_setup_context)
