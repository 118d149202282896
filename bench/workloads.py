"""Named, seeded workloads of every op.

`gpu` workloads have the sizes of a training step at 800 x 1344; `cpu` ones keep a call at milliseconds so that
the harness itself can be run, and tested, anywhere. Boxes come from a CPU generator and are the same on every
machine; features and logits are drawn on the device, which is quick but device-specific.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .boxes import grid_anchors, random_objects, random_proposals, without_shared_edges

OPS = ("roi_align", "multiscale_roi_align", "box_iou", "label_anchors", "mask_bce_loss")
ROI_OPS = ("roi_align", "multiscale_roi_align")
DIRECTIONS = {op: ("forward",) if op == "label_anchors" else ("forward", "backward") for op in OPS}
PYRAMID_STRIDES = (4, 8, 16, 32)


@dataclass(frozen=True)
class Sizes:
    """What a workload's tensors are made of; each op reads the fields that concern it."""

    images: int
    image_size: tuple[int, int]  # height, width in pixels
    rois: int = 0  # an image
    output_size: int = 7
    channels: int = 256
    stride: int = 16  # of the one map of single-level RoIAlign
    objects: int = 50  # an image; ground-truth capacity
    ragged: bool = False  # images hold 1..objects instead of all the same number
    masks: int = 0
    classes: int = 81
    mask_size: int = 28


@dataclass
class Inputs:
    """One call's arguments; `leaves` are the tensors among them that gradients flow to."""

    args: tuple
    leaves: tuple[Tensor, ...] = ()

    def shapes(self) -> str:
        """The shape of every tensor argument, for the record."""
        flat = [t for a in self.args for t in (a if isinstance(a, list) else [a])]
        return " ".join("x".join(map(str, t.shape)) for t in flat if isinstance(t, Tensor))

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """Copy with `function` applied to every tensor; leaves follow, detached from what they came from."""
        done: dict[int, Tensor] = {}

        def apply(value):  # noqa: ANN001
            if isinstance(value, (list, tuple)):
                return [apply(v) for v in value]
            if not isinstance(value, Tensor):
                return value
            return done.setdefault(id(value), function(value.detach()))

        args = tuple(apply(a) for a in self.args)
        leaves = tuple(done[id(leaf)].requires_grad_(leaf.requires_grad) for leaf in self.leaves)
        return Inputs(args, leaves)


@dataclass(frozen=True)
class Workload:
    """A name for one set of sizes of one op."""

    op: str
    name: str
    suite: str  # "gpu" or "cpu"
    sizes: Sizes

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Boxes are always float32; features and logits also come in bf16, on a GPU."""
        half = self.suite == "gpu" and self.op not in ("box_iou", "label_anchors")
        return (torch.float32, torch.bfloat16) if half else (torch.float32,)

    def build(self, device: str, dtype: torch.dtype, layout: str = "nchw", grad: bool = False) -> Inputs:
        """Draw the inputs: the same values for the same workload and device, in any dtype and layout."""
        seed = zlib.crc32(f"{self.op}/{self.name}".encode())
        draw = Draw(torch.Generator().manual_seed(seed), torch.Generator(device).manual_seed(seed), device)
        inputs = BUILDERS[self.op](self.sizes, draw, dtype, layout)
        for leaf in inputs.leaves:
            leaf.requires_grad_(grad)
        return inputs


@dataclass(frozen=True)
class Draw:
    """Random numbers: `boxes` on the CPU (machine-independent), `values` on the device."""

    boxes: torch.Generator
    values: torch.Generator
    device: str

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype, layout: str = "nchw") -> Tensor:
        """Standard normal values, rounded to `dtype`."""
        # Drawn in float32 first: every dtype then sees the same numbers, up to its own rounding.
        x = torch.randn(shape, generator=self.values, device=self.device).to(dtype)
        return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


def _rois(sizes: Sizes, draw: Draw) -> Tensor:
    """[images * rois, 5]: image index, xyxy; grouped by image, as a detector's are."""
    rows = []
    for image in range(sizes.images):
        objects = random_objects(sizes.objects, sizes.image_size, draw.boxes)
        boxes = random_proposals(objects, sizes.rois, sizes.image_size, draw.boxes)
        rows.append(torch.cat([torch.full((len(boxes), 1), float(image)), boxes], dim=1))
    return torch.cat(rows).to(draw.device)


def _feature_map(sizes: Sizes, stride: int, draw: Draw, dtype: torch.dtype, layout: str) -> Tensor:
    height, width = (math.ceil(extent / stride) for extent in sizes.image_size)
    return draw.normal((sizes.images, sizes.channels, height, width), dtype, layout)


