"""`nms` and `batched_nms`: torchvision's ops on boxes with scores, with results of a fixed shape."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import choose_backend
from ..checks import check_same_device, check_tensor
from .op import check_integers, check_threshold, nms_mask


def nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float, *, max_output: int | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """`torchvision.ops.nms` without waiting for the device: the indices of the kept boxes, and how many there are.

    Boxes are taken by falling score, ties by rising index, a NaN score first of all: torchvision's stable sort. What is
    kept is what its CPU op keeps; see `nms_mask` for where its CUDA op differs, and for the memory this takes.

    Args:
        boxes: [N, 4] xyxy in fp32, fp16 or bf16. Half types are widened, which is exact, as under autocast torchvision
            does. (It has no double here: a double box would have to be rounded.)
        scores: [N] in any floating dtype, compared in it.
        iou_threshold: compared as a double: the fp32 IoU must be above it.
        max_output: at most so many indices, those of the best boxes; by default N.
        backend: see `BACKENDS`. "torchvision" runs its op and pads what comes back, which waits for the device; so does
            the PyTorch reference, "auto" on a CPU.

    Returns:
        keep: int64 [max_output or N], best first; 0 beyond `count`, so that gathering by it is always safe where N > 0.
        count: int32 scalar on the same device, the number of indices that are meant.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device, a threshold that is no number, max_output below 1.
    """
    return _nms(boxes, scores, None, iou_threshold, max_output, backend)


def batched_nms(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor,
    iou_threshold: float,
    *,
    max_output: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`torchvision.ops.batched_nms`: `nms` in which boxes with different `idxs` do not suppress each other.

    The result is that of `nms` on each class, ordered by score. torchvision computes it so too for many boxes; for few
    it moves the classes apart by adding to coordinates, which rounds them: that can decide otherwise.

    Args:
        boxes, scores, iou_threshold, max_output, backend: as in `nms`; max_output counts all classes together.
        idxs: [N] integers, the class of each box.

    Returns:
        keep and count, as `nms` does.

    Raises:
        TypeError, ValueError: as `nms`.
    """
    check_integers(idxs, "idxs")
    return _nms(boxes, scores, idxs, iou_threshold, max_output, backend)


def _by_falling(scores: Tensor) -> Tensor:
    """Indices of the scores, largest first, NaN before all, ties in order: on every device also -0.0 and 0.0."""
    return torch.where(scores == 0, 0.0, scores).sort(descending=True, stable=True).indices


def _nms(
    boxes: Tensor, scores: Tensor, idxs: Tensor | None, threshold: float, max_output: int | None, backend: str
) -> tuple[Tensor, Tensor]:
    _check(boxes, scores, idxs, max_output)
    check_threshold(threshold, "iou_threshold")
    boxes, scores = boxes.detach().float(), scores.detach()
    size = len(boxes) if max_output is None else max_output
    backend = choose_backend(backend, boxes, "nms")
    if backend == "torchvision":
        return _torchvision(boxes, scores, idxs, float(threshold), size)
    order = _by_falling(scores)
    keep = nms_mask(
        boxes[order][None],
        torch.ones_like(order, dtype=torch.bool)[None],
        threshold,
        groups=None if idxs is None else idxs[order][None],
        backend=backend,
    )[0]
    return _compact(order, keep, size)


def _check(boxes: Tensor, scores: Tensor, idxs: Tensor | None, max_output: int | None) -> None:
    check_tensor(boxes, "boxes", 2, last=4)
    if boxes.dtype == torch.float64:
        raise TypeError("boxes must be float32, float16 or bfloat16, got torch.float64")
    check_tensor(scores, "scores", 1)
    of_each = {"scores": scores} if idxs is None else {"scores": scores, "idxs": idxs}
    for name, values in of_each.items():
        if values.shape != boxes.shape[:1]:
            raise ValueError(f"{name} must have shape [{len(boxes)}], got {tuple(values.shape)}")
    check_same_device(boxes=boxes, **of_each)
    if max_output is not None and (not isinstance(max_output, int) or max_output < 1):
        raise ValueError(f"max_output must be a positive integer or None, got {max_output!r}")


def _compact(order: Tensor, keep: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The kept of `order` [N] moved to the front, in a tensor of `size`; their number."""
    n = len(order)
    rank, count = keep.cumsum(0), keep.sum()
    # Every box has a place of its own, those that are not kept behind the others: no two are written to one.
    place = torch.where(keep, rank - 1, count + torch.arange(n, device=order.device) - rank)
    front = order.new_zeros(max(n, size)).scatter(0, place, order)[:size]
    count = count.clamp(max=size)
    return torch.where(torch.arange(size, device=order.device) < count, front, 0), count.int()


def _torchvision(
    boxes: Tensor, scores: Tensor, idxs: Tensor | None, threshold: float, size: int
) -> tuple[Tensor, Tensor]:
    from torchvision import ops

    if scores.dtype == torch.float64:  # it wants the boxes' dtype: their order, then
        order = _by_falling(scores)
        scores = boxes.new_empty(len(order)).scatter(0, order, -torch.arange(len(order), device=boxes.device).float())
    scores = scores.float()
    found = ops.nms(boxes, scores, threshold) if idxs is None else ops.batched_nms(boxes, scores, idxs, threshold)
    found = found[:size]
    keep = found.new_zeros(size)
    keep[: len(found)] = found
    return keep, torch.full((), len(found), dtype=torch.int32, device=boxes.device)
