"""RoIAlign (He et al., Mask R-CNN, arXiv:1703.06870), on one feature map or on a feature pyramid."""

from .op import joint_multiscale_roi_align, multiscale_roi_align, roi_align

__all__ = ["joint_multiscale_roi_align", "multiscale_roi_align", "roi_align"]
