"""The RPN loss in plain PyTorch, differentiable by autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..boxes import encode, take


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
    deltas = torch.where(positive[..., None], take(deltas, index).to(dtype), 0)
    objectness = F.binary_cross_entropy_with_logits(logits, positive.to(dtype), reduction="none")

    matched = matched_idx.gather(1, index).long()
    gt_boxes = F.pad(gt_boxes, (0, 0, 0, 1), value=float("nan"))  # one more, for a match that does not exist
    matched = torch.where((matched >= 0) & (matched < gt_boxes.shape[1] - 1), matched, gt_boxes.shape[1] - 1)
    wanted = encode(take(gt_boxes, matched).to(dtype), anchors[index].to(dtype))
    wanted = torch.where(positive[..., None], wanted, 0)
    error = F.smooth_l1_loss(deltas, wanted, beta=box_beta, reduction="none").sum(-1)
    return (objectness * drawn).sum(), (error * positive).sum()
