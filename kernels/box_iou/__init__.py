"""Pairwise intersection over union of boxes."""

from .op import box_iou

__all__ = ["box_iou"]
