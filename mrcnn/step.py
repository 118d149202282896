"""One training step: eager, compiled, or captured in a CUDA graph; on the device from the images to the new weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .config import TrainConfig
from .graphs import GraphedCalls, first_line, is_compiler_error
from .inference import autocast
from .modeling import MaskRCNN
from .optim import Update
from .structures import Batch


class TrainingStep:
    """images -> losses -> gradients -> weights; nothing in it waits for the device.

    `config.compile` compiles forward and losses as one graph of torch.compile; their backward comes with it.
    `config.cuda_graphs` captures the whole step. Where something of that cannot be had, the step runs without, from
    that call on, and `on_note` gets a sentence that says why.

    The losses are read by whoever wants to wait for them; what a captured step returns is overwritten by the next.
    """

    def __init__(
        self,
        model: MaskRCNN,
        config: TrainConfig,
        *,
        start: int = 0,
        on_note: Callable[[str], None] = lambda sentence: None,
        phase: Callable[[str], AbstractContextManager] = lambda name: nullcontext(),
    ) -> None:
        """Steps of a run that has taken `start`, of a model on its device and in training mode.

        `phase` gives a context for each of "forward", "backward" and "update": for profilers.
        """
        self.model, self.on_note, self.phase = model, on_note, phase
        self.update = Update(model, config, start)
        # Batches have few shapes, or a graph would gain nothing: each is compiled for itself.
        self._compiled = torch.compile(model, fullgraph=True, dynamic=False) if config.compile else None
        self._graphs = GraphedCalls(self._step, on_note=on_note) if config.cuda_graphs else None

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Change the weights by one step; the losses by name, detached, on the device."""
        return self._step(batch) if self._graphs is None else self._graphs(batch)

    @property
    def mode(self) -> str:
        """ "eager", "compiled" or "captured": how the last call ran."""
        if self._graphs is not None and self._graphs.captured:
            return "captured"
        return "eager" if self._compiled is None else "compiled"

    def _step(self, batch: Batch) -> dict[str, Tensor]:
        try:
            losses = self._gradients(batch)
        except Exception as error:
            if self._compiled is None or not is_compiler_error(error):
                raise
            self.on_note(f"not compiled: {first_line(error)}")
            self._compiled = None
            losses = self._gradients(batch)
        with self.phase("update"):
            self.update()
        return losses

    def _gradients(self, batch: Batch) -> dict[str, Tensor]:
        """Losses, whose gradients are then in the parameters."""
        self.update.optimizer.zero_grad(set_to_none=True)
        forward = self.model
        if self._compiled is not None:
            forward = self._compiled
            torch._dynamo.maybe_mark_dynamic(batch.targets.masks.bitmaps, 0)  # each batch has another length
        with self.phase("forward"), autocast(batch.images.device):
            losses = forward(batch.images, batch.sizes, batch.targets)
        with self.phase("backward"):
            sum(losses.values()).backward()
        return {name: loss.detach() for name, loss in losses.items()}
