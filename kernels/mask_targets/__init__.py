"""Mask targets: each RoI's object, cropped and resized from the pool of bitmaps."""

from .op import mask_targets

__all__ = ["mask_targets"]
