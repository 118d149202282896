"""The sentences below the table."""

from __future__ import annotations

from ..config import ModelConfig

FLOPS = (
    "FLOPs: of the batch's forward pass, a multiply-add counted as 2: convolutions and matrix products. Not counted: "
    "RoIAlign, mask targets, the one mask channel of a RoI in training with model.mask_loss=bce, normalisation, "
    "activations, upsampling, sorting, NMS, sums."
)
ANCHORS = (
    "Anchors: used by a stage that makes them, that has an output for each of them, or that takes one of these "
    "tensors. The box head and the mask head do not: they work on RoIs."
)
DETECTIONS = (
    "Detections: model.max_detections slots an image, or as many as there can be. How many of them it fills depends on "
    "the image (count); the mask head computes all."
)
CHANNELS = {
    "bce": "each a binary classifier of its pixels (sigmoid). Computed and supervised: that of the RoI's class alone.",
    "softmax": "those of the {classes} classes compete for each pixel (softmax). Supervised: the channel of the RoI's "
    "class alone, by the pixels inside its object.",
    "canvas": "which compete for each pixel (softmax), the background's too. Supervised: all of them, by the one class "
    "that each pixel of the RoI shows.",
}


def write_notes(config: ModelConfig, training: bool) -> list[str]:
    """What the numbers mean, and how the mask head is supervised."""
    channels = CHANNELS[config.mask_loss].format(classes=config.num_classes - 1)
    head = f"Mask head (model.mask_loss={config.mask_loss}): {config.num_classes} channels a RoI, {channels}"
    return [ANCHORS, head, *([] if training else [DETECTIONS]), FLOPS]
