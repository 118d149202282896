"""The hooks that see what enters and leaves each stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..modeling import MaskRCNN
from .record import NamedTensor, Stage

# What a stage returns, where it is a tuple or a tensor. Dictionaries and dataclasses bring their own names.
OUTPUTS = {
    "normalize": ("images",),
    "backbone.stem": ("stem",),
    **{f"backbone.stages.{i}": (f"C{i + 2}",) for i in range(4)},
    "fpn": ("P2", "P3", "P4", "P5", "P6"),
    "rpn": ("logits", "deltas"),
    "proposals": ("boxes", "valid"),
    "pooler": ("pooled", "pooled for masks"),
    "box_head": ("logits", "deltas"),
    "box_selection": ("boxes", "labels", "scores", "count"),
    "mask_head": ("features",),
}


@contextmanager
def watch_stages(model: MaskRCNN, counter: FlopCounterMode) -> Iterator[list[Stage]]:
    """Collect the stages, in the order in which they are called, while the block calls the model."""
    watcher = _Watcher(counter)
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if name in OUTPUTS or (name not in ("", "backbone") and "." not in name):
                hooks.enter_context(module.register_forward_pre_hook(watcher.enter))
                hooks.enter_context(module.register_forward_hook(partial(watcher.leave, name)))
        hooks.enter_context(model.rpn.joined.register_forward_hook(watcher.level))
        yield watcher.stages


class _Watcher:
    """What the hooks share."""

    def __init__(self, counter: FlopCounterMode) -> None:
        self.counter = counter
        self.stages: list[Stage] = []
        self.of_anchors: list[Any] = []  # the anchors, and what there is one of for each of them
        self.maps: list[NamedTensor] = []  # of the RPN, level by level, before the levels are joined
        self.before = 0

    def enter(self, module: nn.Module, args: tuple) -> None:
        """A part is about to be called."""
        self.before = self.counter.get_total_flops()

    def level(self, module: nn.Module, args: tuple, out: list[Tensor]) -> None:
        """The RPN has made both maps of its next level."""
        names = ("objectness", "deltas")
        level = 2 + len(self.maps) // len(names)
        self.maps += [NamedTensor(f"{name} P{level}", tuple(t.shape)) for name, t in zip(names, out, strict=True)]

    def leave(self, name: str, module: nn.Module, args: tuple, out: Any) -> None:
        """A part has returned `out`."""
        returned = _named(name, out)
        if name in ("rpn", "anchors"):
            self.of_anchors += [out, *returned.values()]
        stage = stage_of(name, out)
        parameters = list(module.parameters())
        self.stages.append(
            dataclasses.replace(
                stage,
                tensors=[*self.inside(name, module, args, out), *stage.tensors],
                trainable=sum(p.numel() for p in parameters if p.requires_grad),
                frozen=sum(p.numel() for p in parameters if not p.requires_grad),
                flops=self.counter.get_total_flops() - self.before,
                anchors=any(x is y for x in [*args, out, *returned.values()] for y in self.of_anchors),
            )
        )

    def inside(self, name: str, module: nn.Module, args: tuple, out: Any) -> list[NamedTensor]:
        """Tensors that a part makes and does not return."""
        if name == "rpn":
            return self.maps
        if name == "anchors":
            levels = [
                NamedTensor(f"P{level}", (number, 4), f"{'x'.join(map(str, feature.shape[-2:]))}x{module.per_cell}")
                for level, (feature, number) in enumerate(zip(args[0], out.level_sizes, strict=True), 2)
            ]
            return [*levels, NamedTensor("anchors", (len(out), 4), "not stored")]
        if name == "mask_loss":  # one a RoI, of the side of its logits
            rois, _, *sides = args[0].shape
            return [NamedTensor("targets", (rois, *sides))]
        return []


def stage_of(name: str, out: Any) -> Stage:
    """A stage that returned `out`, without its weights."""
    tensors = [NamedTensor(key, tuple(tensor.shape)) for key, tensor in _named(name, out).items()]
    return Stage(name, tensors)


def _named(name: str, out: Any) -> dict[str, Tensor]:
    """The tensors that a stage returned, by name."""
    if dataclasses.is_dataclass(out):
        out = vars(out)
    if isinstance(out, dict):
        return {key: value for key, value in out.items() if isinstance(value, Tensor)}
    values = [out] if isinstance(out, Tensor) else [value for value in out if isinstance(value, Tensor)]
    names = OUTPUTS.get(name, ())
    return {names[i] if i < len(names) else f"output {i}": value for i, value in enumerate(values)}
