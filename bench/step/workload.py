"""What every provider gets: the same images, targets, weights and proposals.

Weights are random, the frozen batch norms' statistics those of the batch itself: with the statistics of a new network,
mean 0 and variance 1, activations would grow from block to block until nothing is finite.

A new network's proposals hit no object, so that the box and mask heads would have next to nothing to do. Every provider
therefore trains on the same given proposals, made from the objects: of each image 128 positives are drawn, and 384
negatives. The region proposal network still computes its own: `keep_computed` makes the result depend on them, through
a choice that is on the device and that no compiler can see.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d, box_iou

from mrcnn.config import CONFIGS, Config, ModelConfig, TrainConfig
from mrcnn.structures import Batch, Targets

from ..step_profile.run import synthetic_batch

POSITIVE_SHARE = 0.25  # of the proposals: more than are drawn
SURELY_POSITIVE, SURELY_NEGATIVE = 0.6, 0.4  # IoU: far enough from 0.5 for the rounding of a half type
_TRAIN = TrainConfig(steps=10_000, lr=1e-5, warmup_steps=0, schedule="constant", workers=0)


@dataclass(frozen=True)
class Setting:
    """A size of the workload."""

    title: str
    config: Config
    size: tuple[int, int]
    batch: int
    inference: tuple[int, int]  # images of the latency and of the throughput row


FULL = Setting(
    "R50-FPN, 91 classes",
    Config(
        "step",
        dataclasses.replace(CONFIGS["torchvision"].model, weights=""),
        train=dataclasses.replace(_TRAIN, batch_size=12),
    ),
    (800, 1344),
    12,
    (1, 8),
)
SMALL = Setting(
    "a tiny R18-FPN, 7 classes",
    Config(
        "step-tiny",
        ModelConfig(
            num_classes=7,
            backbone="resnet18",
            norm="frozen_bn",
            frozen_stages=2,
            fpn_channels=32,
            anchor_sizes=(8, 16, 32, 64, 128),
            pre_nms_top_n=(200, 100),
            post_nms_top_n=(600, 50),
            box_channels=64,
            mask_layers=1,
            mask_channels=16,
            max_detections=20,
        ),
        train=dataclasses.replace(_TRAIN, batch_size=2),
    ),
    (64, 96),
    2,
    (1, 2),
)
"""For a CPU, where it shows that the command works."""


@dataclass
class Workload:
    """A setting's tensors, on one device."""

    setting: Setting
    batch: Batch
    proposals: Tensor  # [B, N, 4] xyxy
    use_computed: Tensor  # bool scalar, False
    state: dict[str, Tensor]  # of torchvision's model
    detecting: dict[str, Tensor]  # what of it is another at inference
    described: dict[str, Any]  # what the record says of it

    @property
    def config(self) -> Config:
        """Of the model and its training."""
        return self.setting.config

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.proposals.device

    def target_dicts(self) -> list[dict[str, Tensor]]:
        """The targets as torchvision takes them: of each image its boxes, labels and uint8 masks."""
        targets = self.batch.targets
        return [
            {
                "boxes": targets.boxes[b, :count],
                "labels": targets.labels[b, :count],
                "masks": targets.masks.dense(b)[:count].to(torch.uint8),
            }
            for b, count in enumerate(targets.count.tolist())
        ]

    def float_images(self) -> list[Tensor]:
        """The images as torchvision takes them: [3, h, w] floats in [0, 1]."""
        return [image / 255 for image in self.batch.images]


def make_workload(setting: Setting, device: torch.device) -> Workload:
    """Draw, calibrate and describe a workload.

    Raises:
        RuntimeError: an image without objects, or an activation that is not finite.
    """
    from .torchvision_baseline import build_torchvision, spread_logits

    batch = synthetic_batch(setting.size, setting.batch, setting.config)
    if int(batch.targets.count.min()) == 0:
        raise RuntimeError("an image of the workload holds no object: choose another seed")
    number = setting.config.model.post_nms_top_n[0]
    proposals = given_proposals(batch.targets, setting.size, number).to(device)
    batch = batch.to(device)
    torch.manual_seed(0)
    model = build_torchvision(setting.config.model, setting.size).to(device)
    workload = Workload(setting, batch, proposals, torch.zeros((), dtype=torch.bool, device=device), {}, {}, {})
    deviations = calibrate(model, workload.float_images())
    if any(not torch.tensor(value).isfinite() for value in deviations.values()):
        raise RuntimeError(f"activations are not finite: {deviations}")
    workload.state = {name: value.clone() for name, value in model.state_dict().items()}
    workload.detecting = spread_logits(model, workload.float_images()[:1])
    workload.described = {
        "title": setting.title,
        "images": [setting.batch, *setting.size],
        "objects": batch.targets.count.tolist(),
        "proposals": number,
        "activations_std": deviations,
    }
    return workload


