"""The RPN loss in plain PyTorch, differentiable by autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rpn_loss(
    logits: Tensor,
    deltas: Tensor,
    anchors: Tensor,
    gt_boxes: Tensor,
    matched_idx: Tensor,
    index: Tensor,
    drawn: Tensor,
    positive: Tensor,
    box_beta: float,
) -> tuple[Tensor, Tensor]:
    """See `op.rpn_loss`; anchors [A, 4]."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    positive = positive & drawn
    index = torch.where(drawn, index, 0)
    # Replaced before the losses: NaN in a slot that does not count times a zero gradient is still NaN.
    logits = torch.where(drawn, logits.gather(1, index).to(dtype), 0)
    deltas = torch.where(positive[..., None], _take(deltas, index).to(dtype), 0)
    objectness = F.binary_cross_entropy_with_logits(logits, positive.to(dtype), reduction="none")

    matched = matched_idx.gather(1, index).long()
    gt_boxes = F.pad(gt_boxes, (0, 0, 0, 1), value=float("nan"))  # one more, for a match that does not exist
    matched = torch.where((matched >= 0) & (matched < gt_boxes.shape[1] - 1), matched, gt_boxes.shape[1] - 1)
    wanted = encode(_take(gt_boxes, matched).to(dtype), anchors[index].to(dtype))
    wanted = torch.where(positive[..., None], wanted, 0)
    error = F.smooth_l1_loss(deltas, wanted, beta=box_beta, reduction="none").sum(-1)
    return (objectness * drawn).sum(), (error * positive).sum()


def encode(boxes: Tensor, references: Tensor) -> Tensor:
    """Deltas (dx, dy, dw, dh) that move `references` onto `boxes`, both [..., 4] xyxy; torchvision's BoxCoder.

    A box or reference without width or height (an empty slot) gives zeros rather than NaN.
    """
    center, size = center_size(boxes)
    reference_center, reference_size = center_size(references)
    empty = (reference_size <= 0).any(-1, keepdim=True) | (size <= 0).any(-1, keepdim=True)
    reference_size = torch.where(empty, 1.0, reference_size)
    size = torch.where(empty, 1.0, size)
    shift = (center - reference_center) / reference_size
    scale = torch.log(size / reference_size)
    return torch.where(empty, 0.0, torch.cat([shift, scale], dim=-1))


def center_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Centres and sizes, [..., 2] each, of boxes [..., 4] xyxy."""
    size = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + 0.5 * size, size


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Rows of [B, R, d] at index [B, S]: [B, S, d]."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))
