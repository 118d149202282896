"""torchvision's Mask R-CNN with its own code, in the layout, dtype and mode that a provider names.

Its inputs are on the device already: a list of float images, a list of target dictionaries with dense masks. Its
transform normalises and batches, but does not resize: the images have the size that it would give them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torchvision.models import resnet
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FrozenBatchNorm2d

from mrcnn.config import ModelConfig

from .workload import Workload, keep_computed

Phase = Callable[[str], AbstractContextManager]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LOGIT_STD = 2.5  # of class logits at inference: a few classes of a box are above the score threshold
OUR_NAMES = {
    "loss_objectness": "loss_objectness",
    "loss_rpn_box_reg": "loss_rpn_box",
    "loss_classifier": "loss_class",
    "loss_box_reg": "loss_box",
    "loss_mask": "loss_mask",
}


def build_torchvision(config: ModelConfig, size: tuple[int, int]) -> MaskRCNN:
    """torchvision's model of that configuration, frozen batch norm and frozen stages included.

    With the defaults it is `maskrcnn_resnet50_fpn` with `trainable_backbone_layers=3`.
    """
    hidden = config.fpn_channels
    model = MaskRCNN(
        _backbone(config),
        min_size=min(size),
        max_size=max(size),
        rpn_anchor_generator=AnchorGenerator(
            tuple((side,) for side in config.anchor_sizes), (config.aspect_ratios,) * len(config.anchor_sizes)
        ),
        rpn_pre_nms_top_n_train=config.pre_nms_top_n[0],
        rpn_pre_nms_top_n_test=config.pre_nms_top_n[1],
        rpn_post_nms_top_n_train=config.post_nms_top_n[0],
        rpn_post_nms_top_n_test=config.post_nms_top_n[1],
        box_batch_size_per_image=config.roi_samples,
        box_detections_per_img=config.max_detections,
        box_head=TwoMLPHead(hidden * config.box_pool_size**2, config.box_channels),
        box_predictor=FastRCNNPredictor(config.box_channels, config.num_classes),
        mask_head=MaskRCNNHeads(hidden, (config.mask_channels,) * config.mask_layers, 1),
        mask_predictor=MaskRCNNPredictor(config.mask_channels, config.mask_channels, config.num_classes),
    )
    model.transform.resize = lambda image, target=None: (image, target)
    return model


def _backbone(config: ModelConfig) -> BackboneWithFPN:
    """As torchvision's resnet_fpn_backbone, for a pyramid of any width."""
    net = getattr(resnet, config.backbone)(weights=None, norm_layer=FrozenBatchNorm2d)
    layers = ["conv1", "layer1", "layer2", "layer3", "layer4"]
    for name in layers[: config.frozen_stages]:
        net.get_submodule(name).requires_grad_(False)
    channels = [net.fc.in_features // 2**i for i in (3, 2, 1, 0)]
    return BackboneWithFPN(net, {f"layer{i + 1}": str(i) for i in range(4)}, channels, config.fpn_channels)


def give_proposals(model: MaskRCNN, proposals: Tensor, use_computed: Tensor) -> None:
    """Let the model train on `proposals` [B, N, 4] beside computing its own; see `keep_computed`."""
    compute = model.rpn.filter_proposals

    def filter_proposals(*arguments: object) -> tuple[list[Tensor], list[Tensor]]:
        boxes, scores = compute(*arguments)
        if not model.training:
            return boxes, scores
        return [keep_computed(g, b, use_computed) for g, b in zip(proposals, boxes, strict=True)], scores

    model.rpn.filter_proposals = filter_proposals


class TorchvisionStep:
    """One optimizer step a call: autocast to a half type, GradScaler for fp16, fused SGD."""

    def __init__(self, workload: Workload, phase: Phase, layout: str, dtype: str, compiled: bool) -> None:
        self.phase, self.dtype, self.device_type = phase, DTYPES[dtype], workload.device.type
        self.model = load(workload, layout).train()
        give_proposals(self.model, workload.proposals, workload.use_computed)
        self.images, self.targets = workload.float_images(), workload.target_dicts()
        shape = self.model.transform(self.images)[0].tensors.shape
        assert shape[-2:] == workload.setting.size, f"torchvision's transform gives images of {shape}"
        self.forward, self.mode = self.model, "compiled" if compiled else "eager"
        if compiled:  # not fullgraph: it breaks
            backend = "inductor" if self.device_type == "cuda" else "aot_eager"
            self.forward = torch.compile(self.model, backend=backend)
        train = workload.config.train
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(
            trained, train.lr, momentum=train.momentum, weight_decay=train.weight_decay, fused=True
        )
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=dtype == "fp16")

    def losses(self) -> dict[str, Tensor]:
        """Of a forward, under our names."""
        with _autocast(self):
            found = self.forward(self.images, self.targets)
        return {OUR_NAMES[name]: loss for name, loss in found.items()}

    def __call__(self) -> dict[str, Tensor]:
        """The losses, detached, on the device."""
        with self.phase("forward"):
            losses = self.losses()
            total = sum(losses.values())
        with self.phase("backward"):
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(total).backward()
        with self.phase("update"):
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return {name: loss.detach() for name, loss in losses.items()}

    @torch.no_grad()
    def counts(self) -> dict[str, int]:
        """What a forward works on; not compiled."""
        with _autocast(self):
            return count_rows(self.model, lambda: self.model(self.images, self.targets))


