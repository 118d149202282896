"""Resizing and augmentation, all of it from torchvision.transforms.v2."""

from __future__ import annotations

import torch
from torchvision.transforms import v2

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
        v2.SanitizeBoundingBoxes(),
    ]
    return v2.Compose(steps)
