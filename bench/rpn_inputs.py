"""The arguments of a region proposal network's ops, made of one another as in a step.

Anchors are labelled with the workload's own ground truth, slots are drawn among these labels; only logits and deltas
are plain random numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from kernels import AnchorGrid

from .boxes import DISTRIBUTIONS, anchor_grid, random_objects
from .inputs import Draw, Inputs, Sizes

HIGH, LOW = 0.7, 0.3  # IoU thresholds of labels, the ops' defaults
NMS_THRESHOLD = 0.7
DELTAS = 0.25  # standard deviation of deltas: an anchor moves by a quarter of its size


def _ground_truth(sizes: Sizes, draw: Draw) -> tuple[Tensor, Tensor]:
    """Boxes [B, G, 4], zero where an image has fewer, and how many it has [B]; on the CPU."""
    capacity = 2 * sizes.objects - 1 if sizes.ragged else sizes.objects
    boxes = torch.stack([random_objects(capacity, sizes.image_size, draw.boxes) for _ in range(sizes.images)])
    count = torch.full((sizes.images,), sizes.objects)
    if sizes.ragged:
        spread = torch.linspace(1, capacity, sizes.images, dtype=torch.float64).round().long()
        count = spread[torch.randperm(sizes.images, generator=draw.layout)]
    boxes[torch.arange(capacity) >= count[:, None]] = 0
    return boxes, count


def _grid_on(sizes: Sizes, device: str) -> AnchorGrid:
    grid = anchor_grid(sizes.image_size)
    return replace(grid, cells=grid.cells.to(device))


def _label_anchors(sizes: Sizes, draw: Draw, dtype: torch.dtype, layout: str) -> Inputs:
    boxes, count = _ground_truth(sizes, draw)
    anchors = anchor_grid(sizes.image_size).anchors()
    return Inputs((anchors.to(draw.device, dtype), boxes.to(draw.device, dtype), count.int().to(draw.device)))


def _label_grid_anchors(sizes: Sizes, draw: Draw, dtype: torch.dtype, layout: str) -> Inputs:
    boxes, count = _ground_truth(sizes, draw)
    return Inputs((_grid_on(sizes, draw.device), boxes.to(draw.device, dtype), count.int().to(draw.device)))


def _rpn_loss(sizes: Sizes, draw: Draw, dtype: torch.dtype, layout: str) -> Inputs:
    boxes, count = _ground_truth(sizes, draw)
    grid = anchor_grid(sizes.image_size)
    labelled = [near_labels(grid, of_image[:n]) for of_image, n in zip(boxes, count.tolist(), strict=True)]
    slots = [_draw_slots(labels, sizes.slots, draw.boxes) for labels, _ in labelled]
    index, drawn, positive = (torch.stack(parts).to(draw.device) for parts in zip(*slots, strict=True))
    matched = torch.stack([matched for _, matched in labelled]).int().to(draw.device)
    logits, deltas = _head(sizes, len(grid), draw, dtype)
    grid = _grid_on(sizes, draw.device)
    args = (logits, deltas, grid, boxes.to(draw.device), matched, index, drawn, positive)
    return Inputs(args, leaves=(logits, deltas))


def _head(sizes: Sizes, anchors: int, draw: Draw, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits [B, A] and deltas [B, A, 4]."""
    shape = (sizes.images, anchors)
    return draw.normal(shape, dtype), draw.normal((*shape, 4), dtype, deviation=DELTAS)


