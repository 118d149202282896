"""`mask_targets`: argument checks, backends, and the kernel as a torch.library op."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import choose_backend
from ..checks import check_indices, check_same_device, check_tensor
from ..mask_pool import MaskPool
from ..runtime import NAMESPACE, launch
from . import reference

STYLES = ("torchvision", "detectron2")
BINS, CELLS = 32, 16  # of a tile, and of the tables of weights


def mask_targets(
    mask_pool: MaskPool,
    boxes: Tensor,
    matched_idx: Tensor,
    size: int,
    style: str = "torchvision",
    *,
    backend: str = "auto",
) -> Tensor:
    """What a mask head is to learn: the mask of each RoI's object, cropped to the RoI and resized (arXiv:1703.06870).

    Both styles are RoIAlign of the object's bitmap with an adaptive number of samples, ceil(extent / size), clamped at
    the border of the object's own image:

    - "torchvision": its `project_masks_on_boxes`, not aligned, soft.
    - "detectron2": its `BitMasks.crop_and_resize`, aligned, thresholded at 0.5.

    The Triton kernel reads bits or bytes of the objects' own rectangles; no mask is ever formed at the image's size.
    It computes the samples' places bit for bit as torchvision does on a CPU, and adds what they weigh in another order.

    Args:
        mask_pool: bitmaps of B images with G slots each.
        boxes: [B, S, 4] fp32 or fp64 xyxy in pixels. One that is not finite, or longer than four times the image, gives
            zeros.
        matched_idx: [B, S] int32 or int64, each box's object in its image.
        size: M, height and width of a target.
        style: of `STYLES`.
        backend: see `BACKENDS`. On a CPU "auto" is torchvision's op, on masks of the image's size, a few at a time.

    Returns:
        [B, S, M, M] in [0, 1] (up to rounding) of the boxes' dtype; bool for detectron2's. No gradient flows.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape, device, size or style.
        IndexError: an object of G or more, or below 0 (CPU tensors; the Triton kernel gives zeros).
    """
    _check(mask_pool, boxes, matched_idx, size, style)
    backend = choose_backend(backend, boxes, "mask_targets", on_cpu="torchvision")
    return _targets(*mask_pool.flat(), boxes.detach(), matched_idx, size, style == "detectron2", backend)


def _check(mask_pool: MaskPool, boxes: Tensor, matched_idx: Tensor, size: int, style: str) -> None:
    if not isinstance(mask_pool, MaskPool):
        raise TypeError(f"mask_pool must be a MaskPool, got {type(mask_pool).__name__}")
    check_tensor(boxes, "boxes", 3, last=4)
    if boxes.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"boxes must be float32 or float64, got {boxes.dtype}")
    if not isinstance(matched_idx, Tensor) or matched_idx.dtype not in (torch.int32, torch.int64):
        found = getattr(matched_idx, "dtype", type(matched_idx).__name__)
        raise TypeError(f"matched_idx must be an int32 or int64 tensor, got {found}")
    images, slots = mask_pool.offset.shape
    if len(boxes) != images:
        raise ValueError(f"boxes must be those of the pool's {images} images, got shape {tuple(boxes.shape)}")
    if matched_idx.shape != boxes.shape[:2]:
        raise ValueError(f"matched_idx must have shape {list(boxes.shape[:2])}, got {tuple(matched_idx.shape)}")
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"size must be a positive integer, got {size!r}")
    if style not in STYLES:
        raise ValueError(f"unknown style {style!r}; choose one of {', '.join(STYLES)}")
    check_same_device(mask_pool=mask_pool.bitmaps, boxes=boxes, matched_idx=matched_idx)
    check_indices(matched_idx, slots, "matched_idx")


# The other backends, too, are an operator: they look at values, and work in chunks, which torch.compile would unroll.
@torch.library.custom_op(f"{NAMESPACE}::mask_targets", mutates_args=())
def _targets(
    bitmaps: Tensor,
    offset: Tensor,
    extent: Tensor,
    sizes: Tensor,
    padded_size: list[int],
    packed: bool,
    boxes: Tensor,
    matched_idx: Tensor,
    size: int,
    aligned: bool,
    backend: str,
) -> Tensor:
    pool = MaskPool(bitmaps, offset, extent, sizes, tuple(padded_size), packed)
    if backend == "triton":
        return _triton(pool, boxes, matched_idx, size, aligned)
    function = reference.torchvision_way if backend == "torchvision" else reference.mask_targets
    with torch.autocast(boxes.device.type, enabled=False):  # or products would be rounded to bf16
        soft = function(pool, boxes, matched_idx, size, aligned)
    return soft >= 0.5 if aligned else soft


@_targets.register_fake
def _targets_fake(bitmaps, offset, extent, sizes, padded_size, packed, boxes, matched_idx, size, aligned, backend):  # noqa: ANN001
    return _empty(boxes, size, aligned)


def _empty(boxes: Tensor, size: int, aligned: bool) -> Tensor:
    return boxes.new_empty(*boxes.shape[:2], size, size, dtype=torch.bool if aligned else boxes.dtype)


def _triton(pool: MaskPool, boxes: Tensor, matched_idx: Tensor, size: int, aligned: bool) -> Tensor:
    from .kernel import mask_targets_kernel

    out, rois, tiles = _empty(boxes, size, aligned), boxes.shape[1], (-(-size // BINS)) ** 2
    table = boxes.new_empty(len(boxes) * rois * tiles * 2 * CELLS * BINS)
    launch(
        mask_targets_kernel, (len(boxes) * rois, tiles), pool.bitmaps, pool.offset.contiguous(),
        pool.extent.contiguous(), pool.sizes.contiguous(), boxes.contiguous(), matched_idx.contiguous(), table,
        out.view(torch.uint8) if aligned else out, rois, pool.offset.shape[1],
        SIZE=size, ALIGNED=aligned, PACKED=pool.packed, CELLS=CELLS, BINS=BINS, device=boxes.device,
    )  # fmt: skip
    return out
