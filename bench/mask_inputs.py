"""The arguments of a mask branch's ops: what its loss is computed from, targets out of a pool of bitmaps, pasting.

Objects stand where the workload's layout puts them, in every draw: a pool has the same length then, whatever the masks
in it. Masks are blobs, an interval in each row; their edges are computed without anything but sums, products and square
roots in float64, which are the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kernels import MaskPool

from .boxes import DISTRIBUTIONS, clustered, random_objects
from .inputs import Draw, Inputs, Sizes

OPTIONS = {"mask_predictor_loss": {"relu": True}}
"""Keyword arguments of every call of an op: as the model calls it."""

POSITIVE = 0.5  # IoU of a box from which on a detector takes it for its object's
TRIED = 4  # proposals drawn for each RoI that is wanted: about a third are positive


def _rows(sizes: Sizes, draw: Draw) -> tuple[Tensor, Tensor]:
    """Labels and soft targets of positives: [N] and [N, M, M]."""
    side = sizes.mask_size
    labels = torch.randint(1, sizes.classes, (sizes.masks,), generator=draw.boxes).to(draw.device)
    return labels, (draw.normal((sizes.masks, side, side), torch.float32) > 0).float()


def _mask_bce_loss(sizes: Sizes, draw: Draw, dtype: torch.dtype, layout: str) -> Inputs:
    side = sizes.mask_size
    logits = draw.normal((sizes.masks, sizes.classes, side, side), dtype, layout)
    labels, targets = _rows(sizes, draw)
    return Inputs((logits, labels, targets), leaves=(logits,))


def _mask_predictor_loss(sizes: Sizes, draw: Draw, dtype: torch.dtype, layout: str) -> Inputs:
    """Features as the deconvolution leaves them; weight and bias in fp32, as a model keeps them under autocast."""
    side = sizes.mask_size
    features = draw.normal((sizes.masks, sizes.channels, side, side), dtype, layout)
    weight = draw.normal((sizes.classes, sizes.channels), torch.float32, deviation=sizes.channels**-0.5)
    bias = draw.normal((sizes.classes,), torch.float32, deviation=0.1)
    leaves = (features, weight, bias)
    return Inputs((*leaves, *_rows(sizes, draw)), leaves)


def _mask_targets(sizes: Sizes, draw: Draw, dtype: torch.dtype, layout: str) -> Inputs:
    """As many positives for each image, and a pool in which eight pixels are a byte."""
    capacity = 2 * sizes.objects - 1 if sizes.ragged else sizes.objects
    objects = torch.stack([random_objects(capacity, sizes.image_size, draw.layout) for _ in range(sizes.images)])
    count = torch.full((sizes.images,), sizes.objects)
    if sizes.ragged:
        spread = torch.linspace(1, capacity, sizes.images, dtype=torch.float64).round().long()
        count = spread[torch.randperm(sizes.images, generator=draw.layout)]
    objects[torch.arange(capacity) >= count[:, None]] = 0
    pool = draw_pool(objects, sizes.image_size, draw.boxes)
    found = [positives(of[:n], sizes, draw.boxes) for of, n in zip(objects, count.tolist(), strict=True)]
    boxes, matched = (torch.stack(parts).to(draw.device) for parts in zip(*found, strict=True))
    return Inputs((pool.to(draw.device), boxes, matched, sizes.mask_size))


def positives(objects: Tensor, sizes: Sizes, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Boxes [R, 4] and their objects [R]: those that are positive, of a trained network's proposals; then the rest."""
    boxes = clustered(objects, TRIED * sizes.rois, sizes.image_size, generator)
    low = torch.maximum(boxes[:, None, :2], objects[:, :2])
    inside = (torch.minimum(boxes[:, None, 2:], objects[:, 2:]) - low).clamp(min=0).prod(-1)
    union = (boxes[:, 2:] - boxes[:, :2]).prod(-1)[:, None] + (objects[:, 2:] - objects[:, :2]).prod(-1) - inside
    best, matched = (inside / union).max(dim=1)
    chosen = (best < POSITIVE).int().argsort(stable=True)[: sizes.rois]
    return boxes[chosen], matched[chosen]


def draw_pool(objects: Tensor, image_size: tuple[int, int], generator: torch.Generator) -> MaskPool:
    """Blobs in the boxes of objects [B, G, 4] xyxy, packed; a box of zeros is an empty slot. On the CPU."""
    extent = torch.cat([objects[..., :2].floor(), objects[..., 2:].ceil()], dim=-1).int()
    skew = torch.rand(*objects.shape[:2], 2, generator=generator, dtype=torch.float64).numpy() - 0.5
    crops = [_blob(*of, *shape) for of, shape in zip(extent.view(-1, 4).tolist(), skew.reshape(-1, 2), strict=True)]
    lengths = torch.tensor([len(crop) for crop in crops]).view(extent.shape[:2])
    offset = (lengths.flatten().cumsum(0).view_as(lengths) - lengths) * (lengths > 0)
    sizes = torch.tensor(image_size).repeat(len(objects), 1)
    return MaskPool(torch.from_numpy(np.concatenate(crops)), offset, extent, sizes, image_size)


def _blob(x0: int, y0: int, x1: int, y1: int, left: float, right: float) -> np.ndarray:
    """Bytes of a bitmap: an ellipse whose halves are wider at one end, each at its own."""
    v = (np.arange(y1 - y0) + 0.5) / max(y1 - y0, 1) * 2 - 1
    reach = np.sqrt(1 - v * v) * (x1 - x0) / 2
    middle, column = (x1 - x0) / 2, np.arange(x1 - x0)
    begin, end = middle - reach * (1 + left * v), middle + reach * (1 + right * v)
    inside = (column >= begin[:, None]) & (column < end[:, None])
    return np.packbits(inside, axis=1, bitorder="little").ravel()


def _paste_masks(sizes: Sizes, draw: Draw, dtype: torch.dtype, layout: str) -> Inputs:
    """Detections of one image: probabilities of any value, as pasting looks at none but by its threshold."""
    side = sizes.mask_size
    objects = random_objects(sizes.objects, sizes.image_size, draw.boxes)
    boxes = DISTRIBUTIONS[sizes.boxes](objects, sizes.masks, sizes.image_size, draw.boxes)
    masks = draw.normal((sizes.masks, side, side), dtype).sigmoid()
    return Inputs((masks, boxes.to(draw.device), sizes.image_size))


BUILDERS: dict[str, Callable[[Sizes, Draw, torch.dtype, str], Inputs]] = {
    "mask_bce_loss": _mask_bce_loss,
    "mask_predictor_loss": _mask_predictor_loss,
    "mask_targets": _mask_targets,
    "paste_masks": _paste_masks,
}