class TorchvisionInference:
    """Images to detections, masks bool [n, H, W] at the images' size."""

    mode = "eager"

    def __init__(self, workload: Workload, images: int, layout: str, dtype: str) -> None:
        self.dtype, self.device_type = DTYPES[dtype], workload.device.type
        self.model = load(workload, layout, detecting=True).eval()
        self.images = workload.float_images()[:images]

    @torch.no_grad()
    def __call__(self) -> list[dict[str, Tensor]]:
        """boxes, labels, scores and masks of each image."""
        with _autocast(self):
            found = self.model(self.images)
        return [{**image, "masks": image["masks"][:, 0] > 0.5} for image in found]


def _autocast(run: TorchvisionStep | TorchvisionInference) -> torch.autocast:
    half = run.dtype != torch.float32
    return torch.autocast(run.device_type, dtype=run.dtype if half else None, enabled=half)


def load(workload: Workload, layout: str, detecting: bool = False) -> MaskRCNN:
    """A model with the workload's weights, or those of inference."""
    model = build_torchvision(workload.config.model, workload.setting.size).to(workload.device)
    model.load_state_dict(workload.state | (workload.detecting if detecting else {}))
    return model.to(memory_format=torch.channels_last) if layout == "channels_last" else model


def count_rows(model: MaskRCNN, run: Callable[[], object]) -> dict[str, int]:
    """Anchors and RoIs drawn, and those of them that are positive, in the whole batch, during `run`."""
    counts: Counter[str] = Counter()
    rpn, heads = model.rpn.fg_bg_sampler, model.roi_heads.fg_bg_sampler

    def watch(sampler: Callable, name: str) -> Callable:
        def draw(labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            positive, negative = sampler(labels)
            positives = sum(int(p.sum()) for p in positive)
            counts[f"{name}_positive"] += positives
            counts[name] += positives + sum(int(n.sum()) for n in negative)
            return positive, negative

        return draw

    hook = model.roi_heads.mask_roi_pool.register_forward_hook(
        lambda module, inputs, pooled: counts.update(mask_rois=len(pooled))
    )
    model.rpn.fg_bg_sampler, model.roi_heads.fg_bg_sampler = watch(rpn, "anchors"), watch(heads, "rois")
    try:
        run()
    finally:
        model.rpn.fg_bg_sampler, model.roi_heads.fg_bg_sampler = rpn, heads
        hook.remove()
    return dict(counts)


@torch.no_grad()
def spread_logits(model: MaskRCNN, images: list[Tensor]) -> dict[str, Tensor]:
    """The class layer's parameters, scaled so that its logits on these images have a deviation of `LOGIT_STD`.

    A new network's classes are equally likely: none reaches the score threshold, and nothing would be detected.
    """
    layer, seen = model.roi_heads.box_predictor.cls_score, []
    hook = layer.register_forward_hook(lambda module, inputs, logits: seen.append(logits.float().std()))
    try:
        model.eval()(images)
    finally:
        hook.remove()
    factor = LOGIT_STD / seen[0].clamp(min=1e-6)
    return {f"roi_heads.box_predictor.cls_score.{name}": p * factor for name, p in layer.named_parameters()}
