"""Choice of positives and negatives with fixed shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import stable_topk


def random_keys(like: Tensor) -> Tensor:
    """One uniform number in [0, 1) for each candidate: the only randomness in sampling."""
    return torch.rand(like.shape, device=like.device)


def sample(
    labels: Tensor,
    size: int,
    positive_fraction: float,
    hardness: Tensor | None = None,
    negative_ratio: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw up to `size` candidates an image: at most `positive_fraction` of them positive, the rest negative.

    With the defaults these are the numbers that torchvision's BalancedPositiveNegativeSampler draws, at random, in
    tensors whose shapes do not depend on them: a slot with nothing to draw is marked, not removed. `hardness` and a
    `negative_ratio` of 3 make it SSD's hard-negative mining (arXiv:1512.02325, section 2.2).

    Args:
        labels: [B, R], > 0 positive, 0 negative, < 0 neither.
        size: slots an image.
        positive_fraction: of `size`.
        hardness: [B, R] >= 0, such as losses: the negatives drawn are those with the highest, instead of random ones.
        negative_ratio: negatives a positive, at most; an image without positives counts as having one, so that it
            teaches something. 0 sets no limit.

    Returns:
        index int64 [B, S] of the candidates with S = min(size, R), positives first; drawn bool [B, S], False in
        slots left over; positive bool [B, S].
    """
    positives = min(int(size * positive_fraction), labels.shape[1])
    size = min(size, labels.shape[1])
    key = random_keys(labels)
    index = torch.where(labels > 0, key, -1).topk(positives, dim=1).indices
    negative_key = key if hardness is None else hardness / (1 + hardness)  # in [0, 1), in the same order
    # Priority: chosen positives in [2, 3), negatives in [0, 1], everything else negative.
    priority = torch.where(labels == 0, negative_key, -1)
    # A scalar is scattered: a tensor is by way of an index_put where algorithms must be deterministic, which waits.
    chosen = torch.zeros_like(labels, dtype=torch.bool).scatter(1, index, True)
    priority = torch.where(chosen & (labels > 0), key + 2, priority)
    if hardness is None:
        chosen, index = priority.topk(size, dim=1)
    else:  # of equally hard ones the first, on every device; random keys are hardly ever equal
        index = stable_topk(priority, size)
        chosen = priority.gather(1, index)
    drawn, positive = chosen >= 0, chosen >= 2
    if negative_ratio > 0:
        number = positive.sum(dim=1, keepdim=True)
        allowed = number + (negative_ratio * number.clamp(min=1)).long()
        drawn &= torch.arange(size, device=labels.device) < allowed
    return index, drawn, positive
