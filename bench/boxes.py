"""Random boxes that look like a detector's: objects of all sizes, proposals crowding around them, anchors.

A benchmark with one box size, or with boxes spread evenly, flatters kernels: real RoIs overlap, so they share
cells (cache hits forward, colliding atomics backward), and their sizes span every pyramid level.

The generators are frozen: results measured months apart are compared only if their boxes are the same, which
`tests/bench/test_workloads.py` pins. They compute in float64 and round once at the end, because the last bit of a
float32 `exp` depends on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels import AnchorGrid

SMALLEST, LARGEST = 16.0, 640.0  # pixels, square root of the area


def _place(center: Tensor, size: Tensor, aspect: Tensor, image_size: tuple[int, int]) -> Tensor:
    """[N, 4] xyxy boxes near `center`, of that sqrt-area and width / height ratio, strictly inside the image."""
    extent = _extent(image_size)
    wh = torch.minimum(torch.stack([size * aspect.sqrt(), size / aspect.sqrt()], dim=1), 0.97 * extent)
    # Boxes that stick out are reflected, not clipped: clipping puts many edges on exactly 0 or W, and where the
    # edges of two boxes tie, a max has no single gradient and two correct implementations may differ.
    legal = extent - wh
    position = (center - wh / 2) / legal
    corner = legal * (1 - (1 - position % 2).abs())
    return torch.cat([corner, corner + wh], dim=1).float()


def _extent(image_size: tuple[int, int]) -> Tensor:
    return torch.tensor([image_size[1], image_size[0]], dtype=torch.float64)


def _uniform(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def _normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _log_uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.exp(math.log(low) + math.log(high / low) * _uniform(count, generator=generator))


def random_objects(count: int, image_size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """[count, 4] xyxy ground-truth boxes: sqrt-area log-uniform in 16..640 px, aspect ratio in 1/2..2."""
    size = _log_uniform(count, SMALLEST, LARGEST, generator)
    aspect = _log_uniform(count, 0.5, 2.0, generator)
    center = _uniform(count, 2, generator=generator) * _extent(image_size)
    return _place(center, size, aspect, image_size)


def clustered(objects: Tensor, count: int, image_size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """[count, 4] xyxy, as a trained RPN proposes: three quarters crowd around the objects, one quarter anywhere."""
    near = count - count // 4
    parent = objects[torch.randint(len(objects), (near,), generator=generator)].double()
    wh = parent[:, 2:] - parent[:, :2]
    center = (parent[:, :2] + parent[:, 2:]) / 2 + 0.15 * wh * _normal(near, 2, generator=generator)
    size = wh.prod(1).sqrt() * torch.exp(0.25 * _normal(near, generator=generator))
    aspect = wh[:, 0] / wh[:, 1] * torch.exp(0.15 * _normal(near, generator=generator))
    crowd = _place(center, size.clamp(SMALLEST, LARGEST), aspect, image_size)
    boxes = torch.cat([crowd, random_objects(count - near, image_size, generator)])
    return boxes[torch.randperm(count, generator=generator)]


def uniform(objects: Tensor, count: int, image_size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """[count, 4] xyxy anywhere, as an untrained RPN proposes: sizes and shapes as the objects', which are ignored."""
    return random_objects(count, image_size, generator)


def of_one_size(side: float, count: int, image_size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """[count, 4] xyxy anywhere, of sqrt-area `side` pixels, aspect ratio in 1/2..2."""
    aspect = _log_uniform(count, 0.5, 2.0, generator)
    center = _uniform(count, 2, generator=generator) * _extent(image_size)
    return _place(center, torch.full_like(aspect, side), aspect, image_size)


def one_spot(objects: Tensor, count: int, image_size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """[count, 4] xyxy within two pixels of the first object: every gradient atomic hits the same few cells."""
    return _place_exactly(objects[:1].double() + 2 * _uniform(count, 4, generator=generator), image_size)


def whole_map(objects: Tensor, count: int, image_size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """[count, 4] xyxy from one corner of the image to the other, within 5 % of its border."""
    margin = 0.05 * _extent(image_size).repeat(2) * _uniform(count, 4, generator=generator)
    corners = torch.cat([torch.zeros(2, dtype=torch.float64), _extent(image_size)])
    return _place_exactly(corners + margin * torch.tensor([1, 1, -1, -1]), image_size)


def _place_exactly(boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    return torch.minimum(boxes, _extent(image_size).repeat(2) - 0.01).float()


Distribution = Callable[[Tensor, int, tuple[int, int], torch.Generator], Tensor]
DISTRIBUTIONS: dict[str, Distribution] = {f.__name__: f for f in (clustered, uniform, one_spot, whole_map)}


def without_shared_edges(boxes: Tensor, others: Tensor) -> Tensor:
    """`boxes` with those moved by a fraction of a pixel that share a coordinate with, or just touch, one of `others`.

    There the IoU has no derivative, and releases of PyTorch differ in what they return for one.
    """
    shared = torch.zeros(len(boxes), dtype=torch.bool)
    for axis in (0, 1):
        mine, theirs = boxes[:, axis::2].flatten(), others[:, axis::2].flatten()
        shared |= torch.isin(mine, theirs).view(-1, 2).any(dim=1)
    return torch.where(shared[:, None], boxes + 0.0371, boxes)


ANCHOR_STRIDES = (4, 8, 16, 32, 64)


def anchor_grid(image_size: tuple[int, int], strides: Sequence[int] = ANCHOR_STRIDES) -> AnchorGrid:
    """The anchors of an image: one size (8 strides) and three ratios a cell, rounded as torchvision does."""
    ratio = torch.tensor([0.5, 1.0, 2.0]).sqrt()
    halves = [torch.stack([8 * stride / ratio, 8 * stride * ratio], dim=1) / 2 for stride in strides]
    cells = torch.stack([torch.cat([-half, half], dim=1).round() for half in halves])
    extents = tuple((math.ceil(image_size[0] / stride), math.ceil(image_size[1] / stride)) for stride in strides)
    return AnchorGrid(cells, extents, tuple((stride, stride) for stride in strides))
