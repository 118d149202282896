"""What the ops of a region proposal network must move and compute: the part of `floors` that counts slots and boxes.

Each function gives (bytes, instructions) of one call. Of bytes are counted, each once:

| op | read | written |
| --- | --- | --- |
| label_anchors | the objects there are, their number, the anchors if there is an object | 5 bytes an anchor and image |
| label_grid_anchors | the same, with the grid's cells for its anchors | the same |
| rpn_loss | which slots are drawn; their index, flag, logit; of positives deltas, match, anchor, object | two sums |
| its backward | the same, and two gradients | the gradients of all logits and deltas, zeros too |
| stable_topk | every value | an index for each of the best |
| decode_proposals | indices; of the anchors among them logit, deltas and anchor; image sizes | 20 bytes a slot |
| nms_mask | which boxes are valid, and these | a byte a box |

A grid's anchors cost its cells, whatever their number. Instructions count nowhere but in stable_topk, which has to look
at every value: bounds on size and position rule out nearly every pair of boxes, and the losses of a few thousand slots
take less time than the gradients' bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels import AnchorGrid

LANES = 32  # of a warp
Work = tuple[int, int]


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _label_anchors(
    backward: bool, dtype: torch.dtype, anchors: Tensor | AnchorGrid, gt_boxes: Tensor, gt_count: Tensor
) -> Work:
    counts = gt_count.clamp(0, gt_boxes.shape[1]).tolist()
    objects = [boxes[:count] for boxes, count in zip(gt_boxes, counts, strict=True)]
    read = anchors.cells if isinstance(anchors, AnchorGrid) else anchors
    written = len(gt_boxes) * len(anchors) * (1 + 4)
    return _bytes(gt_count, *objects) + (_bytes(read) if sum(counts) else 0) + written, 0


def _rpn_loss(
    backward: bool,
    dtype: torch.dtype,
    logits: Tensor,
    deltas: Tensor,
    anchors: Tensor | AnchorGrid,
    gt_boxes: Tensor,
    matched_idx: Tensor,
    index: Tensor,
    drawn: Tensor,
    positive: Tensor,
    *options: float,
) -> Work:
    wide = 8 if dtype == torch.float64 else 4
    image, slot = (drawn & positive).nonzero(as_tuple=True)
    chosen = index[image, slot]
    objects = len((image * (gt_boxes.shape[1] + 1) + matched_idx[image, chosen]).unique())
    slots = _bytes(drawn) + int(drawn.sum()) * (8 + 1 + dtype.itemsize)
    boxes = len(image) * (4 * dtype.itemsize + 4) + objects * 16 + _anchor_bytes(anchors, chosen)
    sums = 2 * wide  # read, as their gradients, by the backward
    gradients = (logits.numel() + deltas.numel()) * dtype.itemsize if backward else 0
    return slots + boxes + sums + gradients, 0


def _anchor_bytes(anchors: Tensor | AnchorGrid, index: Tensor) -> int:
    """Of the anchors that `index` names, each once; images share them."""
    if isinstance(anchors, AnchorGrid):
        return _bytes(anchors.cells) if index.numel() else 0
    return len(index.unique()) * 16


def _stable_topk(backward: bool, dtype: torch.dtype, values: Tensor, k: int) -> Work:
    written = len(values) * min(k, values.shape[1]) * 8
    return values.numel() * dtype.itemsize + written, values.numel() // LANES


def _decode_proposals(
    backward: bool,
    dtype: torch.dtype,
    logits: Tensor,
    deltas: Tensor,
    index: Tensor,
    anchors: Tensor | AnchorGrid,
    image_sizes: Tensor,
    *options: float,
) -> Work:
    image, slot = (index >= 0).nonzero(as_tuple=True)
    chosen = index[image, slot]
    apart = len((image * logits.shape[1] + chosen).unique())
    read = _bytes(index, image_sizes) + apart * 5 * dtype.itemsize + _anchor_bytes(anchors, chosen)
    return read + index.numel() * (16 + 4), 0


def _nms_mask(backward: bool, dtype: torch.dtype, boxes: Tensor, valid: Tensor, threshold: float) -> Work:
    number = valid.sum(dim=1)
    return 2 * valid.numel() + int(number[number > 1].sum()) * 16, 0  # one alone is kept, wherever it lies


WORK: dict[str, Callable[..., Work]] = {
    "label_anchors": _label_anchors,
    "label_grid_anchors": _label_anchors,
    "rpn_loss": _rpn_loss,
    "stable_topk": _stable_topk,
    "decode_proposals": _decode_proposals,
    "nms_mask": _nms_mask,
}
