"""The arguments of one call, drawn at random: boxes on the CPU (the same on every machine), values on the device.

Here are those of RoIAlign and of box_iou; `rpn_inputs` has the others of a region proposal network, `mask_inputs`
those of the mask branch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import AnchorGrid, MaskPool

from .boxes import DISTRIBUTIONS, of_one_size, random_objects, without_shared_edges

PYRAMID_STRIDES = (4, 8, 16, 32)
MASK_SIZE = 14  # bins of the RoIs of a mask head


@dataclass(frozen=True)
class Sizes:
    """What a workload's tensors are made of; each op reads the fields that concern it."""

    images: int
    image_size: tuple[int, int]  # height, width in pixels
    rois: int = 0  # an image
    boxes: str = "clustered"  # how RoIs are spread, a name in DISTRIBUTIONS
    roi_size: int = 0  # the side of every RoI in pixels, anywhere; 0: sizes and places as `boxes` says
    output_size: int = 7
    mask_rois: int = 0  # an image, pooled to MASK_SIZE together with the others
    sampling_ratio: int = 2  # 0: adaptive
    channels: int = 256
    stride: int = 16  # of the one map of single-level RoIAlign
    objects: int = 50  # an image; with `ragged`, on average
    ragged: bool = False  # images hold from 1 to 2 * objects - 1, evenly spread
    masks: int = 0  # positives of the whole batch; detections to be pasted
    classes: int = 81
    mask_size: int = 28
    slots: int = 256  # anchors an image that the RPN's loss is computed on
    levels: int = 5  # of the RPN: each brings forward `rois` boxes an image, or as many as it has anchors


@dataclass
class Inputs:
    """One call's arguments; `leaves` are the tensors among them that gradients flow to."""

    args: tuple
    leaves: tuple[Tensor, ...] = ()

    def tensors(self) -> list[Tensor]:
        """Every tensor argument, those in lists, grids and pools too."""
        return [t for a in self.args for t in _flat(a) if isinstance(t, Tensor)]

    def numbers(self) -> list[int | float]:
        """Every number among the arguments, then the whole ones in lists: how many bins each set of RoIs gets.

        Last come a grid's extents and strides, or a pool's padded size and whether it is packed.
        """
        listed = [n for a in self.args if isinstance(a, (list, tuple)) for n in a if isinstance(n, int)]
        grids = [a for a in self.args if isinstance(a, AnchorGrid)]
        pairs = [pair for grid in grids for pair in (*grid.extents, *grid.strides)]
        pairs += [(*a.padded_size, int(a.packed)) for a in self.args if isinstance(a, MaskPool)]
        return [a for a in self.args if isinstance(a, (int, float))] + listed + [n for pair in pairs for n in pair]

    def shapes(self) -> str:
        """The shape of every tensor argument, for the record."""
        return " ".join("x".join(map(str, t.shape)) for t in self.tensors())

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """Copy with `function` applied to every tensor; leaves follow, detached from what they came from."""
        done: dict[int, Tensor] = {}

        def apply(value):  # noqa: ANN001
            if isinstance(value, (list, tuple)):
                return [apply(v) for v in value]
            if isinstance(value, MaskPool):
                return value.map(apply)
            if not isinstance(value, Tensor):
                return value
            return done.setdefault(id(value), function(value.detach()))

        args = tuple(apply(a) for a in self.args)
        leaves = tuple(done[id(leaf)].requires_grad_(leaf.requires_grad) for leaf in self.leaves)
        return Inputs(args, leaves)

    def overwrite(self, other: Inputs) -> None:
        """Put `other`'s values into these very tensors, which must have the same shapes."""
        for mine, fresh in zip(self.tensors(), other.tensors(), strict=True):
            overwrite(mine, fresh)


def _flat(value: object) -> list:
    """What a list, a grid or a pool holds; else the value itself."""
    if isinstance(value, AnchorGrid):
        return [value.cells]
    if isinstance(value, MaskPool):
        return [value.bitmaps, value.offset, value.extent, value.sizes]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def overwrite(tensor: Tensor, values: Tensor) -> None:
    """Copy without a trace: a provider that keeps results by address and version must not see that they are old."""
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tensor):
        tensor.copy_(values)


