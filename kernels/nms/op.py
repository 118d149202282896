"""`nms_mask`: argument checks, backends, and the kernels as a torch.library op."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import choose_backend
from ..checks import check_same_device, check_tensor
from ..runtime import NAMESPACE, launch, tile
from . import reference

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def nms_mask(
    boxes: Tensor, valid: Tensor, threshold: float, *, groups: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Which boxes greedy NMS keeps, for G groups of n boxes, each sorted best first.

    A box is suppressed by a kept, better box of its group with an IoU above `threshold`. The result is that of
    `torchvision.ops.nms` on a CPU for every group. (The oracle is its CPU op: it compares the fp32 IoU with the
    threshold as a double. Its CUDA op compares with a float, and its compiler fuses multiply-adds: it can differ where
    an IoU equals the threshold to the last bits.) IoU 0/0 and boxes with NaN suppress nothing and are not suppressed.

    The Triton kernels never wait for the host. They take n * n / 8 bytes of memory a group (n rounded up to 512 in one
    factor), as torchvision's CUDA op does. Autocast changes nothing: fp32 in, fp32 computed.

    Args:
        boxes: [G, n, 4] fp32 xyxy, best first.
        valid: [G, n] bool; the other boxes neither suppress nor are kept, whatever they hold.
        threshold: IoU, compared in the precision given here: the fp32 IoU must be above the double.
        groups: [G, n] integers, classes say: boxes with different ones do not suppress each other. By default, all do.
        backend: see `BACKENDS`. "torchvision" is its op on one group (and one class) after the other, and "auto" on a
            CPU: the PyTorch reference compares all pairs, whatever their class.

    Returns:
        [G, n] bool. There is no gradient.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device, a threshold that is no number.
    """
    _check(boxes, valid, groups)
    check_threshold(threshold, "threshold")
    backend = choose_backend(backend, boxes, "nms", on_cpu="torchvision")
    if backend == "triton":
        return _nms(boxes, valid, float(threshold), groups)
    if torch.compiler.is_compiling():
        return _opaque(boxes, valid, float(threshold), groups, backend)
    return _OTHERS[backend](boxes, valid, float(threshold), groups)


def _check(boxes: Tensor, valid: Tensor, groups: Tensor | None) -> None:
    check_tensor(boxes, "boxes", 3, last=4)
    if boxes.dtype != torch.float32:
        raise TypeError(f"boxes must be float32, got {boxes.dtype}")
    if not isinstance(valid, Tensor) or valid.dtype != torch.bool:
        raise TypeError("valid must be a bool tensor")
    if valid.shape != boxes.shape[:2]:
        raise ValueError(f"valid must have shape {list(boxes.shape[:2])}, got {tuple(valid.shape)}")
    if groups is None:
        check_same_device(boxes=boxes, valid=valid)
        return
    check_integers(groups, "groups")
    if groups.shape != valid.shape:
        raise ValueError(f"groups must have shape {list(valid.shape)}, got {tuple(groups.shape)}")
    check_same_device(boxes=boxes, valid=valid, groups=groups)


def check_threshold(threshold: object, name: str) -> None:
    """Raise TypeError or ValueError for an IoU threshold that is no number."""
    if not isinstance(threshold, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(threshold).__name__}")
    if threshold != threshold:
        raise ValueError(f"{name} must not be NaN")


def check_integers(ids: object, name: str) -> None:
    """Raise TypeError unless `ids` is a tensor of integers."""
    if not isinstance(ids, Tensor) or ids.dtype not in INTEGERS:
        raise TypeError(f"{name} must be an integer tensor")


def _torchvision(boxes: Tensor, valid: Tensor, threshold: float, groups: Tensor | None) -> Tensor:
    from torchvision.ops import nms

    keep = torch.zeros_like(valid)
    for i in range(len(boxes)):
        classes = valid[i].long() if groups is None else groups[i]
        for one in classes[valid[i]].unique():
            index = (valid[i] & (classes == one)).nonzero().squeeze(1)
            falling = torch.arange(len(index), 0, -1, device=boxes.device, dtype=boxes.dtype)
            keep[i, index[nms(boxes[i, index], falling, threshold)]] = True
    return keep


@torch.library.custom_op(f"{NAMESPACE}::nms_mask", mutates_args=())
def _nms(boxes: Tensor, valid: Tensor, threshold: float, groups: Tensor | None = None) -> Tensor:
    from .kernel import nms_sweep_kernel, nms_words_kernel

    number, n = valid.shape
    keep = boxes.new_empty(number, n, dtype=torch.bool)
    stride = -(-n // 512) * 16  # words a row, in whole 64 bytes: rows are read 16 bytes at a time
    words = boxes.new_empty(number, n, stride, dtype=torch.int32)
    flags = valid.contiguous().view(torch.uint8)
    rows, columns = tile(32, 128), tile(8, 4)
    tiles = -(-n // rows) * -(-n // (32 * columns))
    launch(
        nms_words_kernel, (number * tiles,), boxes.contiguous(), flags,
        flags if groups is None else groups.contiguous(), words, n, stride,
        reference.round_down(threshold), *reference.screen(threshold), GROUPED=groups is not None,
        BLOCK_ROWS=rows, BLOCK_WORDS=columns, STEP=tile(1, 64), num_warps=1, device=boxes.device,
    )  # fmt: skip
    launch(
        nms_sweep_kernel, (number if n else 0,), words, flags, keep.view(torch.uint8), n, stride,
        WORDS=tile(64, 4), BLOCK_ROWS=tile(128, 64), num_warps=4, device=boxes.device,
    )  # fmt: skip
    return keep


@_nms.register_fake
def _nms_fake(boxes: Tensor, valid: Tensor, threshold: float, groups: Tensor | None = None) -> Tensor:
    return boxes.new_empty(valid.shape, dtype=torch.bool)


@torch.library.custom_op(f"{NAMESPACE}::nms_mask_waiting", mutates_args=())
def _opaque(boxes: Tensor, valid: Tensor, threshold: float, groups: Tensor | None, backend: str) -> Tensor:
    """The other two for torch.compile, which cannot trace that they look at values."""
    return _OTHERS[backend](boxes, valid, threshold, groups)


@_opaque.register_fake
def _opaque_fake(boxes: Tensor, valid: Tensor, threshold: float, groups: Tensor | None, backend: str) -> Tensor:
    return _nms_fake(boxes, valid, threshold, groups)


_OTHERS = {"torchvision": _torchvision, "torch": reference.nms_mask}