def given_proposals(targets: Targets, size: tuple[int, int], number: int) -> Tensor:
    """Boxes [B, number, 4] in mixed order: a quarter objects moved a little, the rest boxes that hit none of them."""
    generator = torch.Generator().manual_seed(1)
    positives = int(number * POSITIVE_SHARE)
    images = []
    for boxes, count in zip(targets.boxes, targets.count.tolist(), strict=True):
        objects = boxes[:count]
        near = _draw(partial(_jittered, objects, size, generator), objects, positives, hit=True)
        far = _draw(partial(_anywhere, size, generator), objects, number - positives, hit=False)
        images.append(torch.cat([near, far])[torch.randperm(number, generator=generator)])
    return torch.stack(images)


def _draw(propose: Callable[[], Tensor], objects: Tensor, number: int, hit: bool) -> Tensor:
    """The first `number` proposed boxes that surely hit an object, or surely none."""
    found = torch.empty(0, 4)
    for _ in range(1000):
        boxes = propose()
        best = box_iou(boxes, objects).amax(1)
        found = torch.cat([found, boxes[best > SURELY_POSITIVE if hit else best < SURELY_NEGATIVE]])
        if len(found) >= number:
            return found[:number]
    raise RuntimeError(f"no proposals that {'hit' if hit else 'miss'} the objects")


def _jittered(objects: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    box = objects[torch.randint(len(objects), (1024,), generator=generator)]
    center, extent = (box[:, :2] + box[:, 2:]) / 2, box[:, 2:] - box[:, :2]
    center = center + (torch.rand(1024, 2, generator=generator) - 0.5) * 0.2 * extent
    extent = extent * torch.exp((torch.rand(1024, 2, generator=generator) - 0.5) * 0.4)
    return _inside(center, extent, size)


def _anywhere(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Of all sizes: log-uniform from 8 pixels to the shorter side of the image."""
    span = torch.rand(1024, 2, generator=generator)
    extent = 8 * torch.exp(span * torch.log(torch.tensor(min(size) / 8)))
    center = torch.rand(1024, 2, generator=generator) * torch.tensor([size[1], size[0]])
    return _inside(center, extent, size)


def _inside(center: Tensor, extent: Tensor, size: tuple[int, int]) -> Tensor:
    limit = torch.tensor([size[1], size[0], size[1], size[0]])
    boxes = torch.cat([center - extent / 2, center + extent / 2], dim=1)
    boxes = torch.minimum(boxes.clamp(min=0), limit)
    return boxes[(boxes[:, 2:] - boxes[:, :2] >= 2).all(1)]


def keep_computed(given: Tensor, computed: Tensor, use_computed: Tensor) -> Tensor:
    """`given`, unchanged, in a way that needs every number of `computed`: nothing that led to them is dead code."""
    return given + torch.where(use_computed, computed.float().sum(), 0.0)


@torch.no_grad()
def calibrate(model: nn.Module, images: list[Tensor]) -> dict[str, float]:
    """Give each frozen batch norm the statistics of these images, in fp32, as an ordinary one would take in training.

    Returns:
        Standard deviations of the images and of the pyramid that the network then makes of them.
    """

    def take_statistics(norm: FrozenBatchNorm2d, inputs: tuple[Tensor]) -> None:
        variance, mean = torch.var_mean(inputs[0].float(), (0, 2, 3), correction=0)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)

    norms = [module for module in model.modules() if isinstance(module, FrozenBatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(take_statistics) for norm in norms]
    try:
        batch, _ = model.transform(images)
        features = model.backbone(batch.tensors)
    finally:
        for hook in hooks:
            hook.remove()
    pyramid = {f"P{level}": feature.std().item() for level, feature in enumerate(features.values(), 2)}
    return {"images": batch.tensors.std().item()} | pyramid
