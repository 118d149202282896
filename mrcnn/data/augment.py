"""Resizing and augmentation as in torchvision.transforms.v2, and nearly all of it from there."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from kernels.mask_pool import mask_extents

from ..errors import ConfigError

# Shorter sides 0.8 to 1 of the size asked for: the 640..800 of the usual multi-scale schedule at 800.
SCALES = (0.8, 0.84, 0.88, 0.92, 0.96, 1.0)


class _ShortestSize(v2.RandomShortestSize):
    """Resize the shorter side to one of the sizes; neither side of a very long image becomes 0 pixels.

    With one size it is v2.Resize without its demand that max_size be larger than the size.
    """

    def make_params(self, flat_inputs: list) -> dict:
        size = super().make_params(flat_inputs)["size"]
        return {"size": tuple(max(1, side) for side in size)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.Mask):
            return tv_tensors.wrap(resize_masks(inpt.as_subclass(Tensor), params["size"]), like=inpt)
        return super().transform(inpt, params)


class _Sanitize(v2.SanitizeBoundingBoxes):
    """v2.SanitizeBoundingBoxes without its copy of all masks where there is nothing to remove, as nearly always."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return inpt if params["valid"].all() else super().transform(inpt, params)


def resize_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks [n, h, w] on the CPU -> [n, *size] by nearest neighbours, pixel for pixel as torchvision's resize.

    It looks at the objects' own rectangles alone: of a mask most is background, which is 0 before and after.
    """
    if tuple(masks.shape[1:]) == tuple(size):
        return masks
    rows, columns = (_nearest(old, new) for old, new in zip(masks.shape[1:], size, strict=True))
    before = masks.numpy()
    resized = np.zeros((len(masks), *size), before.dtype)
    for mask, out, (x0, y0, x1, y1) in zip(before, resized, mask_extents(masks).tolist(), strict=True):
        left, right = np.searchsorted(columns, (x0, x1))
        top, bottom = np.searchsorted(rows, (y0, y1))
        columns_first = mask[y0:y1].take(columns[left:right], axis=1)  # of a picture that grows the fewer rows
        out[top:bottom, left:right] = columns_first.take(rows[top:bottom] - y0, axis=0)
    return torch.from_numpy(resized)


def _nearest(before: int, after: int) -> np.ndarray:
    """The places of `before` that `after` places take by nearest neighbours, as torch rounds them."""
    places = torch.arange(before, dtype=torch.float32)[None, None]
    return torch.nn.functional.interpolate(places, size=after, mode="nearest")[0, 0].long().numpy()


def resized_size(height: int, width: int, image_size: int, max_size: int) -> tuple[int, int]:
    """(height, width) of an image at the largest scale of `build_transform`, rounded as v2.RandomShortestSize does."""
    if not image_size:
        return height, width
    factor = min(image_size / min(height, width), max_size / max(height, width))
    return max(1, int(height * factor)), max(1, int(width * factor))


def build_transform(train: bool, image_size: int, max_size: int, augment: bool = True) -> v2.Transform:
    """Build the transform from a data set's (image, target) to what the model sees.

    Args:
        train: whether the sample is trained on; evaluation is only resized.
        image_size: length of the shorter side in pixels after resizing; 0 keeps the image's size.
        max_size: upper limit of the longer side in pixels; the shorter side gives way to it. Unused where
            image_size is 0.
        augment: in training, also flip horizontally, vary the scale and distort the colours a little.

    Returns:
        A callable (image, target) -> (image, target) that leaves out objects whose box has become smaller
        than a pixel, with their labels and masks. It draws from torch's global random state, which a
        DataLoader seeds per worker.

    Raises:
        ConfigError: a negative image_size, or a max_size below image_size.
    """
    if image_size < 0 or (image_size and max_size < image_size):
        raise ConfigError(f"need 0 <= image_size <= max_size, got image_size {image_size}, max_size {max_size}.")
    steps: list[torch.nn.Module] = []
    if train and augment:
        steps += [
            v2.RandomHorizontalFlip(0.5),
            v2.RandomApply([v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2)], 0.5),
        ]
    if image_size:
        scales = SCALES if train and augment else (1.0,)
        sizes = [max(1, round(image_size * scale)) for scale in scales]
        steps.append(_ShortestSize(sizes, max_size=max_size, antialias=True))
    # Rounding can leave a box a fraction of a pixel outside; sanitizing would then remove the object.
    steps += [
        v2.ClampBoundingBoxes(),
        _Sanitize(),
    ]
    return v2.Compose(steps)
