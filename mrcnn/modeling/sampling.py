"""Random choice of positives and negatives with fixed shapes."""

from __future__ import annotations

import torch
from torch import Tensor


def random_keys(like: Tensor) -> Tensor:
    """One uniform number in [0, 1) for each candidate: the only randomness in sampling."""
    return torch.rand(like.shape, device=like.device)


def sample(labels: Tensor, size: int, positive_fraction: float) -> tuple[Tensor, Tensor, Tensor]:
    """Draw up to `size` candidates an image: at most `positive_fraction` of them positive, the rest negative.

    The numbers torchvision's BalancedPositiveNegativeSampler draws, in tensors whose shapes do not depend on them:
    a slot with nothing to draw is marked, not removed.

    Args:
        labels: [B, R], > 0 positive, 0 negative, < 0 neither.
        size: slots an image.
        positive_fraction: of `size`.

    Returns:
        index int64 [B, S] of the candidates with S = min(size, R), positives first; drawn bool [B, S], False in
        slots left over; positive bool [B, S].
    """
    positives = min(int(size * positive_fraction), labels.shape[1])
    size = min(size, labels.shape[1])
    key = random_keys(labels)
    chance, index = torch.where(labels > 0, key, -1).topk(positives, dim=1)
    # Priority: chosen positives in [2, 3), negatives in [0, 1), everything else negative.
    priority = torch.where(labels == 0, key, -1)
    priority = priority.scatter(1, index, torch.where(chance >= 0, chance + 2, priority.gather(1, index)))
    chosen, index = priority.topk(size, dim=1)
    return index, chosen >= 0, chosen >= 2