def _roi_align(sizes: Sizes, draw: Draw, dtype: torch.dtype, layout: str) -> Inputs:
    rois = _rois(sizes, draw)
    feature = _feature_map(sizes, sizes.stride, draw, dtype, layout)
    return Inputs((feature, rois, sizes.output_size, 1 / sizes.stride, 2), leaves=(feature,))


def _multiscale_roi_align(sizes: Sizes, draw: Draw, dtype: torch.dtype, layout: str) -> Inputs:
    rois = _rois(sizes, draw)
    features = [_feature_map(sizes, stride, draw, dtype, layout) for stride in PYRAMID_STRIDES]
    scales = [1 / stride for stride in PYRAMID_STRIDES]
    return Inputs((features, rois, sizes.output_size, scales, 2), leaves=tuple(features))


def _box_iou(sizes: Sizes, draw: Draw, dtype: torch.dtype, layout: str) -> Inputs:
    proposals, objects = [], []
    for _ in range(sizes.images):
        objects.append(random_objects(sizes.objects, sizes.image_size, draw.boxes))
        drawn = random_proposals(objects[-1], sizes.rois, sizes.image_size, draw.boxes)
        proposals.append(without_shared_edges(drawn, objects[-1]))
    boxes1, boxes2 = (torch.stack(b).to(draw.device, dtype) for b in (proposals, objects))
    if sizes.images == 1:
        boxes1, boxes2 = boxes1[0], boxes2[0]
    return Inputs((boxes1, boxes2), leaves=(boxes1, boxes2))


def _label_anchors(sizes: Sizes, draw: Draw, dtype: torch.dtype, layout: str) -> Inputs:
    anchors = grid_anchors(sizes.image_size)
    gt = torch.stack([random_objects(sizes.objects, sizes.image_size, draw.boxes) for _ in range(sizes.images)])
    count = torch.full((sizes.images,), sizes.objects)
    if sizes.ragged:
        count = torch.randint(1, sizes.objects + 1, (sizes.images,), generator=draw.boxes)
    gt[torch.arange(sizes.objects) >= count[:, None]] = 0
    return Inputs((anchors.to(draw.device, dtype), gt.to(draw.device, dtype), count.int().to(draw.device)))


def _mask_bce_loss(sizes: Sizes, draw: Draw, dtype: torch.dtype, layout: str) -> Inputs:
    side = sizes.mask_size
    logits = draw.normal((sizes.masks, sizes.classes, side, side), dtype, layout)
    labels = torch.randint(1, sizes.classes, (sizes.masks,), generator=draw.boxes).to(draw.device)
    targets = (draw.normal((sizes.masks, side, side), torch.float32) > 0).float()
    return Inputs((logits, labels, targets), leaves=(logits,))


BUILDERS: dict[str, Callable[[Sizes, Draw, torch.dtype, str], Inputs]] = {
    "roi_align": _roi_align,
    "multiscale_roi_align": _multiscale_roi_align,
    "box_iou": _box_iou,
    "label_anchors": _label_anchors,
    "mask_bce_loss": _mask_bce_loss,
}

_FULL, _SMALL = (800, 1344), (512, 672)
WORKLOADS = (
    Workload("roi_align", "canonical", "gpu", Sizes(16, _FULL, rois=512)),
    Workload("roi_align", "small", "gpu", Sizes(2, _FULL, rois=128)),
    Workload("roi_align", "cpu", "cpu", Sizes(2, _SMALL, rois=24, channels=8)),
    Workload("multiscale_roi_align", "canonical-box", "gpu", Sizes(16, _FULL, rois=512)),
    Workload("multiscale_roi_align", "canonical-mask", "gpu", Sizes(16, _FULL, rois=128, output_size=14)),
    Workload("multiscale_roi_align", "small", "gpu", Sizes(2, _FULL, rois=128)),
    Workload("multiscale_roi_align", "cpu", "cpu", Sizes(2, _SMALL, rois=24, channels=8)),
    Workload("box_iou", "canonical", "gpu", Sizes(16, _FULL, rois=2000)),  # proposals x objects, a batch
    Workload("box_iou", "one-image", "gpu", Sizes(1, _FULL, rois=268_569)),  # as many as there are anchors
    Workload("box_iou", "cpu", "cpu", Sizes(2, _SMALL, rois=500, objects=20)),
    Workload("label_anchors", "canonical", "gpu", Sizes(16, _FULL)),
    Workload("label_anchors", "small", "gpu", Sizes(2, _FULL, objects=20, ragged=True)),
    Workload("label_anchors", "cpu", "cpu", Sizes(2, (256, 320), objects=8, ragged=True)),
    Workload("mask_bce_loss", "canonical", "gpu", Sizes(0, _FULL, masks=2048)),
    Workload("mask_bce_loss", "small", "gpu", Sizes(0, _FULL, masks=128)),
    Workload("mask_bce_loss", "cpu", "cpu", Sizes(0, _SMALL, masks=32)),
)
