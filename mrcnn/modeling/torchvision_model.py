"""torchvision's contract and weights for this project's model: for people who already have a torchvision Mask R-CNN."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from ..config import Config
from ..data.collate import targets_from_lists
from ..errors import ConfigError
from .mask_rcnn import IMAGE_MEAN, IMAGE_STD, MaskRCNN

# torchvision's parameter names (0.26 to 0.29) and ours.
_NAMES = (
    (r"^backbone\.body\.conv1\.", "backbone.stem.0."),
    (r"^backbone\.body\.bn1\.", "backbone.stem.1."),
    (r"^backbone\.body\.layer(\d)\.", lambda m: f"backbone.stages.{int(m[1]) - 1}."),
    (r"^backbone\.fpn\.inner_blocks\.", "fpn.lateral."),
    (r"^backbone\.fpn\.layer_blocks\.", "fpn.output."),
    (r"^rpn\.head\.conv\.(\d)\.", r"rpn.convs.\1."),
    (r"^rpn\.head\.cls_logits\.", "rpn.objectness."),
    (r"^rpn\.head\.bbox_pred\.", "rpn.deltas."),
    (r"^roi_heads\.box_head\.fc6\.", "box_head.fcs.0."),
    (r"^roi_heads\.box_head\.fc7\.", "box_head.fcs.1."),
    (r"^roi_heads\.box_head\.([0-3])\.", r"box_head.convs.\1."),  # v2: four convolutions, Flatten, Linear
    (r"^roi_heads\.box_head\.5\.", "box_head.fcs.0."),
    (r"^roi_heads\.box_predictor\.cls_score\.", "box_head.classes."),
    (r"^roi_heads\.box_predictor\.bbox_pred\.", "box_head.deltas."),
    (r"^roi_heads\.mask_head\.(\d)\.", r"mask_head.convs.\1."),
    (r"^roi_heads\.mask_predictor\.conv5_mask\.", "mask_head.deconv."),
    (r"^roi_heads\.mask_predictor\.mask_fcn_logits\.", "mask_head.logits."),
)


def from_torchvision(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The `state_dict()` of torchvision's `maskrcnn_resnet50_fpn` or `..._v2` under this project's names.

    (For its COCO_V1 weights torchvision also sets the eps of every frozen batch norm to 0.)

    Raises:
        ValueError: a name that those models do not have.
    """
    renamed = {}
    for name, value in state_dict.items():
        for pattern, replacement in _NAMES:
            new, found = re.subn(pattern, replacement, name)
            if found:
                renamed[new] = value
                break
        else:
            raise ValueError(
                f"{name} is not a name of torchvision's model; of an old file, load it into torchvision's model first "
                "and pass that model's state_dict()"
            )
    return renamed


def _check_targets(images: list[Tensor], targets: list[dict[str, Tensor]] | None) -> None:
    """What torchvision's models refuse, too. (An image at a time: its lists make the host wait anyway.)"""
    if targets is None:
        raise ValueError("targets must be given in training mode")
    if len(targets) != len(images):
        raise ValueError(f"{len(images)} images, but {len(targets)} targets")
    for number, target in enumerate(targets):
        boxes = target["boxes"]
        wrong = ~(boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        if wrong.any():
            raise ValueError(
                f"boxes must be x1, y1, x2, y2 with positive width and height; image {number} has "
                f"{boxes[wrong][0].tolist()}"
            )


class TorchvisionMaskRCNN(nn.Module):
    """`model(images, targets)` with lists, as torchvision's detection models take and return them.

    Images are floats in [0, 1], [3, h, w], of any sizes; targets hold boxes [n, 4], labels [n] and masks [n, h, w].
    Training returns the five losses under torchvision's names; evaluation a dictionary an image with boxes, labels,
    scores and masks [n, 1, h, w] (probabilities). Resizing and padding are torchvision's own transform.
    """

    LOSSES = {  # noqa: RUF012
        "loss_objectness": "loss_objectness",
        "loss_rpn_box": "loss_rpn_box_reg",
        "loss_class": "loss_classifier",
        "loss_box": "loss_box_reg",
        "loss_mask": "loss_mask",
    }

    def __init__(self, config: Config) -> None:
        super().__init__()
        if config.data.image_size == 0:
            raise ConfigError("torchvision's transform always resizes: data.image_size must be above 0")
        self.model = MaskRCNN(config.model)
        size = (config.data.image_size, config.data.max_size)
        self.transform = GeneralizedRCNNTransform(*size, list(IMAGE_MEAN), list(IMAGE_STD))

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> dict | list[dict]:
        """Losses in training mode, detections in evaluation mode.

        Raises:
            ValueError: no targets in training mode, or a box that is not finite or has no positive width and height.
        """
        if self.training:
            _check_targets(images, targets)
        original_sizes = [tuple(image.shape[-2:]) for image in images]
        batch, targets = self.transform(images, targets)
        sizes = torch.tensor(batch.image_sizes, device=batch.tensors.device)
        if self.training:
            losses = self.model(batch.tensors, sizes, targets_from_lists(targets))
            return {self.LOSSES[name]: value for name, value in losses.items()}
        results = [
            {"boxes": d.boxes, "labels": d.labels, "scores": d.scores, "masks": d.masks[:, None]}
            for d in self.model(batch.tensors, sizes).by_image()
        ]
        return self.transform.postprocess(results, batch.image_sizes, original_sizes)
