"""Training with the Triton kernels beside training with the reference ops, from one state, step by step."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from rich.table import Table

from kernels import launch_counts, use_backend
from kernels.roi_align.reference import assign_levels, level_thresholds
from mrcnn.modeling import MaskRCNN, roi_heads, rpn
from mrcnn.structures import Batch

TOLERANCE = 1e-4
DECODE_TOLERANCE = 1e-2  # pixels: boxes and an exponential in fp32
KERNELS = {
    "joint_multiscale_roi_align": (
        "roi_geometry_kernel",
        "roi_align_forward_kernel",
        "group_rois_kernel",
        "list_rois_kernel",
        "roi_align_gather_kernel",
    ),
    "label_grid_anchors": ("best_iou_with_grid_kernel", "label_anchors_kernel"),
    "rpn_loss": ("rpn_loss_forward_kernel", "rpn_loss_backward_kernel"),
    "stable_topk": ("topk_keys_kernel",),
    "decode_proposals": ("decode_proposals_kernel",),
    "nms_mask": ("nms_words_kernel", "nms_sweep_kernel"),
    "mask_targets": ("mask_targets_kernel",),
    "mask_predictor_loss": (
        "mask_predictor_forward_kernel",
        "weighted_mean_kernel",
        "mask_predictor_features_kernel",
        "mask_predictor_weight_kernel",
    ),
}
"""The kernels that a training step launches: it forms no IoU matrix and no logits of all classes' masks, so those of
box_iou and of mask_bce_loss are not among them. The other RoIAlign ops launch the same kernels; label_anchors, which
matches the RoIs, shares the second of label_grid_anchors."""


@dataclass
class Following:
    """What was seen over the steps."""

    launches: Counter = field(default_factory=Counter)
    losses: list[tuple[float, float]] = field(default_factory=list)  # total loss: Triton's, the reference's
    loss_errors: list[float] = field(default_factory=list)  # relative differences of the losses
    gradient_errors: list[float] = field(default_factory=list)  # a parameter: |difference| / |gradient|
    decode_errors: list[float] = field(default_factory=list)  # largest differences of proposals, pixels
    score_errors: list[float] = field(default_factory=list)  # and of their scores, -1 where they are dropped
    pyramid_gradients: list[float] = field(default_factory=list)  # norm of the gradient of the pyramid's weights
    rois: list[int] = field(default_factory=list)  # RoIs pooled, a set
    levels: list[int] = field(default_factory=list)  # pyramid levels they were on, a set
    anchors: int = 0

    @property
    def loss_error(self) -> float:
        """The largest, NaN if one is."""
        return torch.tensor(self.loss_errors).max().item()  # unlike max(), a tensor's keeps a NaN

    @property
    def gradient_error(self) -> float:
        """The largest of any parameter in any step, NaN if one is."""
        return torch.tensor(self.gradient_errors).max().item()

    @property
    def decode_error(self) -> float:
        """The largest of any coordinate of a proposal in any step, in pixels, NaN if one is."""
        return torch.tensor(self.decode_errors).max().item()

    @property
    def score_error(self) -> float:
        """The largest of any proposal's score in any step, NaN if one is."""
        return torch.tensor(self.score_errors).max().item()

    @property
    def smallest_gradient(self) -> float:
        """Of the pyramid in any step, NaN if one is."""
        return torch.tensor(self.pyramid_gradients).min().item()

    @property
    def ok(self) -> bool:
        """Whether losses and gradients agree and every kernel did real work."""
        return (
            self.loss_error <= TOLERANCE
            and self.decode_error <= DECODE_TOLERANCE
            and self.score_error <= TOLERANCE
            and self.gradient_error <= TOLERANCE
            and self.smallest_gradient > 0
            and all(self.launches[k] for kernels in KERNELS.values() for k in kernels)
            and max(self.rois) >= 8
            and max(self.levels) >= 3
            and self.anchors >= 1000
        )


