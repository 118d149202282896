"""Workloads small enough for a test of the harness itself."""

from bench.workloads import Sizes, Workload

TINY = {
    "roi_align": Sizes(2, (512, 672), rois=6, channels=3),
    "multiscale_roi_align": Sizes(2, (512, 672), rois=12, channels=3),
    "joint_multiscale_roi_align": Sizes(2, (512, 672), rois=9, mask_rois=4, channels=3),
    "box_iou": Sizes(2, (512, 672), rois=20, objects=4),
    "label_grid_anchors": Sizes(3, (128, 160), objects=5, ragged=True),
    "label_anchors": Sizes(3, (128, 160), objects=5, ragged=True),
    "rpn_loss": Sizes(3, (128, 160), objects=5, ragged=True, slots=32),
    "stable_topk": Sizes(3, (128, 160), rois=20),
    "decode_proposals": Sizes(3, (128, 160), rois=20),
    "nms_mask": Sizes(2, (128, 160), rois=40, objects=3),
    "mask_predictor_loss": Sizes(0, (512, 672), masks=5, classes=5, mask_size=6, channels=9),
    "mask_targets": Sizes(3, (128, 160), rois=7, objects=3, ragged=True, mask_size=8),
    "paste_masks": Sizes(1, (128, 160), masks=4, objects=3, mask_size=8),
    "mask_bce_loss": Sizes(0, (512, 672), masks=3, classes=5, mask_size=8),
}


def tiny(op):
    return Workload(op, "tiny", "cpu", TINY[op])
