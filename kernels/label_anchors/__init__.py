"""Labels of anchors: positive, background or ignored, and the object that each is matched to."""

from .op import label_anchors, label_grid_anchors

__all__ = ["label_anchors", "label_grid_anchors"]
