"""CUDA graphs of whole steps: a function of a batch, captured once for each shape of batches and replayed.

A step of Mask R-CNN is some thousand launches; made one by one by the host, they cost more than many of them run for.
Replayed as one graph they cost one. What a graph demands is why the rest of this package is as it is: shapes that do
not depend on data, no host that waits for a value, inputs that lie where they lay when it was captured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels import MaskPool

from .errors import GraphError
from .structures import Batch

LEAST_POOL = 1 << 20  # bytes of mask bitmaps that a static batch holds at least


class GraphedCalls:
    """`function(batch)` as one CUDA graph for each shape of batches, all of them in one memory pool.

    The first `warmup` calls with a shape run as they are, on a copy of the batch that stays in its place: they choose
    algorithms, compile and allocate. The last of them is watched: where it makes the host wait, there is no graph.
    The next call captures and replays. `function` must leave in the same memory what the next call needs.

    What `function` returned when it was captured is what every later call with that shape returns: the same tensors,
    overwritten by the next call with any shape.

    Raises:
        GraphError: a capture failed in a way that the process cannot go on after.

    Attributes:
        reason: why there are no graphs, in one sentence; None as long as there is nothing against them.
    """

    def __init__(
        self,
        function: Callable[[Batch], Any],
        warmup: int = 3,
        limit: int = 8,
        on_note: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        """Graphs of `function`, of at most `limit` shapes; batches of further shapes run without. `on_note` is told."""
        self.function, self.warmup, self.limit, self.on_note = function, warmup, limit, on_note
        self.reason: str | None = None
        self._shapes: dict[tuple, _Shape] = {}
        self._full = False
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def __call__(self, batch: Batch) -> Any:
        """What `function` returns for `batch`, which is on the device."""
        if self.reason is None and not _on_gpu(batch):
            self._give_up("CUDA graphs need a GPU")
        shape = self._shape_of(batch) if self.reason is None else None
        if shape is None:
            return self.function(batch)
        with torch.cuda.device(batch.images.device):  # streams and graphs are the current device's
            shape.batch.fill(batch)
            if shape.graph is not None:
                shape.graph.replay()
                return shape.outputs
            return self._warm_up(shape) if shape.calls < self.warmup else self._capture(shape)

    @property
    def captured(self) -> int:
        """Graphs that there are."""
        return sum(shape.graph is not None for shape in self._shapes.values())

    def _shape_of(self, batch: Batch) -> _Shape | None:
        """What is kept for the batch's shape; None where there are too many."""
        key = shape_key(batch)
        shape = self._shapes.get(key)
        if shape is not None and not shape.batch.holds(batch):  # more mask pixels than ever: a larger copy, a new graph
            del self._shapes[key]
            shape = None
            if not self.captured:
                self._pool = None  # which went with its last graph
        if shape is None:
            if len(self._shapes) == self.limit:
                if not self._full:
                    self.on_note(f"no CUDA graph for more than {self.limit} shapes of batches: the others run without")
                self._full = True
                return None
            shape = self._shapes[key] = _Shape(StaticBatch(batch))
        return shape

    def _warm_up(self, shape: _Shape) -> Any:
        self._stream = self._stream or torch.cuda.Stream()
        shape.calls += 1
        watched, failure, outputs = shape.calls == self.warmup, "", None
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream), _no_waiting() if watched else nullcontext():
                outputs = self.function(shape.batch.batch)
        except RuntimeError as error:
            if not watched or "synchroniz" not in str(error):
                raise
            failure = first_line(error)
        current.wait_stream(self._stream)
        if failure:  # the error, and with it what the call had allocated, is gone by now
            return self._without_graphs(f"the host waits for the device ({failure})", shape)
        return outputs

    def _capture(self, shape: _Shape) -> Any:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph, failure = torch.cuda.CUDAGraph(), ""
        try:
            # thread_local: the thread that pins the loader's memory may go on.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                try:
                    shape.outputs = self.function(shape.batch.batch)
                except RuntimeError as error:
                    failure = first_line(error)
        except RuntimeError as error:
            # PyTorch's random numbers and allocator still believe to be captured then: nothing goes on after it.
            raise GraphError(
                f"capturing the CUDA graph failed ({failure or first_line(error)}), and the process cannot go on: "
                "run without --cuda-graphs (a run that has a checkpoint: --resume --no-cuda-graphs)"
            ) from error
        if failure:
            return self._without_graphs(f"capturing failed ({failure})", shape)
        shape.graph = graph
        graph.replay()  # capturing computed nothing
        return shape.outputs

    def _without_graphs(self, reason: str, shape: _Shape) -> Any:
        self._give_up(reason)
        return self.function(shape.batch.batch)

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        self._shapes.clear()
        self.on_note(f"no CUDA graphs: {reason}")


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Let PyTorch raise where the host would wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@dataclass
class _Shape:
    """What is kept for one shape of batches."""

    batch: StaticBatch
    calls: int = 0  # before it was captured
    graph: torch.cuda.CUDAGraph | None = None
    outputs: Any = None


class StaticBatch:
    """A copy of a batch that stays where it is and takes the values of others of its shape.

    The pool of mask bitmaps has another length in every batch; the copy has room for more than the first one's.
    """

    def __init__(self, batch: Batch) -> None:
        self.batch = batch.map(torch.empty_like)
        if batch.targets is not None:
            length = max(LEAST_POOL, 1 << (4 * len(batch.targets.masks.bitmaps)).bit_length())
            pool = self.batch.targets.masks
            pool = dataclasses.replace(pool, bitmaps=pool.bitmaps.new_zeros(length))
            self.batch = dataclasses.replace(self.batch, targets=dataclasses.replace(self.batch.targets, masks=pool))

    def holds(self, batch: Batch) -> bool:
        """Whether there is room for the batch's mask pixels; its shape must be this one's."""
        if batch.targets is None:
            return True
        return len(batch.targets.masks.bitmaps) <= len(self.batch.targets.masks.bitmaps)

    def fill(self, batch: Batch) -> None:
        """Copy the values of `batch`, without waiting."""
        for own, given in zip(tensors(self.batch), tensors(batch), strict=True):
            own[: len(given)].copy_(given, non_blocking=True)


def tensors(container: Batch | MaskPool | Any) -> list[Tensor]:
    """The tensors of a batch, those of its targets and of their masks too."""
    found: list[Tensor] = []
    container.map(lambda tensor: found.append(tensor) or tensor)
    return found


def shape_key(batch: Batch) -> tuple:
    """What two batches have in common that one graph can take: all shapes and types but the bitmaps' length."""
    pool = batch.targets.masks if batch.targets is not None else None
    shapes = [(tuple(t.shape), t.dtype) for t in tensors(batch) if pool is None or t is not pool.bitmaps]
    return (*shapes, *((tuple(pool.padded_size), pool.packed) if pool is not None else ()))


def _on_gpu(batch: Batch) -> bool:
    return batch.images.is_cuda


def is_compiler_error(error: BaseException) -> bool:
    """Whether torch.compile failed, and not what it compiled."""
    return isinstance(error, (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit))


def first_line(error: BaseException) -> str:
    """Kind and first line of an error, whose rest may fill pages."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
