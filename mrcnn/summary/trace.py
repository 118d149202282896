"""Run the model on tensors without values."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from kernels import HAS_TRITON, MaskPool, use_backend
from kernels.runtime import record_launches

from ..config import Config
from ..errors import ConfigError
from ..modeling import MaskRCNN
from ..structures import Targets
from .notes import write_notes
from .record import Stage, Summary
from .watch import stage_of, watch_stages

STRIDE = 32  # of the coarsest map that the backbone makes: batches are padded to multiples of it


def parse_image_size(text: str) -> tuple[int, int]:
    """(height, width) from "800x1344", or "800" for a square; raises ConfigError."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.strip().isdecimal() and int(side) > 0 for side in sides):
        raise ConfigError(f"--image-size wants HEIGHTxWIDTH, as in 800x1344, or one side of a square, got {text!r}")
    return int(sides[0]), int(sides[-1])


def summarize(
    config: Config, size: tuple[int, int], batch: int = 1, training: bool = True, objects: int = 16
) -> Summary:
    """Trace a training step, or a detection, of `batch` images.

    Args:
        config: of which the section `model` counts.
        size: (height, width) of the images, padded here to multiples of 32 as batches are.
        batch: images.
        training: with losses and their gradients; else detection.
        objects: ground-truth slots an image.

    Raises:
        ConfigError: the model does not take this configuration, or Triton, whose ops are traced, is not installed.
    """
    if not HAS_TRITON:
        raise ConfigError("a summary traces the Triton ops: it needs the package triton, though no GPU")
    height, width = (-(-side // STRIDE) * STRIDE for side in size)
    # As on a GPU, where no shape depends on values; launches are recorded, so that nothing runs.
    with FakeTensorMode(), use_backend("triton"), record_launches(), FlopCounterMode(display=False) as counter:
        model = MaskRCNN(config.model).train(training)
        targets = _targets(batch, objects, (height, width)) if training else None
        images, sizes = torch.zeros(batch, 3, height, width, dtype=torch.uint8), torch.zeros(batch, 2).long()
        try:
            with watch_stages(model, counter) as stages, torch.set_grad_enabled(training):
                result = model(images, sizes, targets)
        except ValueError as error:  # a limit of an op
            raise ConfigError(f"the model cannot be traced with this configuration: {error}") from None
        forward = counter.get_total_flops()
        if training:
            sum(result.values()).backward()
        else:
            rest = forward - sum(stage.flops for stage in stages)  # of the mask channels that detections need
            stages.append(dataclasses.replace(stage_of("detections", result), flops=rest))
        backward = counter.get_total_flops() - forward
    stages.insert(0, _input(images, sizes, targets))
    notes = write_notes(config.model, training)
    return Summary(config.name, training, batch, (height, width), objects, stages, backward, notes)


def _input(images: Tensor, sizes: Tensor, targets: Targets | None) -> Stage:
    """The batch as a stage; how long the pool of masks is depends on the objects."""
    truth = {**vars(targets), **vars(targets.masks)} if targets else {}
    stage = stage_of("input", {"images": images, **truth, "sizes": sizes})
    tensors = [dataclasses.replace(t, shape=("P",)) if t.name == "bitmaps" else t for t in stage.tensors]
    return dataclasses.replace(stage, tensors=tensors)


def _targets(batch: int, objects: int, padded_size: tuple[int, int]) -> Targets:
    """Ground truth without values; a pool of one byte stands for any."""
    pool = MaskPool(
        bitmaps=torch.zeros(1, dtype=torch.uint8),
        offset=torch.zeros(batch, objects, dtype=torch.int64),
        extent=torch.zeros(batch, objects, 4, dtype=torch.int32),
        sizes=torch.zeros(batch, 2, dtype=torch.int64),
        padded_size=padded_size,
    )
    return Targets(
        boxes=torch.zeros(batch, objects, 4),
        labels=torch.zeros(batch, objects, dtype=torch.int64),
        count=torch.zeros(batch, dtype=torch.int32),
        masks=pool,
    )
