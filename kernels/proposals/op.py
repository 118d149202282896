"""`stable_topk` and `decode_proposals`: argument checks, backends, and the kernels as torch.library ops."""

from __future__ import annotations

import torch
from torch import Tensor

from ..anchors import MOST_ANCHORS, AnchorGrid, kernel_arguments
from ..backend import choose_backend
from ..checks import check_indices, check_same_device, check_tensor
from ..runtime import NAMESPACE, launch, next_power_of_2, tile
from . import reference

MOST_VALUES = 1 << 30
"""Of a row of `stable_topk`: an index and the end of its block fit into 32 bits."""


def stable_topk(values: Tensor, k: int, *, backend: str = "auto") -> Tensor:
    """Where the k largest values of each row are, largest first; of equal values the first come first, everywhere.

    `torch.topk` leaves open which of equal values it takes: two devices, or two runs, can differ, and the scores of a
    network in bf16 are full of equal values. NaN counts as -inf, so that it is taken last, by its index among the -inf.

    With the Triton backend a kernel writes one int64 a value, in which the index breaks ties, and `torch.topk` chooses
    among them.

    Args:
        values: [B, N] in fp16, bf16 or fp32, at most 1,073,741,824 a row; any strides, so that a level may be a slice
            of a wider tensor.
        k: how many, at least 0.
        backend: see `BACKENDS`. "torchvision", which has no such op, is the reference: a stable sort.

    Returns:
        int64 [B, min(k, N)]. There is no gradient. Autocast changes nothing.

    Raises:
        TypeError, ValueError: wrong type, dtype or shape, or a negative k.
    """
    check_tensor(values, "values", 2)
    if values.dtype == torch.float64:
        raise TypeError("values must be float16, bfloat16 or float32, got torch.float64")
    if not k >= 0:
        raise ValueError(f"k must not be negative, got {k}")
    if values.shape[1] > MOST_VALUES:
        raise ValueError(f"at most {MOST_VALUES} values a row, got {values.shape[1]}")
    values, k = values.detach(), min(k, values.shape[1])
    if choose_backend(backend, values, "stable_topk") == "triton":
        return _keys(values).topk(k, dim=1).indices
    return reference.stable_topk(values, k)