def near_labels(grid: AnchorGrid, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Labels and matches [A] of `label_anchors` for one or more boxes with positive areas inside the image, on a CPU.

    Only the anchors near a box are looked at, and their overlaps computed by rows and columns: in a step's sizes the
    reference takes a minute. The IoUs are the reference's to the last bit.
    """
    best = torch.zeros(len(grid))
    matched = torch.zeros(len(grid), dtype=torch.int64)
    labels = torch.zeros(len(grid), dtype=torch.int8)
    anchors, *views = (by_level(grid, t) for t in (grid.anchors(), best, matched, labels))
    near, claims = [], []
    for number, box in enumerate(boxes):
        for level, of_level in enumerate(anchors):
            window = _window(grid, level, box)
            iou = iou_with(of_level[window], box)
            highest, object_of = views[0][level][window], views[1][level][window]
            object_of.masked_fill_(iou > highest, number)  # a tie keeps the first
            highest.copy_(torch.maximum(iou, highest))
            near.append((number, views[2][level][window], iou))
            claims.append(iou.max() if iou.numel() else iou.new_zeros(()))
    labels.copy_(torch.where(best >= HIGH, 1, torch.where(best >= LOW, -1, 0)))
    best_of = torch.stack(claims).view(len(boxes), -1).amax(1)
    for number, labels_near, iou in near:
        labels_near.masked_fill_(iou == best_of[number], 1)
    return labels, torch.where(labels == 1, matched, 0)


def iou_with(anchors: Tensor, box: Tensor) -> Tensor:
    """[rows, columns, k] of one box with the anchors [rows, columns, k, 4] of a level: x lies in columns, y in rows."""
    x, y = anchors[:1, :, :, 0::2], anchors[:, :1, :, 1::2]
    width = (torch.minimum(x[..., 1], box[2]) - torch.maximum(x[..., 0], box[0])).clamp(min=0)
    height = (torch.minimum(y[..., 1], box[3]) - torch.maximum(y[..., 0], box[1])).clamp(min=0)
    intersection = width * height
    area = (x[..., 1] - x[..., 0]) * (y[..., 1] - y[..., 0])
    return intersection / (area + (box[2] - box[0]) * (box[3] - box[1]) - intersection)


def by_level(grid: AnchorGrid, values: Tensor) -> list[Tensor]:
    """Views [H_l, W_l, k, ...] of values [A, ...]."""
    levels = zip(values.split(grid.level_sizes), grid.extents, strict=True)
    return [part.view(*extent, grid.cells.shape[1], *values.shape[1:]) for part, extent in levels]


def _window(grid: AnchorGrid, level: int, box: Tensor) -> tuple[slice, slice]:
    """Rows and columns of a level, among them all with an anchor that overlaps the box."""
    window = []
    for axis, extent, stride in zip((1, 0), grid.extents[level], grid.strides[level], strict=True):
        low, high = grid.cells[level, :, axis].min(), grid.cells[level, :, axis + 2].max()
        first = int((box[axis] - high) / stride) - 1
        last = int((box[axis + 2] - low) / stride) + 1
        window.append(slice(max(first, 0), min(last + 1, extent)))
    return window[0], window[1]


def _draw_slots(labels: Tensor, slots: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Anchors [S] drawn at random, at most half of them positive; which slots are drawn, which hold a positive."""

    def shuffled(label: int) -> Tensor:
        found = (labels == label).nonzero()[:, 0]
        return found[torch.randperm(len(found), generator=generator)]

    chosen = shuffled(1)[: slots // 2]
    index = torch.cat([chosen, shuffled(0)[: slots - len(chosen)]])
    place = torch.arange(slots)
    empty = slots - len(index)  # of a map with hardly an anchor
    return torch.cat([index, index.new_zeros(empty)]), place < len(index), place < len(chosen)


def _nms_mask(sizes: Sizes, draw: Draw, dtype: torch.dtype, layout: str) -> Inputs:
    """A group for each image and level; the highest levels have fewer anchors than are asked for."""
    number = [min(sizes.rois, n) for n in anchor_grid(sizes.image_size).level_sizes][: sizes.levels]
    boxes = torch.zeros(sizes.images, sizes.levels, sizes.rois, 4)
    for of_image in boxes:
        objects = random_objects(sizes.objects, sizes.image_size, draw.boxes)
        for of_level, count in zip(of_image, number, strict=True):
            of_level[:count] = DISTRIBUTIONS[sizes.boxes](objects, count, sizes.image_size, draw.boxes)
    valid = torch.arange(sizes.rois) < torch.tensor(number)[:, None].repeat(sizes.images, 1)
    return Inputs((boxes.flatten(0, 1).to(draw.device), valid.to(draw.device), NMS_THRESHOLD))


def _stable_topk(sizes: Sizes, draw: Draw, dtype: torch.dtype, layout: str) -> Inputs:
    """The logits of the lowest level, the one with three quarters of all anchors."""
    values = draw.normal((sizes.images, anchor_grid(sizes.image_size).level_sizes[0]), dtype)
    return Inputs((values, sizes.rois))


def _decode_proposals(sizes: Sizes, draw: Draw, dtype: torch.dtype, layout: str) -> Inputs:
    """Of each level the anchors that `stable_topk` picks: of random logits, any; images fill most of the batch's."""
    grid, index, first = _grid_on(sizes, draw.device), [], 0
    for number in grid.level_sizes:
        of_level = [torch.randperm(number, generator=draw.boxes)[: sizes.rois] for _ in range(sizes.images)]
        index.append(first + torch.stack(of_level))
        first += number
    share = 0.75 + 0.25 * torch.rand(sizes.images, 2, generator=draw.boxes, dtype=torch.float64)
    image_sizes = (share * torch.tensor(sizes.image_size)).long()
    logits, deltas = _head(sizes, len(grid), draw, dtype)
    return Inputs((logits, deltas, torch.cat(index, dim=1).to(draw.device), grid, image_sizes.to(draw.device)))


BUILDERS: dict[str, Callable[[Sizes, Draw, torch.dtype, str], Inputs]] = {
    "label_anchors": _label_anchors,
    "label_grid_anchors": _label_grid_anchors,
    "rpn_loss": _rpn_loss,
    "nms_mask": _nms_mask,
    "stable_topk": _stable_topk,
    "decode_proposals": _decode_proposals,
}
