"""The captured step against the step without a graph: losses of every step and the weights after them, bit for bit.

Both are compiled from the same code, with deterministic algorithms, and start from the same weights; before each step
the random state is set, so that both draw the same samples. In a process of its own: cuBLAS reads at its start what
makes it deterministic, and other rows must not be measured so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

STEPS = {"cuda": 100, "cpu": 3}
MakeStep = Callable[[bool], Callable[[], dict[str, Tensor]]]


def check_bitwise(make: MakeStep, steps: int) -> dict:
    """Run both, one after the other.

    Args:
        make: a step of a new model, as a graph or not; it has `model`, and `mode` where it is known.
        steps: how many.

    Returns:
        equal; steps; first_difference, the number of the step whose losses differ first, from 1, or None; the names of
        the weights that differ; modes of the two.
    """
    runs = [_run(make, graph, steps) for graph in (False, True)]
    (losses, weights, mode), (other_losses, other_weights, other_mode) = runs
    same = (losses == other_losses).all(1)  # NaN is equal to nothing: a step that has one has failed
    different = [name for name, weight in weights.items() if not torch.equal(weight, other_weights[name])]
    first = None if same.all() else int((~same).nonzero()[0]) + 1
    return {
        "equal": first is None and not different,
        "steps": steps,
        "first_difference": first,
        "weights": different,
        "modes": [mode, other_mode],
    }


def _run(make: MakeStep, graph: bool, steps: int) -> tuple[Tensor, dict[str, Tensor], str]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        step = make(graph)
        losses = []
        for number in range(steps):
            torch.manual_seed(number)
            losses.append(torch.stack([*step().values()]).clone())  # a replay overwrites what the last one gave
        weights = {name: value.cpu() for name, value in step.model.state_dict().items()}
        return torch.stack(losses).cpu(), weights, getattr(step, "mode", "unknown")
    finally:
        torch.use_deterministic_algorithms(before)


def check_in_process(device: str, seconds: float) -> dict:
    """`check_bitwise` of this project's step in a process of its own.

    Raises:
        RuntimeError: it failed or took longer; the message is its last line.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "check.json"
        environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        command = [sys.executable, "-m", "bench.step.bitwise", device, str(path)]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"not done after {seconds:.0f} s") from None
        if done.returncode or not path.exists():
            raise RuntimeError((done.stderr.strip().splitlines() or ["no reason given"])[-1])
        return json.loads(path.read_text())


def _main(device: str, path: str) -> None:
    from .ours import Options, OurStep
    from .workload import FULL, SMALL, make_workload

    workload = make_workload(FULL if device == "cuda" else SMALL, torch.device(device))
    notes: list[str] = []

    def make(graph: bool) -> OurStep:
        ops = "auto" if device == "cuda" else "torch"
        return OurStep(workload, lambda name: nullcontext(), Options(ops=ops, graph=graph), notes.append)

    Path(path).write_text(json.dumps(check_bitwise(make, STEPS[device]) | {"notes": notes}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
