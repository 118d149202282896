"""Greedy non-maximum suppression: of many groups of sorted boxes at once, and of boxes with scores."""

from .by_score import batched_nms, nms
from .op import nms_mask

__all__ = ["batched_nms", "nms", "nms_mask"]