def decode_proposals(
    logits: Tensor,
    deltas: Tensor,
    index: Tensor,
    anchors: Tensor | AnchorGrid,
    image_sizes: Tensor,
    min_size: float = 1e-3,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The boxes that a region proposal network's deltas make of some anchors, clipped to the image, and their scores.

    torchvision's BoxCoder with weights of 1, dw and dh limited to log(1000 / 16), then its `clip_boxes_to_image` and
    `remove_small_boxes`, in one launch, but nothing is removed: a box becomes zeros and its score -1 where it is not
    finite or is smaller than `min_size` on a side once clipped, where the score is NaN, and in an empty slot.

    Args:
        logits: [B, A] in fp16, bf16 or fp32, any strides.
        deltas: [B, A, 4] (dx, dy, dw, dh) in fp16, bf16 or fp32, any strides.
        index: int64 [B, n] of anchors; a negative one is an empty slot.
        anchors: [A, 4] fp32 xyxy, or the pyramid they are of, at most 16,777,216.
        image_sizes: [B, 2] int32 or int64, height and width of each image in pixels.
        min_size: in pixels.
        backend: see `BACKENDS`. "torchvision" computes as the reference does.

    Returns:
        boxes fp32 [B, n, 4] xyxy and scores fp32 [B, n], the logits' sigmoids. There is no gradient. Autocast changes
        nothing: computed in fp32. The backends agree but for the last bits of exp().

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device, too many anchors.
        IndexError: an index of A or more (CPU tensors; on a GPU it is an empty slot).
    """
    number = len(anchors) if isinstance(anchors, AnchorGrid) else len(check_tensor(anchors, "anchors", 2, last=4))
    cells = anchors.cells if isinstance(anchors, AnchorGrid) else anchors
    _check(logits, deltas, index, cells, number, image_sizes)
    logits, deltas, min_size = logits.detach(), deltas.detach(), float(min_size)
    if choose_backend(backend, logits, "decode_proposals") == "triton":
        grid = anchors if isinstance(anchors, AnchorGrid) else AnchorGrid.of(anchors.detach())
        return _decode(logits, deltas, index, *grid.flat(), image_sizes, min_size)
    anchors = anchors.anchors() if isinstance(anchors, AnchorGrid) else anchors.detach()
    return reference.decode_proposals(logits, deltas, index, anchors, image_sizes, min_size)


def _check(logits: Tensor, deltas: Tensor, index: Tensor, cells: Tensor, number: int, image_sizes: Tensor) -> None:
    check_tensor(logits, "logits", 2)
    check_tensor(deltas, "deltas", 3, last=4)
    for name, value in {"logits": logits, "deltas": deltas}.items():
        if value.dtype == torch.float64:
            raise TypeError(f"{name} must be float16, bfloat16 or float32, got torch.float64")
    if cells.dtype != torch.float32:
        raise TypeError(f"anchors must be float32, got {cells.dtype}")
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        raise TypeError("index must be an int64 tensor")
    if not isinstance(image_sizes, Tensor) or image_sizes.dtype not in (torch.int32, torch.int64):
        raise TypeError("image_sizes must be an int32 or int64 tensor")
    batch = len(logits)
    if index.ndim != 2:
        raise ValueError(f"index must have 2 dimensions, got shape {tuple(index.shape)}")
    shapes = {
        "logits": (logits, (batch, number)),
        "deltas": (deltas, (batch, number, 4)),
        "index": (index, (batch, index.shape[1])),
        "image_sizes": (image_sizes, (batch, 2)),
    }
    for name, (value, shape) in shapes.items():
        if value.shape != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {tuple(value.shape)}")
    if number > MOST_ANCHORS or (number == 0 and index.shape[1] > 0):
        raise ValueError(f"slots need anchors, and at most {MOST_ANCHORS} an image, got {number}")
    check_same_device(anchors=cells, logits=logits, deltas=deltas, index=index, image_sizes=image_sizes)
    check_indices(index.clamp(min=0), number, "index (negative ones aside)")


@torch.library.custom_op(f"{NAMESPACE}::topk_keys", mutates_args=())
def _keys(values: Tensor) -> Tensor:
    """A number for each value, none twice in a row, in the order of `stable_topk`: int64 [B, N]."""
    from .kernel import topk_keys_kernel

    keys = _keys_fake(values)
    batch, number = values.shape
    block = min(next_power_of_2(number), tile(1024, 1 << 16))
    launch(
        topk_keys_kernel, (batch * -(-number // block),), values, keys, number, *values.stride(),
        BLOCK=block, device=values.device,
    )  # fmt: skip
    return keys


@_keys.register_fake
def _keys_fake(values: Tensor) -> Tensor:
    return values.new_empty(values.shape, dtype=torch.int64)


@torch.library.custom_op(f"{NAMESPACE}::decode_proposals", mutates_args=())
def _decode(
    logits: Tensor,
    deltas: Tensor,
    index: Tensor,
    cells: Tensor,
    extents: list[int],
    strides: list[int],
    image_sizes: Tensor,
    min_size: float,
) -> tuple[Tensor, Tensor]:
    from .kernel import decode_proposals_kernel

    boxes, scores = _decode_fake(logits, deltas, index, cells, extents, strides, image_sizes, min_size)
    batch, number = index.shape
    block = min(next_power_of_2(number), tile(128, 1 << 16))
    launch(
        decode_proposals_kernel, (-(-number // block), batch), logits, deltas, index.contiguous(),
        image_sizes.contiguous(), boxes, scores, number, logits.shape[1], *logits.stride(), *deltas.stride(), min_size,
        *kernel_arguments(cells, extents, strides), BLOCK=block, device=logits.device,
    )  # fmt: skip
    return boxes, scores


@_decode.register_fake
def _decode_fake(
    logits: Tensor,
    deltas: Tensor,
    index: Tensor,
    cells: Tensor,
    extents: list[int],
    strides: list[int],
    image_sizes: Tensor,
    min_size: float,
) -> tuple[Tensor, Tensor]:
    options = {"dtype": torch.float32}
    return logits.new_empty(*index.shape, 4, **options), logits.new_empty(index.shape, **options)
