"""The network, stage by stage: backbone, fpn, anchors, rpn, roi_heads, heads, mask_losses, detections."""

from .mask_rcnn import MaskRCNN

__all__ = ["MaskRCNN"]
