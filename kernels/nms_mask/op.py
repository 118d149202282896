"""`nms_mask`: argument checks, backends, and the kernel as a torch.library op."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import choose_backend
from ..checks import check_same_device, check_tensor
from ..runtime import NAMESPACE, launch, next_power_of_2
from . import reference

MAX_BOXES = 4096
"""Boxes a group that the Triton kernel takes: more do not fit into the registers of one program."""


def nms_mask(boxes: Tensor, valid: Tensor, threshold: float, *, backend: str = "auto") -> Tensor:
    """Which boxes greedy NMS keeps, for G groups of n boxes, each sorted best first.

    A box is suppressed by a kept, better box of its group with an IoU above `threshold`. The result is that of
    `torchvision.ops.nms` on a CPU for every group (its CUDA op rounds the threshold and fuses multiply-adds: it can
    differ where an IoU equals the threshold to the last bits). IoU 0/0 and boxes with NaN suppress nothing and are
    not suppressed.

    The Triton kernel forms no [n, n] matrix and never waits for the host. Autocast changes nothing: fp32 in, fp32
    computed.

    Args:
        boxes: [G, n, 4] fp32 xyxy, best first.
        valid: [G, n] bool; the other boxes neither suppress nor are kept, whatever they hold.
        threshold: IoU, compared in the precision given here: the fp32 IoU must be above the double.
        backend: see `BACKENDS`; "triton" takes at most 4096 boxes a group. "auto" is the PyTorch reference on a CPU and
            for more boxes than that. "torchvision" is its op on one group after the other.

    Returns:
        [G, n] bool. There is no gradient.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device, a threshold that is no number, too many boxes.
    """
    check_tensor(boxes, "boxes", 3, last=4)
    if boxes.dtype != torch.float32:
        raise TypeError(f"boxes must be float32, got {boxes.dtype}")
    if not isinstance(valid, Tensor) or valid.dtype != torch.bool:
        raise TypeError("valid must be a bool tensor")
    if valid.shape != boxes.shape[:2]:
        raise ValueError(f"valid must have shape {list(boxes.shape[:2])}, got {tuple(valid.shape)}")
    check_same_device(boxes=boxes, valid=valid)
    if not isinstance(threshold, (int, float)):
        raise TypeError(f"threshold must be a number, got {type(threshold).__name__}")
    if threshold != threshold:
        raise ValueError("threshold must not be NaN")

    backend = choose_backend(backend, boxes, on_gpu="triton" if boxes.shape[1] <= MAX_BOXES else "torch")
    if backend == "triton":
        if boxes.shape[1] > MAX_BOXES:
            raise ValueError(
                f"backend='triton' takes at most {MAX_BOXES} boxes a group, got {boxes.shape[1]}; use backend='torch'"
            )
        return _nms(boxes, valid, float(threshold))
    if backend == "torchvision":
        return _torchvision(boxes, valid, float(threshold))
    if torch.compiler.is_compiling():
        return _opaque_reference(boxes, valid, float(threshold))
    return reference.nms_mask(boxes, valid, float(threshold))


def _torchvision(boxes: Tensor, valid: Tensor, threshold: float) -> Tensor:
    from torchvision.ops import nms

    keep = torch.zeros_like(valid)
    for group, real, kept in zip(boxes, valid, keep, strict=True):
        index = real.nonzero().squeeze(1)
        falling = torch.arange(len(index), 0, -1, device=boxes.device, dtype=boxes.dtype)
        kept[index[nms(group[index], falling, threshold)]] = True
    return keep


def _warps(block: int) -> int:
    """Eight boxes a thread: fewer threads would spill registers, more would wait longer for each other."""
    return min(max(block // 256, 1), 16)


@torch.library.custom_op(f"{NAMESPACE}::nms_mask", mutates_args=())
def _nms(boxes: Tensor, valid: Tensor, threshold: float) -> Tensor:
    from .kernel import nms_mask_kernel

    groups, n = valid.shape
    keep = boxes.new_empty(groups, n, dtype=torch.bool)
    block = next_power_of_2(n)
    launch(
        nms_mask_kernel, (groups if n else 0,), boxes.contiguous(), valid.contiguous().view(torch.uint8),
        keep.view(torch.uint8), n, reference.round_down(threshold),
        BLOCK=block, num_warps=_warps(block), device=boxes.device,
    )  # fmt: skip
    return keep


@_nms.register_fake
def _nms_fake(boxes: Tensor, valid: Tensor, threshold: float) -> Tensor:
    return boxes.new_empty(valid.shape, dtype=torch.bool)


@torch.library.custom_op(f"{NAMESPACE}::nms_mask_reference", mutates_args=())
def _opaque_reference(boxes: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """The reference for torch.compile, which cannot trace that it looks whether it is done."""
    return reference.nms_mask(boxes, valid, threshold)


_opaque_reference.register_fake(_nms_fake)