def follow(
    model: MaskRCNN, batches: list[Batch], lr: float, on_step: Callable[[int], None] = lambda step: None
) -> Following:
    """Train two copies of `model` on `batches`, one with the Triton kernels and one with the reference ops.

    Each copy takes its own SGD steps; nothing is copied between them after the start. Both draw the same random
    numbers. Weights and features are fp64: in fp32 a rounding error of 1e-7 puts a few of a million ReLUs on the
    other side of zero, and that alone moves the gradient by 1e-3, whichever op it came from.
    """
    seen = Following(anchors=_number_of_anchors(model, batches[0]))
    ours, reference = _in_double(model), _in_double(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr) for m in (ours, reference)]
    for step, batch in enumerate(batches, 1):
        launch_counts.clear()
        with use_backend("triton"), _watch_pooling(seen), _watch_decoding(seen):
            ours_losses = _backward(ours, batch, seed=step)
        seen.launches += launch_counts
        with use_backend("torch"):
            reference_losses = _backward(reference, batch, seed=step)
        _compare(seen, ours, reference, ours_losses, reference_losses)
        for optimizer in optimizers:
            optimizer.step()
        on_step(step)
    return seen


def _in_double(model: MaskRCNN) -> MaskRCNN:
    """A copy with fp64 weights; anchors and boxes stay fp32."""
    model = copy.deepcopy(model).train()
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    return model


def _backward(model: MaskRCNN, batch: Batch, seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    model.zero_grad()
    losses = model(model.normalize(batch.images, batch.sizes).double(), batch.sizes, batch.targets)
    sum(losses.values()).backward()
    return {name: loss.item() for name, loss in losses.items()}


def _compare(seen: Following, ours: MaskRCNN, reference: MaskRCNN, ours_losses: dict, reference_losses: dict) -> None:
    seen.losses.append((sum(ours_losses.values()), sum(reference_losses.values())))
    for name, loss in reference_losses.items():
        seen.loss_errors.append(abs(ours_losses[name] - loss) / max(abs(loss), 1e-3))
    for mine, other in zip(ours.parameters(), reference.parameters(), strict=True):
        seen.gradient_errors.append(((mine.grad - other.grad).norm() / other.grad.norm().clamp(min=1e-12)).item())
    seen.pyramid_gradients.append(torch.cat([p.grad.flatten() for p in ours.fpn.parameters()]).norm().item())


def _number_of_anchors(model: MaskRCNN, batch: Batch) -> int:
    with torch.no_grad():
        features = model.fpn(model.backbone(model.normalize(batch.images, batch.sizes)))
        return len(model.anchors(features, tuple(batch.images.shape[-2:])))


@contextmanager
def _watch_pooling(seen: Following) -> Iterator[None]:
    """Note how many RoIs are pooled, and from how many levels."""
    pool = roi_heads.joint_multiscale_roi_align

    def watched(features, rois, sizes, scales, *args):  # noqa: ANN001
        for rows in rois:
            real = rows[rows[:, 3] > rows[:, 1]]  # not the empty slots
            seen.rois.append(len(real))
            seen.levels.append(len(assign_levels(real, level_thresholds(scales, args[-1], 4)).unique()))
        return pool(features, rois, sizes, scales, *args)

    roi_heads.joint_multiscale_roi_align = watched
    try:
        yield
    finally:
        roi_heads.joint_multiscale_roi_align = pool


@contextmanager
def _watch_decoding(seen: Following) -> Iterator[None]:
    """Compare the proposals with the reference's, and go on from the latter.

    Decoding takes an exponential, whose last bit differs. Boxes decide: one that is moved across a threshold by it
    makes two different runs of the two, which nothing could be learnt from.
    """
    decode = rpn.decode_proposals

    def watched(*args):
        (ours, our_scores), (boxes, scores) = decode(*args), decode(*args, backend="torch")
        seen.decode_errors.append((ours - boxes).abs().max().item())  # of boxes that only one of them drops: large
        seen.score_errors.append((our_scores - scores).abs().max().item())
        return boxes, scores

    rpn.decode_proposals = watched
    try:
        yield
    finally:
        rpn.decode_proposals = decode


def following_table(seen: Following, steps: int) -> Table:
    """Every op's launches and what it worked on."""
    work = {
        "joint_multiscale_roi_align": f"{min(seen.rois)}-{max(seen.rois)} RoIs, {max(seen.levels)} levels",
        "label_grid_anchors": f"{seen.anchors} anchors",
        "decode_proposals": f"boxes off by {seen.decode_error:.0e} pixels",
    }
    table = Table(
        title=f"{steps} training steps in fp64 with the Triton kernels beside the reference",
        caption="roi_align and multiscale_roi_align launch the same kernels",
    )
    for column in ("op", "kernel", "launches", "worked on"):
        table.add_column(
            column, justify="right" if column == "launches" else "left", no_wrap=column in ("op", "kernel")
        )
    for op, kernels in KERNELS.items():
        for kernel in kernels:
            table.add_row(op, kernel, str(seen.launches[kernel]), work.get(op, ""))
    return table
