"""Milliseconds of forward, backward and update: device events, also where the step is one captured graph."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PhaseClock:
    """Called with a phase's name it is a context around that phase; `milliseconds` are those of the last step.

    While a graph is captured its events become nodes of the graph ("external" events), so that each replay sets them
    anew, though no Python of the step runs then. On a CPU it reads the wall clock.
    """

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        self._marks: dict[str, tuple] = {}
        self._captured: list[tuple] = []  # events that a graph refers to must not go before it

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """A phase of the step."""
        start, end = self._pair(name)
        self._mark(name, 0, start)
        try:
            yield
        finally:
            self._mark(name, 1, end)

    def milliseconds(self) -> dict[str, float]:
        """Of each phase of the last step; waits for the device."""
        whole = {name: marks for name, marks in self._marks.items() if len(marks) == 2}  # an error may have cut one off
        if not self.on_gpu:
            return {name: 1e3 * (end - start) for name, (start, end) in whole.items()}
        torch.cuda.synchronize()
        return {name: start.elapsed_time(end) for name, (start, end) in whole.items()}

    def _pair(self, name: str) -> tuple:
        if not self.on_gpu:
            return (None, None)
        # New ones each time: an event that a graph sets must not be recorded outside of it.
        external = torch.cuda.is_current_stream_capturing()
        pair = tuple(torch.cuda.Event(enable_timing=True, external=external) for _ in range(2))
        if external:
            self._captured.append(pair)
        return pair

    def _mark(self, name: str, place: int, event: torch.cuda.Event | None) -> None:
        if event is None:
            mark = time.perf_counter()
        else:
            event.record()
            mark = event
        self._marks[name] = (*self._marks.get(name, ())[:place], mark)
