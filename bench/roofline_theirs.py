"""The same counts for torchvision's maskrcnn_resnet50_fpn, for scale: of what can be traced, counted and not measured.

Its whole model asks for values (which anchors, which proposals), so that no run on tensors without values gets through
it. Here are its backbone with pyramid, RPN head, box head and mask head, on as many RoIs as our step has, and the
optimizer. Not here, which flatters it: RoIAlign, anchors, sampling, proposals, NMS, losses, and the host's time: its
eager operators are launched one by one, at more than 2 us each.

What differs from ours by the trace itself: frozen batch norm by fp32 constants, which promotes the maps of bf16
autocast to fp32 and is separate operators; all K channels of the mask predictor; thin products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models import resnet50
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops import FrozenBatchNorm2d

from mrcnn.config import Config

from .roofline_trace import Trace, trace_ops

if TYPE_CHECKING:
    from .roofline import Prediction, Rates, Row

_STAGE_OF = {
    "backbone.body.conv1": "stem", "backbone.body.bn1": "stem", "backbone.body.relu": "stem",
    "backbone.body.maxpool": "stem", **{f"backbone.body.layer{i}": f"C{i + 1}" for i in range(1, 5)},
    "backbone.fpn": "FPN", "rpn": "RPN", "roi_heads.box": "box head", "roi_heads.mask": "mask head",
}  # fmt: skip


def predict_theirs(
    config: Config, size: tuple[int, int], batch: int, rates: Rates, extra: Sequence[Row]
) -> Prediction | None:
    """None for configurations that are not this model with other numbers."""
    from .roofline import predict

    model = config.model
    same = ("resnet50", "frozen_bn", 2, 256, "none", 0, 2, 1, 4, "none")
    named = ("backbone", "norm", "frozen_stages", "fpn_channels", "fpn_norm", "box_conv_layers", "box_fc_layers",
             "rpn_layers", "mask_layers", "head_norm")  # fmt: skip
    if tuple(getattr(model, name) for name in named) != same:
        return None
    positives = int(model.roi_samples * model.roi_positive_fraction)
    trace = _trace(size, batch, batch * model.roi_samples, batch * positives, model.num_classes)
    return predict(trace, stage_of, rates, {}, extra, batch)


def stage_of(layer: str) -> str:
    """Of a module of torchvision's model."""
    return next((stage for name, stage in _STAGE_OF.items() if layer.startswith(name)), "sampling, losses")


def _trace(size: tuple[int, int], batch: int, rois: int, positives: int, classes: int) -> Trace:
    from .roofline import channels_last

    with FakeTensorMode():
        body = resnet50(norm_layer=FrozenBatchNorm2d)
        model = channels_last(MaskRCNN(_resnet_fpn_extractor(body, 3), classes)).train()
        images, boxes, masks = (
            torch.zeros(*shape).contiguous(memory_format=torch.channels_last)
            for shape in ((batch, 3, *size), (rois, 256, 7, 7), (positives, 256, 14, 14))
        )
        heads = model.roi_heads
        with trace_ops(model) as trace:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                maps = list(model.backbone(images).values())
                logits, deltas = model.rpn.head(maps)
                # The heads' inputs are the maps' in part: their gradient goes on to RoIAlign's.
                pooled, pooled_masks = (x.requires_grad_() for x in (boxes.to(maps[0].dtype), masks.to(maps[0].dtype)))
                found = heads.box_predictor(heads.box_head(pooled))
                shown = heads.mask_predictor(heads.mask_head(pooled_masks))
            torch.autograd.backward(*_seeded([*logits, *deltas, *found, shown]))
    return trace


def _seeded(outputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients as a loss would hand them on: not counted themselves."""
    return outputs, [torch.empty_like(out) for out in outputs]
