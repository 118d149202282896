"""Greedy non-maximum suppression of many groups of boxes at once."""

from .op import nms_mask

__all__ = ["nms_mask"]