@dataclass(frozen=True)
class Draw:
    """Random numbers: `boxes` on the CPU (machine-independent), `values` on the device.

    `layout` draws what is the same for every draw of a workload, e.g. how many objects each image holds.
    """

    layout: torch.Generator
    boxes: torch.Generator
    values: torch.Generator | None
    device: str

    @classmethod
    def seeded(cls, seed: int, fresh: int, device: str) -> Draw:
        """Generators of a workload's `fresh`-th draw."""
        values = torch.Generator(device).manual_seed(seed + fresh)
        return cls(torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + fresh), values, device)

    @classmethod
    def boxes_only(cls, seed: int) -> Draw:
        """The first draw's boxes and counts on the CPU; values are shapes without memory behind them."""
        return cls(torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed), None, "cpu")

    def normal(
        self, shape: tuple[int, ...], dtype: torch.dtype, memory_format: str = "nchw", deviation: float = 1.0
    ) -> Tensor:
        """Normal values, rounded to `dtype`."""
        if self.values is None:
            return torch.empty(shape, dtype=dtype, device="meta")
        # Drawn in float32 first: every dtype then sees the same numbers, up to its own rounding.
        x = torch.randn(shape, generator=self.values, device=self.device).mul_(deviation).to(dtype)
        return x.contiguous(memory_format=torch.channels_last) if memory_format == "channels_last" else x


def _rois(sizes: Sizes, draw: Draw) -> Tensor:
    """[images * rois, 5]: image index, xyxy; grouped by image, as a detector's are."""
    return _roi_sets(sizes, (sizes.rois,), draw)[0]


def _roi_sets(sizes: Sizes, counts: Sequence[int], draw: Draw) -> list[Tensor]:
    """RoIs, as `_rois`, for each of `counts` an image, all around the same objects."""
    rows = [[] for _ in counts]
    for image in range(sizes.images):
        objects = random_objects(sizes.objects, sizes.image_size, draw.boxes)
        for of_set, count in zip(rows, counts, strict=True):
            boxes = _boxes(sizes, objects, count, draw.boxes)
            of_set.append(torch.cat([torch.full((len(boxes), 1), float(image)), boxes], dim=1))
    return [torch.cat(of_set).to(draw.device) for of_set in rows]


def _boxes(sizes: Sizes, objects: Tensor, count: int, generator: torch.Generator) -> Tensor:
    if sizes.roi_size:
        return of_one_size(sizes.roi_size, count, sizes.image_size, generator)
    return DISTRIBUTIONS[sizes.boxes](objects, count, sizes.image_size, generator)


def _feature_map(sizes: Sizes, stride: int, draw: Draw, dtype: torch.dtype, layout: str) -> Tensor:
    height, width = (math.ceil(extent / stride) for extent in sizes.image_size)
    return draw.normal((sizes.images, sizes.channels, height, width), dtype, layout)


def _roi_align(sizes: Sizes, draw: Draw, dtype: torch.dtype, layout: str) -> Inputs:
    rois = _rois(sizes, draw)
    feature = _feature_map(sizes, sizes.stride, draw, dtype, layout)
    return Inputs((feature, rois, sizes.output_size, 1 / sizes.stride, sizes.sampling_ratio), leaves=(feature,))


def _multiscale_roi_align(sizes: Sizes, draw: Draw, dtype: torch.dtype, layout: str) -> Inputs:
    rois = _rois(sizes, draw)
    features = [_feature_map(sizes, stride, draw, dtype, layout) for stride in PYRAMID_STRIDES]
    return Inputs((features, rois, sizes.output_size, _scales(), sizes.sampling_ratio), leaves=tuple(features))


def _joint_multiscale_roi_align(sizes: Sizes, draw: Draw, dtype: torch.dtype, layout: str) -> Inputs:
    rois = _roi_sets(sizes, (sizes.rois, sizes.mask_rois), draw)
    features = [_feature_map(sizes, stride, draw, dtype, layout) for stride in PYRAMID_STRIDES]
    bins = [sizes.output_size, MASK_SIZE]
    return Inputs((features, rois, bins, _scales(), sizes.sampling_ratio), leaves=tuple(features))


def _scales() -> list[float]:
    return [1 / stride for stride in PYRAMID_STRIDES]


def _box_iou(sizes: Sizes, draw: Draw, dtype: torch.dtype, layout: str) -> Inputs:
    proposals, objects = [], []
    for _ in range(sizes.images):
        objects.append(random_objects(sizes.objects, sizes.image_size, draw.boxes))
        drawn = DISTRIBUTIONS[sizes.boxes](objects[-1], sizes.rois, sizes.image_size, draw.boxes)
        proposals.append(without_shared_edges(drawn, objects[-1]))
    boxes1, boxes2 = (torch.stack(b).to(draw.device, dtype) for b in (proposals, objects))
    if sizes.images == 1:
        boxes1, boxes2 = boxes1[0], boxes2[0]
    return Inputs((boxes1, boxes2), leaves=(boxes1, boxes2))


BUILDERS: dict[str, Callable[[Sizes, Draw, torch.dtype, str], Inputs]] = {
    "roi_align": _roi_align,
    "multiscale_roi_align": _multiscale_roi_align,
    "joint_multiscale_roi_align": _joint_multiscale_roi_align,
    "box_iou": _box_iou,
}
