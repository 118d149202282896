"""Detection ops as Triton kernels, each beside its plain PyTorch reference.

    from kernels import joint_multiscale_roi_align, multiscale_roi_align, roi_align, use_backend
    from kernels import AnchorGrid, label_anchors, label_grid_anchors, rpn_loss, stable_topk, decode_proposals
    from kernels import batched_nms, nms, nms_mask, box_iou, generalized_box_iou
    from kernels import MaskPool, mask_targets, mask_bce_loss, mask_predictor_loss
    from kernels import mask_windows, paste_mask_crops, paste_masks

The folder has no imports from outside but torch (triton and torchvision where they are installed) and uses
relative imports only, so a project can copy it under another name. Every op takes
`backend="auto" | "triton" | "torch" | "torchvision"`; see `backend.py`.

Under `torch.autocast` every op gives, on every backend, the bits and the dtype that it gives without:

| op | takes | computes in | returns |
| --- | --- | --- | --- |
| the three RoIAligns | features of any floating dtype | fp32 coordinates and sums | their dtype |
| `box_iou`, `generalized_box_iou` | boxes of any floating dtype | fp32 | fp32 |
| `label_anchors`, `label_grid_anchors`, `nms_mask` | fp32 boxes: a half type is a TypeError | fp32 | integers; bool |
| `nms`, `batched_nms` | boxes of any floating dtype but fp64, scores of any | fp32 | integers |
| `mask_bce_loss` | logits of any floating dtype | fp32 | fp32 |
| `mask_predictor_loss` | features and weight of any floating dtypes | fp32 | fp32 |
| `mask_targets` | fp32 boxes | fp32 | fp32; bool |
| `rpn_loss` | logits and deltas of any floating dtype, fp32 boxes | fp32 | fp32 |
| `stable_topk` | values of any floating dtype but fp64 | fp32 | integers |
| `paste_masks`, `paste_mask_crops` | masks and boxes of any floating dtype but fp64 | fp32 | bool; fp32 |
| `decode_proposals` | logits and deltas of any floating dtype but fp64, fp32 anchors | fp32 | fp32 |

For fp64 inputs, where they are taken, fp64 stands for fp32.
"""

from .anchors import AnchorGrid
from .backend import BACKENDS, choose_backend, use_backend
from .box_iou import box_iou, generalized_box_iou
from .label_anchors import label_anchors, label_grid_anchors
from .mask_bce_loss import mask_bce_loss
from .mask_pool import MaskPool
from .mask_predictor_loss import mask_predictor_loss
from .mask_targets import mask_targets
from .nms import batched_nms, nms, nms_mask
from .paste_masks import mask_windows, paste_mask_crops, paste_masks
from .proposals import decode_proposals, stable_topk
from .roi_align import joint_multiscale_roi_align, multiscale_roi_align, roi_align
from .rpn_loss import rpn_loss
from .runtime import HAS_TRITON, INTERPRETED, launch_counts

__all__ = [
    "BACKENDS",
    "HAS_TRITON",
    "INTERPRETED",
    "AnchorGrid",
    "MaskPool",
    "batched_nms",
    "box_iou",
    "choose_backend",
    "decode_proposals",
    "generalized_box_iou",
    "joint_multiscale_roi_align",
    "label_anchors",
    "label_grid_anchors",
    "launch_counts",
    "mask_bce_loss",
    "mask_predictor_loss",
    "mask_targets",
    "mask_windows",
    "multiscale_roi_align",
    "nms",
    "nms_mask",
    "paste_mask_crops",
    "paste_masks",
    "roi_align",
    "rpn_loss",
    "stable_topk",
    "use_backend",
]
