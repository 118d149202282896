"""Anchor labelling for the RPN: which anchors are objects, which background, which neither."""

from .op import label_anchors

__all__ = ["label_anchors"]
