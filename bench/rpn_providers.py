"""What torchvision's model does for the ops of a region proposal network, and how all baselines get their anchors.

Where its code draws at random, or goes on to something else, only the part that the op stands for is timed:

| op | torchvision's way |
| --- | --- |
| label_anchors, label_grid_anchors | an image at a time: box_iou with all anchors, then Matcher |
| rpn_loss | matched boxes gathered and encoded for every anchor of every image, then those that were sampled picked |
| stable_topk | a stable sort: `torch.topk`, which its model calls, leaves open which of equal scores it takes |
| decode_proposals | every anchor of every image decoded, the best picked, then clipped and sized an image at a time |
| nms_mask | `batched_nms` over all groups, with scores that fall from slot to slot |

It has no anchors but in memory: for every baseline they are made before the clock starts, and so is all that it holds
in another form (lists of boxes, masks of what was sampled, Python's image sizes).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import AnchorGrid

from .inputs import Inputs


def with_anchors(inputs: Inputs) -> Inputs:
    """The same with a grid's anchors in memory."""
    return Inputs(tuple(a.anchors() if isinstance(a, AnchorGrid) else a for a in inputs.args), inputs.leaves)


def _box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    from torchvision.ops import box_iou

    if boxes1.ndim == 2:
        return box_iou(boxes1, boxes2)
    return torch.stack([box_iou(a, b) for a, b in zip(boxes1, boxes2, strict=True)])


def _unpad(inputs: Inputs) -> Inputs:
    """Padded ground truth to the list of per-image boxes that torchvision's model holds (views, not copies)."""
    anchors, gt_boxes, gt_count = with_anchors(inputs).args
    return Inputs((anchors, [gt[:n] for gt, n in zip(gt_boxes, gt_count.tolist(), strict=True)]))


def _label_anchors(anchors: Tensor, gt_boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Its codes (-1 below, -2 between) to our labels."""
    from torchvision.models.detection._utils import Matcher
    from torchvision.ops import box_iou

    matcher = Matcher(0.7, 0.3, allow_low_quality_matches=True)
    matches = torch.stack([matcher(box_iou(gt, anchors)) for gt in gt_boxes])
    labels = (matches >= 0).to(torch.int8) - (matches == Matcher.BETWEEN_THRESHOLDS).to(torch.int8)
    return labels, matches.clamp(min=0).to(torch.int32)


def _sampled(inputs: Inputs) -> Inputs:
    """By image: anchors, boxes, matches, labels, and masks of the positive and negative anchors sampled."""
    logits, deltas, anchors, gt_boxes, matched_idx, index, drawn, positive = with_anchors(inputs).args
    masks = []
    for chosen in (drawn & positive, drawn & ~positive):
        mask = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
        image, slot = chosen.nonzero(as_tuple=True)
        mask[image, index[image, slot]] = True
        masks.append(mask)
    labels = masks[0].float()  # of what is not sampled, nothing is read
    by_image = [list(t) for t in (gt_boxes, matched_idx.long(), labels, *masks)]
    return Inputs((logits, deltas, [anchors] * len(logits), *by_image), inputs.leaves)


def _rpn_loss(
    logits: Tensor,
    deltas: Tensor,
    anchors: list[Tensor],
    gt_boxes: list[Tensor],
    matches: list[Tensor],
    labels: list[Tensor],
    positives: list[Tensor],
    negatives: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """Its `assign_targets_to_anchors` from the matches on, BoxCoder, `compute_loss`; fp32, as under its autocast."""
    from torchvision.models.detection._utils import BoxCoder

    matched = [boxes[match] for boxes, match in zip(gt_boxes, matches, strict=True)]
    targets = torch.cat(BoxCoder((1.0, 1.0, 1.0, 1.0)).encode(matched, anchors))
    positive = torch.where(torch.cat(positives))[0]
    sampled = torch.cat([positive, torch.where(torch.cat(negatives))[0]])
    box = F.smooth_l1_loss(
        deltas.flatten(0, 1)[positive].float(), targets[positive], beta=1 / 9, reduction="sum"
    )  # fmt: skip
    logits, wanted = logits.flatten()[sampled].float(), torch.cat(labels)[sampled]
    return F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum"), box


def _stable_topk(values: Tensor, k: int) -> Tensor:
    return values.sort(dim=1, descending=True, stable=True).indices[:, :k]


def _by_image(inputs: Inputs) -> Inputs:
    """A list of anchors and Python's image sizes, as its model holds them."""
    logits, deltas, index, anchors, image_sizes = with_anchors(inputs).args
    return Inputs((logits, deltas, index, [anchors] * len(logits), [tuple(size) for size in image_sizes.tolist()]))


def _decode_proposals(
    logits: Tensor, deltas: Tensor, index: Tensor, anchors: list[Tensor], image_sizes: list[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Its `decode`, which takes all anchors, and `filter_proposals` up to NMS; what it removes is masked."""
    from torchvision.models.detection._utils import BoxCoder
    from torchvision.ops import clip_boxes_to_image, remove_small_boxes

    proposals = BoxCoder((1.0, 1.0, 1.0, 1.0)).decode(deltas, anchors).view(len(deltas), -1, 4)
    image = torch.arange(len(deltas), device=deltas.device)[:, None]
    scores, proposals = torch.sigmoid(logits[image, index]), proposals[image, index]
    found = []
    for boxes, of_image, size in zip(proposals, scores, image_sizes, strict=True):
        boxes = clip_boxes_to_image(boxes, size)
        large = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
        large[remove_small_boxes(boxes, 1e-3)] = True
        found.append((torch.where(large[:, None], boxes, 0.0), torch.where(large, of_image, -1.0)))
    boxes, scores = zip(*found, strict=True)
    return torch.stack(boxes), torch.stack(scores)


def _in_one_list(inputs: Inputs) -> Inputs:
    """The boxes that are valid, in one list, their scores, groups and places; and the shape that the places are in."""
    boxes, valid, threshold = inputs.args
    group, slot = valid.nonzero(as_tuple=True)
    places = group * valid.shape[1] + slot
    return Inputs((boxes[valid], (valid.shape[1] - slot).float(), group, places, tuple(valid.shape), threshold))


def _nms_mask(
    boxes: Tensor, scores: Tensor, groups: Tensor, places: Tensor, shape: tuple[int, int], threshold: float
) -> Tensor:
    from torchvision.ops import batched_nms

    keep = torch.zeros(shape[0] * shape[1], dtype=torch.bool, device=boxes.device)
    keep[places[batched_nms(boxes, scores, groups, threshold)]] = True
    return keep.view(shape)


TORCHVISION: dict[str, tuple[Callable[..., object], Callable[[Inputs], Inputs]]] = {
    "box_iou": (_box_iou, lambda inputs: inputs),
    "label_anchors": (_label_anchors, _unpad),
    "label_grid_anchors": (_label_anchors, _unpad),
    "rpn_loss": (_rpn_loss, _sampled),
    "stable_topk": (_stable_topk, lambda inputs: inputs),
    "decode_proposals": (_decode_proposals, _by_image),
    "nms_mask": (_nms_mask, _in_one_list),
}
"""How each op is called, and what its inputs are made into first."""
