"""The network, stage by stage: backbone, fpn, rpn, proposals, heads, losses, detections."""

from .mask_rcnn import MaskRCNN

__all__ = ["MaskRCNN"]
