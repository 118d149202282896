"""Masks of boxes pasted where they lie in the image: whole images, or each mask's own window of it."""

from .op import MaskCrops, mask_windows, paste_mask_crops, paste_masks

__all__ = ["MaskCrops", "mask_windows", "paste_mask_crops", "paste_masks"]
