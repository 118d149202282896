"""Pairwise intersection over union of boxes, plain and generalised."""

from .op import box_iou, generalized_box_iou

__all__ = ["box_iou", "generalized_box_iou"]
