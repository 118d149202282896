"""What torchvision's model does for the ops of a mask branch, and how a baseline gets their inputs.

| op | torchvision's way |
| --- | --- |
| mask_predictor_loss | ReLU, the convolution to all K channels in the features' dtype, then as mask_bce_loss |
| mask_bce_loss | `maskrcnn_loss`: the class's channel picked, its binary cross-entropy in fp32, as under autocast |
| mask_targets | an image at a time: `project_masks_on_boxes`, which makes its masks floats and calls RoIAlign |
| paste_masks | `paste_masks_in_image`, a mask at a time, then the threshold |

Its masks are of an image's full size, a byte a pixel, and in memory before the clock starts, as its data loader leaves
them; so are its lists of boxes.

torch.compile compiles these ways where the reference takes another one: of mask_predictor_loss, whose reference
multiplies by each RoI's own class, the convolution to all channels is what a model has today, and the row named torch
is the reference as it is. Of mask_targets the reference is one opaque operator. Pasting asks the host for the size of
every box and cannot be traced; mask_bce_loss's reference is torchvision's way.

Convolutions take the quickest of cuDNN's algorithms, and no TF32: fp32 gradients would miss the gate with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import MaskPool

from .inputs import Inputs


@contextlib.contextmanager
def convolutions() -> Iterator[None]:
    """cuDNN tries its algorithms and rounds nothing to TF32; afterwards whatever held before."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.allow_tf32
    cudnn.benchmark, cudnn.allow_tf32 = True, False
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32 = before


def _mask_bce_loss(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    picked = logits[torch.arange(len(labels), device=labels.device), labels]
    return F.binary_cross_entropy_with_logits(picked.float(), targets)


def _mask_predictor_loss(features: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    dtype = features.dtype
    logits = F.conv2d(F.relu(features), weight.to(dtype)[:, :, None, None], bias.to(dtype))
    return _mask_bce_loss(logits, labels, targets)


def by_image(inputs: Inputs) -> Inputs:
    """Lists of each image's masks [n, H, W] at full size, boxes and matches; and the targets' size."""
    pool, boxes, matched, size = inputs.args
    return Inputs(([_full_size(pool, b) for b in range(len(boxes))], list(boxes), list(matched), size))


def _full_size(pool: MaskPool, image: int) -> Tensor:
    """Uint8 [n, H, W]: one at a time, for their places in the pool take eight times their memory."""
    extent = pool.extent[image]
    here = (extent[:, 2] > extent[:, 0]).nonzero()[:, 0].tolist()
    height, width = pool.sizes[image].tolist()
    masks = torch.empty(len(here), height, width, dtype=torch.uint8, device=extent.device)
    for mask, slot in zip(masks, here, strict=True):
        mask.copy_(pool.masks(pool.offset[image, slot : slot + 1], extent[slot : slot + 1])[0, :height, :width])
    return masks


def _mask_targets(masks: list[Tensor], boxes: list[Tensor], matched: list[Tensor], size: int) -> Tensor:
    from torchvision.models.detection.roi_heads import project_masks_on_boxes

    images = zip(masks, boxes, matched, strict=True)
    return torch.stack([project_masks_on_boxes(of, found, index, size) for of, found, index in images])


def _paste_masks(masks: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    return (paste_masks_in_image(masks[:, None], boxes, image_size) > 0.5)[:, 0]


TORCHVISION: dict[str, tuple[Callable[..., object], Callable[[Inputs], Inputs]]] = {
    "mask_predictor_loss": (_mask_predictor_loss, lambda inputs: inputs),
    "mask_bce_loss": (_mask_bce_loss, lambda inputs: inputs),
    "mask_targets": (_mask_targets, by_image),
    "paste_masks": (_paste_masks, lambda inputs: inputs),
}
"""How each op is called, and what its inputs are made into first."""

COMPILED = ("mask_predictor_loss", "mask_targets")
"""Ops of which torch.compile gets torchvision's way."""

MODES: dict[str, Callable[[], AbstractContextManager]] = {"mask_predictor_loss": convolutions}
"""What torchvision's way is to run in, backward pass included."""
