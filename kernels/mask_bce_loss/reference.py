"""The mask loss in plain PyTorch, differentiable by autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor


def mask_bce_rows(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Mean BCE of each RoI's own class channel: [N, K, M, M], [N], [N, M, M] -> [N]; 0 where the label is negative."""
    empty = (labels < 0)[:, None, None]
    rows = torch.arange(len(labels), device=labels.device)
    channel = logits[rows, labels.clamp(min=0)]
    # Replaced before the loss, not after it: NaN times a zero gradient is still NaN.
    channel = torch.where(empty, 0, channel if channel.dtype == torch.float64 else channel.float())
    loss = F.binary_cross_entropy_with_logits(channel, targets.to(channel.dtype), reduction="none")
    return torch.where(empty, 0, loss).mean(dim=(1, 2))


def weighted_mean(rows: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    """sum(w * l) / max(sum(w), 1) over the slots with a label: [N], [N], [N] -> scalar."""
    weights = torch.ones_like(rows) if weights is None else weights.detach().to(rows.dtype)
    weights = torch.where(labels >= 0, weights, 0)  # chosen, not multiplied: an empty slot's weight may be NaN
    return (weights * rows).sum() / weights.sum().clamp(min=1)
