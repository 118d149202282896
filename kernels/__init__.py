"""Detection ops as Triton kernels, each beside its plain PyTorch reference.

    from kernels import roi_align, multiscale_roi_align, box_iou, label_anchors, mask_bce_loss, use_backend

The folder has no imports from outside but torch (triton and torchvision where they are installed) and uses
relative imports only, so a project can copy it under another name. Every op takes
`backend="auto" | "triton" | "torch" | "torchvision"`; see `backend.py`.
"""

from .backend import BACKENDS, choose_backend, use_backend
from .box_iou import box_iou
from .label_anchors import label_anchors
from .mask_bce_loss import mask_bce_loss
from .roi_align import multiscale_roi_align, roi_align
from .runtime import HAS_TRITON, INTERPRETED, launch_counts

__all__ = [
    "BACKENDS",
    "HAS_TRITON",
    "INTERPRETED",
    "box_iou",
    "choose_backend",
    "label_anchors",
    "launch_counts",
    "mask_bce_loss",
    "multiscale_roi_align",
    "roi_align",
    "use_backend",
]
