"""What the SM clock and the power were while something ran: nvidia-smi, asked five times a second."""

from __future__ import annotations

import shutil
import subprocess
from types import TracebackType

import numpy as np

QUERY = ["--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits", "--id=0", "--loop-ms=200"]


class ClockSampler:
    """Context manager; `summary` afterwards, empty where there is no nvidia-smi."""

    def __init__(self, on_gpu: bool) -> None:
        self.program = shutil.which("nvidia-smi") if on_gpu else None
        self.summary: dict[str, float] = {}

    def __enter__(self) -> ClockSampler:
        self._process = None
        if self.program:
            line_by_line = [stdbuf, "-oL"] if (stdbuf := shutil.which("stdbuf")) else []
            self._process = subprocess.Popen(
                [*line_by_line, self.program, *QUERY], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._process is None:
            return
        self._process.terminate()
        text, _ = self._process.communicate(timeout=10)
        self.summary = summarise(text)


def summarise(text: str) -> dict[str, float]:
    """Minimum and median of the clock (MHz) and median power (W) from lines "1980, 512.31"; [N/A] is left out."""
    columns: list[list[float]] = [[], []]
    for line in text.splitlines():
        for values, cell in zip(columns, line.split(","), strict=False):
            try:
                values.append(float(cell))
            except ValueError:
                continue
    clocks, power = columns
    found = {"sm_mhz_min": min(clocks), "sm_mhz_median": float(np.median(clocks))} if clocks else {}
    return found | ({"watts_median": float(np.median(power))} if power else {})
