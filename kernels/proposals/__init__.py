"""Proposals before NMS: the best anchors of a level, and the boxes that their deltas make of them."""

from .op import decode_proposals, stable_topk

__all__ = ["decode_proposals", "stable_topk"]
