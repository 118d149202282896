"""`paste_masks`, `paste_mask_crops`: argument checks, backends, and the kernel as torch.library ops."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backend import choose_backend
from ..checks import check_same_device, check_tensor, pair
from ..runtime import NAMESPACE, launch, next_power_of_2, tile
from . import reference

MOST_PIXELS = 1 << 30
"""Of an image: a place in it fits into 32 bits. (A place in the output takes 64.)"""


class MaskCrops(NamedTuple):
    """Each mask's window of the image.

    pixels: [P] bool or fp32, the windows one after the other, each row by row.
    windows: [n, 4] int64 on the CPU: x, y, width, height.
    offsets: [n + 1] int64 on the CPU: where each window begins in pixels, and P.
    """

    pixels: Tensor
    windows: Tensor
    offsets: Tensor


def paste_masks(
    masks: Tensor,
    boxes: Tensor,
    image_size: int | tuple[int, int],
    threshold: float | None = 0.5,
    *,
    backend: str = "auto",
) -> Tensor:
    """The masks of boxes where they lie in the image, resized to their boxes: torchvision's `paste_masks_in_image`.

    That takes and gives a channel of 1 in second place, which is not here, and leaves the threshold to its caller. As
    there, a mask gets a border of zeros and its box grows by (M' + 2) / M' about its centre, is truncated to whole
    pixels, and takes the mask interpolated linearly (`align_corners=False`), cut off at the image. Beyond it: memory is
    the output's alone, without floats of the image's size before the threshold, and nothing waits for the device.
    A box that is wholly outside, of negative extent (-1 pixel and below), with NaN or inf, or with a corner 2**30
    pixels away gives an empty mask, where torchvision may raise an error.

    Args:
        masks: [n, M, M'] probabilities in fp16, bf16 or fp32; not empty but for n.
        boxes: [n, 4] xyxy in pixels in fp16, bf16 or fp32.
        image_size: height and width, at most 2**30 pixels.
        threshold: at least 0. A pixel is set where its value is above; compared in fp32. None: the values themselves.
        backend: see `BACKENDS`. On a CPU "auto" is the reference, which interpolates the boxes' own regions, a band of
            rows at a time. "torchvision" makes full-size floats, and computes in the inputs' types.

    Returns:
        [n, H, W] bool, or fp32 values for no threshold. There is no gradient. Computed in fp32, also for halves;
        autocast changes nothing. Triton's and the reference's are bit-equal.

    Raises:
        TypeError, ValueError: wrong type, dtype (fp64 too), shape or device, an image too large, a threshold below 0.
    """
    height, width = _check(masks, boxes, image_size, threshold)
    masks, boxes = masks.detach(), boxes.detach()
    backend = choose_backend(backend, masks, "paste_masks")
    run = {"triton": _paste, "torchvision": _torchvision, "torch": reference.paste_masks}[backend]
    if backend == "torch" and torch.compiler.is_compiling():
        run = _opaque_reference
    return run(masks, boxes, height, width, None if threshold is None else float(threshold))


def mask_windows(masks: Tensor, boxes: Tensor, image_size: int | tuple[int, int]) -> Tensor:
    """The part of the image that each of `paste_masks`'s masks can be anything but 0 in; arguments as there.

    Returns:
        int64 [n, 4] on the masks' device: x, y, width, height in pixels, inside the image; zeros where there is none.
    """
    size = _check(masks, boxes, image_size, None)
    return reference.windows(boxes.detach(), masks.shape[2], size)


def paste_mask_crops(
    masks: Tensor,
    boxes: Tensor,
    image_size: int | tuple[int, int],
    threshold: float | None = 0.5,
    *,
    windows: Tensor | None = None,
    backend: str = "auto",
) -> MaskCrops:
    """`paste_masks`, of each mask a window of the image instead of all of it: memory is that of the windows.

    The windows' sizes must be known on the host: without `windows` they are copied there, which waits for the device.
    It is the only wait; a caller who knows them, to paste a few at a time say, makes none.

    Args:
        masks, boxes, image_size, threshold, backend: as for `paste_masks`.
        windows: int64 [n, 4] on the CPU: x, y, width, height, inside the image. By default `mask_windows`: all that is
            not 0. Two masks may share one, and a mask may be pasted in parts.

    Returns:
        The pixels of the windows, bit-equal to those of `paste_masks`, and where they are. There is no gradient.

    Raises:
        TypeError, ValueError: as `paste_masks`; windows that are not int64 on the CPU, or not inside the image.
    """
    size = _check(masks, boxes, image_size, threshold)
    masks, boxes = masks.detach(), boxes.detach()
    if windows is None:
        windows = reference.windows(boxes, masks.shape[2], size).cpu()
    else:
        _check_windows(windows, len(masks), size)
    areas = windows[:, 2] * windows[:, 3]
    offsets = torch.cat([areas.new_zeros(1), areas.cumsum(0)])
    # From pageable memory, which is read before the call returns.
    there = [t.to(masks.device, non_blocking=True) for t in (windows, offsets[:-1])]
    places = *there, offsets[-1].item()
    threshold = None if threshold is None else float(threshold)
    backend = choose_backend(backend, masks, "paste_masks")
    if backend == "triton":
        pixels = _paste_crops(masks, boxes, *places, max(areas.tolist(), default=0), threshold)
    elif backend == "torch":
        pixels = reference.paste_mask_crops(masks, boxes, *places, threshold)
    else:
        pixels = _torchvision_crops(masks, boxes, size, windows, threshold)
    return MaskCrops(pixels, windows, offsets)


def _check(masks: Tensor, boxes: Tensor, image_size: int | tuple[int, int], threshold: float | None) -> tuple[int, int]:
    for name, value in {"masks": check_tensor(masks, "masks", 3), "boxes": check_tensor(boxes, "boxes", 2, 4)}.items():
        if value.dtype == torch.float64:
            raise TypeError(f"{name} must be float16, bfloat16 or float32, got torch.float64")
    if len(boxes) != len(masks):
        raise ValueError(f"boxes must have shape [{len(masks)}, 4], got {tuple(boxes.shape)}")
    if 0 in masks.shape[1:]:
        raise ValueError(f"masks must not be empty beyond the first dimension, got {tuple(masks.shape)}")
    check_same_device(masks=masks, boxes=boxes)
    height, width = pair(image_size, "image_size")
    if height * width > MOST_PIXELS:
        raise ValueError(f"an image of at most {MOST_PIXELS} pixels, got {height} x {width}")
    if threshold is not None:
        if not isinstance(threshold, (int, float)):
            raise TypeError(f"threshold must be a number or None, got {type(threshold).__name__}")
        if not threshold >= 0:  # written so that NaN fails; below 0, all that is outside would be above
            raise ValueError(f"threshold must be at least 0, got {threshold}")
    return height, width


def _check_windows(windows: Tensor, number: int, size: tuple[int, int]) -> None:
    if not isinstance(windows, Tensor) or windows.dtype != torch.int64 or windows.device.type != "cpu":
        raise TypeError("windows must be an int64 tensor on the CPU")
    if windows.shape != (number, 4):
        raise ValueError(f"windows must have shape [{number}, 4], got {tuple(windows.shape)}")
    first, extent = windows.split(2, dim=1)
    if (windows < 0).any() or (first > torch.tensor(size[::-1]) - extent).any():
        raise ValueError(f"windows must lie in the image of {size[0]} x {size[1]} pixels")


def _torchvision(masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float | None) -> Tensor:
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    values = paste_masks_in_image(masks[:, None], boxes, (height, width))[:, 0]
    return values.float() if threshold is None else values > threshold


def _torchvision_crops(
    masks: Tensor, boxes: Tensor, size: tuple[int, int], windows: Tensor, threshold: float | None
) -> Tensor:
    """One full-size mask at a time."""
    crops = [masks.new_empty(0, dtype=torch.float32 if threshold is None else torch.bool)]
    for mask, box, (x, y, width, height) in zip(masks, boxes, windows.tolist(), strict=True):
        pasted = _torchvision(mask[None], box[None], *size, threshold)[0]
        crops.append(pasted[y : y + height, x : x + width].flatten())
    return torch.cat(crops)


@torch.library.custom_op(f"{NAMESPACE}::paste_masks", mutates_args=())
def _paste(masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float | None) -> Tensor:
    out = _paste_fake(masks, boxes, height, width, threshold)
    # What stands for windows and their offsets is not read.
    _launch(masks, boxes, boxes, boxes, out, height, width, threshold, height * width, False)
    return out


@_paste.register_fake
def _paste_fake(masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float | None) -> Tensor:
    return masks.new_empty(masks.shape[0], height, width, dtype=torch.float32 if threshold is None else torch.bool)


@torch.library.custom_op(f"{NAMESPACE}::paste_mask_crops", mutates_args=())
def _paste_crops(
    masks: Tensor, boxes: Tensor, windows: Tensor, offsets: Tensor, total: int, largest: int, threshold: float | None
) -> Tensor:
    """[total]; windows and offsets on the masks' device, `largest` the area of the largest window."""
    out = _paste_crops_fake(masks, boxes, windows, offsets, total, largest, threshold)
    _launch(masks, boxes, windows.contiguous(), offsets.contiguous(), out, 0, 0, threshold, largest, True)
    return out


@_paste_crops.register_fake
def _paste_crops_fake(
    masks: Tensor, boxes: Tensor, windows: Tensor, offsets: Tensor, total: int, largest: int, threshold: float | None
) -> Tensor:
    return masks.new_empty(total, dtype=torch.float32 if threshold is None else torch.bool)


def _launch(
    masks: Tensor,
    boxes: Tensor,
    windows: Tensor,
    offsets: Tensor,
    out: Tensor,
    height: int,
    width: int,
    threshold: float | None,
    largest: int,
    crops: bool,
) -> None:
    from .kernel import paste_masks_kernel

    steps, block, part = _blocks(largest)
    programs = -(-(largest + 15) // (block * steps)) if largest else 0
    launch(
        paste_masks_kernel, (len(masks) * programs,), masks.contiguous(), boxes.contiguous(), windows, offsets,
        out if threshold is None else out.view(torch.uint8), height, width, threshold or 0.0, programs,
        ROWS=masks.shape[1], COLUMNS=masks.shape[2], FARTHEST=reference.FARTHEST, CROPS=crops,
        BINARY=threshold is not None, STEPS=steps, BLOCK=block, PART=part,
        num_warps=1, device=masks.device,
    )  # fmt: skip


def _blocks(largest: int) -> tuple[int, int, int]:
    """STEPS, BLOCK and PART for windows of up to so many pixels: a warp's 16 and 4 bytes a thread."""
    all_at_once = min(next_power_of_2(largest + 15), 1 << 16)
    return tile(16, 1), tile(512, all_at_once), tile(128, all_at_once)


@torch.library.custom_op(f"{NAMESPACE}::paste_masks_reference", mutates_args=())
def _opaque_reference(masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float | None) -> Tensor:
    """The reference for torch.compile, which cannot trace that it looks where the boxes lie."""
    return reference.paste_masks(masks, boxes, height, width, threshold)


_opaque_reference.register_fake(_paste_fake)
