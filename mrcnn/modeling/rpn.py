"""Region proposal network (arXiv:1506.01497): head, loss, and proposals with fixed shapes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import label_anchors

from ..config import ModelConfig
from ..structures import Targets
from .boxes import clip, decode, encode, take
from .nms import nms_mask
from .sampling import sample

MIN_SIZE = 1e-3  # pixels; smaller proposals are dropped


class RPNHead(nn.Module):
    """A shared 3x3 convolution, then objectness and deltas of the cell's anchors."""

    def __init__(self, channels: int, anchors_per_cell: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.objectness = nn.Conv2d(channels, anchors_per_cell, 1)
        self.deltas = nn.Conv2d(channels, anchors_per_cell * 4, 1)
        for conv in (self.conv, self.objectness, self.deltas):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """P2..P6 -> logits [B, A] and deltas [B, A, 4], fp32, in the order of `grid_anchors`."""
        hidden = [F.relu(self.conv(f)) for f in features]
        logits = [_by_anchor(self.objectness(h), 1).squeeze(-1) for h in hidden]
        deltas = [_by_anchor(self.deltas(h), 4) for h in hidden]
        return torch.cat(logits, dim=1).float(), torch.cat(deltas, dim=1).float()


def _by_anchor(x: Tensor, values: int) -> Tensor:
    """[B, a * values, H, W] -> [B, H * W * a, values]."""
    batch, _, height, width = x.shape
    return x.view(batch, -1, values, height, width).permute(0, 3, 4, 1, 2).reshape(batch, -1, values)


def rpn_loss(
    logits: Tensor, deltas: Tensor, anchors: Tensor, targets: Targets, config: ModelConfig
) -> dict[str, Tensor]:
    """Losses of a sample of anchors: objectness [B, A] against labels, deltas [B, A, 4] of the positive ones."""
    labels, matched = label_anchors(
        anchors, targets.boxes, targets.count, config.rpn_high_threshold, config.rpn_low_threshold
    )
    index, drawn, positive = sample(labels, config.rpn_samples, config.rpn_positive_fraction)
    number = drawn.sum().clamp(min=1)

    objectness = F.binary_cross_entropy_with_logits(logits.gather(1, index), positive.float(), reduction="none")
    matched_boxes = take(targets.boxes, matched.long().gather(1, index))
    wanted = encode(matched_boxes, anchors[index])
    error = F.smooth_l1_loss(take(deltas, index), wanted, beta=1 / 9, reduction="none").sum(-1)
    return {
        "loss_objectness": (objectness * drawn).sum() / number,
        "loss_rpn_box": (error * positive).sum() / number,
    }


@torch.no_grad()
def propose(
    logits: Tensor,
    deltas: Tensor,
    anchors: Tensor,
    level_sizes: Sequence[int],
    sizes: Tensor,
    config: ModelConfig,
    training: bool,
) -> tuple[Tensor, Tensor]:
    """The best boxes of each image after NMS within each level.

    Args:
        logits, deltas: [B, A] and [B, A, 4] from the head.
        anchors: [A, 4].
        level_sizes: number of anchors of each level, summing to A.
        sizes: [B, 2] heights and widths of the images.
        config: thresholds and numbers.
        training: which of the numbers to take.

    Returns:
        boxes [B, N, 4], best first, and valid bool [B, N], with N = post_nms_top_n, or fewer where there are not as
        many candidates.
    """
    batch, levels = len(logits), len(level_sizes)
    top_n = config.pre_nms_top_n[0 if training else 1]
    width = min(top_n, max(level_sizes))
    scores = logits.new_full((batch, levels, width), -1.0)
    boxes = logits.new_zeros(batch, levels, width, 4)
    offsets = [sum(level_sizes[:i]) for i in range(levels)]
    for level, (offset, count) in enumerate(zip(offsets, level_sizes, strict=True)):
        # A stable sort, not topk: equal scores keep their order, so that two runs and two devices agree.
        order = logits[:, offset : offset + count].sort(dim=1, descending=True, stable=True).indices
        index = order[:, :top_n] + offset
        found = index.shape[1]
        scores[:, level, :found] = logits.gather(1, index).sigmoid()
        boxes[:, level, :found] = decode(take(deltas, index), anchors[index])
    boxes = clip(boxes, sizes)
    valid = (scores >= 0) & (boxes[..., 2:] - boxes[..., :2] >= MIN_SIZE).all(-1)
    boxes = torch.where(valid[..., None], boxes, 0.0)  # a diverged model's NaN must not reach an index
    keep = nms_mask(boxes.flatten(0, 1), valid.flatten(0, 1), config.rpn_nms_threshold).view_as(valid)

    scores = torch.where(keep, scores, -1.0).flatten(1)
    scores, index = scores.sort(dim=1, descending=True, stable=True)
    index = index[:, : config.post_nms_top_n[0 if training else 1]]
    return take(boxes.flatten(1, 2), index), scores[:, : index.shape[1]] >= 0
