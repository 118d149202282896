"""The phases of a step, as ranges of the trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial

from torch.profiler import record_function

from mrcnn.modeling import MaskRCNN

PREFIX = "mrcnn: "  # of the ranges' names in the trace
FORWARD, BACKWARD, UPDATE = "forward", "backward", "update"  # of `mrcnn.step.TrainingStep`
STEP, WAIT, OTHER = "step", "wait for the device", "between the phases"


@contextmanager
def watch_stages(model: MaskRCNN) -> Iterator[None]:
    """Open a range of the trace around every stage of the forward pass."""
    ranges: dict[str, record_function] = {}

    def start(name: str, *hook_arguments: object) -> None:
        ranges[name] = record_function(PREFIX + name)
        ranges[name].__enter__()

    def stop(name: str, *hook_arguments: object) -> None:
        ranges.pop(name).__exit__(None, None, None)

    with ExitStack() as hooks:
        for name, stage in model.named_children():
            hooks.enter_context(stage.register_forward_pre_hook(partial(start, name)))
            hooks.enter_context(stage.register_forward_hook(partial(stop, name)))
        yield


def phase_range(name: str) -> AbstractContextManager:
    """A range around a phase of the step; of the forward pass there is one around each of its stages instead."""
    return nullcontext() if name == FORWARD else record_function(PREFIX + name)
