"""Workloads small enough for a test of the harness itself."""

from bench.workloads import Sizes, Workload

TINY = {
    "roi_align": Sizes(2, (512, 672), rois=6, channels=3),
    "multiscale_roi_align": Sizes(2, (512, 672), rois=12, channels=3),
    "joint_multiscale_roi_align": Sizes(2, (512, 672), rois=9, mask_rois=4, channels=3),
    "box_iou": Sizes(2, (512, 672), rois=20, objects=4),
    "label_anchors": Sizes(3, (128, 160), objects=5, ragged=True),
    "mask_bce_loss": Sizes(0, (512, 672), masks=3, classes=5, mask_size=8),
}


def tiny(op):
    return Workload(op, "tiny", "cpu", TINY[op])
