"""The phases of a step, as ranges of the trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch.profiler import record_function

from mrcnn.modeling import MaskRCNN

PREFIX = "mrcnn: "  # of the ranges' names in the trace
STEP, BACKWARD, OPTIMIZER, WAIT, OTHER = "step", "backward", "optimizer", "wait for the device", "between the phases"


@contextmanager
def watch_phases(model: MaskRCNN, optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
    """Open a range of the trace around every stage, the optimizer, and what lies between the losses and it."""
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
        if optimizer is not None:
            hooks.enter_context(model.register_forward_hook(partial(start, BACKWARD)))
            hooks.enter_context(optimizer.register_step_pre_hook(partial(stop, BACKWARD)))
            hooks.enter_context(optimizer.register_step_pre_hook(partial(start, OPTIMIZER)))
            hooks.enter_context(optimizer.register_step_post_hook(partial(stop, OPTIMIZER)))
        yield
