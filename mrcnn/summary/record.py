"""What a trace of the model finds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class NamedTensor:
    """One that leaves a stage; `note` says what its size is made of."""

    name: str
    shape: tuple[int | str, ...]  # a letter where it depends on the data
    note: str = ""


@dataclass(frozen=True)
class Stage:
    """A module of the model, in the order in which they are called."""

    name: str
    tensors: list[NamedTensor]
    trainable: int = 0  # parameters
    frozen: int = 0
    flops: int = 0  # of the whole batch, forward
    anchors: bool = False  # whether it uses them


@dataclass(frozen=True)
class Summary:
    """A model at one size of batch."""

    config: str
    training: bool
    batch: int
    size: tuple[int, int]  # height and width of the images, padded
    objects: int  # ground-truth slots an image
    stages: list[Stage]
    backward_flops: int  # 0 in inference
    notes: list[str]

    @property
    def trainable(self) -> int:
        """Parameters that training changes."""
        return sum(stage.trainable for stage in self.stages)

    @property
    def frozen(self) -> int:
        """Parameters that stay as they are."""
        return sum(stage.frozen for stage in self.stages)

    @property
    def flops(self) -> int:
        """Of the forward pass of the whole batch."""
        return sum(stage.flops for stage in self.stages)

    @property
    def totals(self) -> str:
        """Parameters and FLOPs in a sentence."""
        parameters = f"{(self.trainable + self.frozen) / 1e6:.2f} M parameters ({self.trainable / 1e6:.2f} M trainable)"
        backward = f", {self.backward_flops / self.batch / 1e9:.1f} backward" if self.training else ""
        return f"{parameters}; GFLOPs an image: {self.flops / self.batch / 1e9:.1f} forward{backward}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the totals among them."""
        totals = {"trainable": self.trainable, "frozen": self.frozen, "flops": self.flops, "totals": self.totals}
        return dataclasses.asdict(self) | totals
