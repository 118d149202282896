"""What RoIAlign's kernels should take on the training workloads of an H200: predicted from counts, never measured.

Each kernel is compiled as the op launches it, without a GPU, and the instructions of its loops are counted in the
machine code. How often they run follows from the workload's boxes (`predict_work`):

| kernel | warp instructions |
| --- | --- |
| forward, sample by sample | programs x all but the path with masks, which no RoI inside its map takes |
| forward by matrices | chunks of cells x loop + programs x rest |
| gather (backward) | chunks of bins x inner loop + (tile, RoI) pairs x the rest of the outer + programs x the rest |

All times the warps of a program; chunks and pairs count once for each block of channels. The issue time is as if every
scheduler issued an instruction every cycle: latency, bank conflicts and tensor cores can only add to it, and so do the
small kernels in `LEFT_OUT`.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import torch
from rich.table import Table

from kernels import multiscale_roi_align
from kernels.runtime import HAS_TRITON, INTERPRETED, Launch, record_launches

from .floors import floor
from .inputs import Inputs
from .predict_work import Axis, gather_work, matrix_chunks, roi_axes
from .workloads import DTYPE_NAMES, WORKLOADS, Workload

TARGET = "sm_90"
# An H200: 132 multiprocessors of 4 schedulers, each an instruction a cycle. The clock is an assumption, what is left
# of the highest (1.98 GHz) under load; so is the bandwidth of a copy, of 4.8e12 bytes/s in the data sheet.
SCHEDULERS, HERTZ = 132 * 4, 1.75e9
DRAM_BYTES_PER_S = 4.3e12

NAMES = ("train-box", "train-mask", "train-box-uniform", "train-mask-uniform")
# All but the lists issue next to nothing; those about 20 M instructions on each of the workloads, 0.02 ms.
LEFT_OUT = ("roi_geometry_kernel", "group_rois_kernel", "list_rois_kernel")

# "/*0230*/  @!P1 LDG.E.128 R4, desc[UR14][R6.64] ;" or ".L_x_3:"
_LINE = re.compile(r"^\s*(?:(\.L_x_\d+):|/\*[0-9a-f]{4,}\*/\s+(\S[^;]*?)\s*;)", re.MULTILINE)
# "@!P5 BRA `(.L_x_0)", "BRA.U UP0, `(.L_x_0)": what comes before or between makes it conditional.
_BRANCH = re.compile(r"(@\S+\s+)?BRA\S*\s+(.*?)`\((\.L_x_\d+)\)")


class PredictionError(Exception):
    """A kernel cannot be compiled, or its code is not as the model has it."""


@dataclass(frozen=True)
class Code:
    """Machine code: instructions in order, and (from, to, whether always taken) of the branches among them."""

    instructions: list[str]
    branches: list[tuple[int, int, bool]]

    def loops(self, depth: int) -> list[int]:
        """Instructions of `depth` loops, one inside the other, the innermost first.

        Raises:
            PredictionError: the code has other loops than these.
        """
        ends = {}  # of each loop by its start: branches back to it
        for source, to, _ in self.branches:
            if to < source:
                ends[to] = max(source, ends.get(to, 0))
        found = sorted(ends.items(), reverse=True)
        if len(found) != depth or any(inner[1] > outer[1] for inner, outer in pairwise(found)):
            raise PredictionError(f"expected {depth} nested loops, found {found}")
        return [end - start + 1 for start, end in found]

    def without_masks(self) -> int:
        """Instructions that run where an if-else avoids the half with masked loads.

        Raises:
            PredictionError: the code has no such if-else, or several, or loops.
        """
        self.loops(0)
        to_else = {target: source for source, target, always in self.branches if not always}
        found = [(to_else[end + 1], end, join) for end, join, always in self.branches if always and end + 1 in to_else]
        if len(found) != 1:
            raise PredictionError(f"expected one if-else, found {found}")
        ((start, end, join),) = found
        first, last = max((start + 1, end + 1), (end + 1, join), key=lambda half: self._masked_loads(*half))
        return len(self.instructions) - (last - first)

    def _masked_loads(self, start: int, end: int) -> int:
        return sum(text.startswith("@") and "LDG" in text for text in self.instructions[start:end])


def parse_sass(sass: str) -> Code:
    """Read what `nvdisasm -c` prints; padding is left out."""
    instructions, labels = [], {}
    for label, text in _LINE.findall(sass):
        if label:
            labels[label] = len(instructions)
        elif not text.startswith("NOP"):
            instructions.append(text)
    found = [(i, _BRANCH.match(text)) for i, text in enumerate(instructions)]
    return Code(instructions, [(i, labels[m[3]], not (m[1] or m[2])) for i, m in found if m])


def machine_code(launch: Launch) -> tuple[Code, int]:
    """(code, warps of a program) of a launch, compiled for `TARGET`."""
    if not HAS_TRITON or INTERPRETED:
        raise PredictionError("Triton has to compile: install it, and do not set TRITON_INTERPRET")
    from triton.runtime import driver

    from .resources.worker import AbsentDevice

    driver.set_active(AbsentDevice(TARGET))
    compiled = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.meta)
    return _disassemble(compiled.asm["cubin"]), compiled.metadata.num_warps


@functools.cache  # workloads share kernels
def _disassemble(cubin: bytes) -> Code:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.nvdisasm.path, "-c", "-ndf", str(path)]
        return parse_sass(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)


def _samples(code: Code, launch: Launch, y: Axis, x: Axis) -> int:
    return launch.grid[0] * launch.grid[1] * code.without_masks()


def _matrix(code: Code, launch: Launch, y: Axis, x: Axis) -> int:
    (loop,) = code.loops(1)
    rest = launch.grid[0] * (len(code.instructions) - loop)
    return launch.grid[1] * (rest + loop * matrix_chunks(y, x, launch.meta["ROWS"], launch.meta["BLOCK_CELLS"]))


def _gather(code: Code, launch: Launch, y: Axis, x: Axis) -> int:
    inner, outer = code.loops(2)
    meta = launch.meta
    pairs, chunks = gather_work(y, x, meta["TILE_H"], meta["TILE_W"], meta["BLOCK_BINS"])
    blocks = -(-meta["CHANNELS"] // meta["BLOCK_C"])
    return launch.grid[0] * (len(code.instructions) - outer) + blocks * (pairs * (outer - inner) + chunks * inner)


_MODELS: dict[str, tuple[str, Callable[[Code, Launch, Axis, Axis], int]]] = {
    "roi_align_forward_kernel": ("forward", _samples),
    "roi_align_matrix_kernel": ("forward", _matrix),
    "roi_align_gather_kernel": ("backward", _gather),
}


@dataclass(frozen=True)
class Prediction:
    """One kernel on one workload."""

    workload: str
    dtype: str
    direction: str
    kernel: str
    instructions: int  # of warps
    dram_bytes: int  # the floor: what no implementation can do without

    @property
    def issue_s(self) -> float:
        """Seconds to issue the instructions."""
        return self.instructions / (SCHEDULERS * HERTZ)

    @property
    def dram_s(self) -> float:
        """Seconds to move the floor's bytes."""
        return self.dram_bytes / DRAM_BYTES_PER_S


def predict(workloads: Iterable[Workload]) -> Iterator[Prediction]:
    """Predict each workload of `multiscale_roi_align` with channels_last maps, in each dtype, forward and backward."""
    for workload in workloads:
        for dtype in workload.dtypes:
            inputs = workload.boxes_only(dtype)
            maps, *call = inputs.args
            y, x = roi_axes([m.shape for m in maps], *call)
            for launch in _launches(inputs):
                name = launch.kernel.__name__
                if name in LEFT_OUT:
                    continue
                if name not in _MODELS:
                    raise PredictionError(f"there is no model of {name}")
                direction, model = _MODELS[name]
                code, warps = machine_code(launch)
                dram_bytes = floor(workload.op, direction, inputs, dtype).dram_bytes
                instructions = warps * model(code, launch, y, x)
                yield Prediction(workload.name, DTYPE_NAMES[dtype], direction, name, instructions, dram_bytes)


def _launches(inputs: Inputs) -> list[Launch]:
    """Of the forward and the backward. The maps are never touched: they take no memory, whatever their size."""
    maps, *call = inputs.args
    leaves = [torch.empty(m.shape, dtype=m.dtype, memory_format=torch.channels_last).requires_grad_() for m in maps]
    with record_launches() as launches:
        out = multiscale_roi_align(leaves, *call, backend="triton")
        torch.autograd.grad(out, leaves, torch.empty_like(out))
    return launches


def training_workloads() -> list[Workload]:
    """The canonical ones, in the order of `NAMES`."""
    found = {w.name: w for w in WORKLOADS if w.op == "multiscale_roi_align"}
    return [found[name] for name in NAMES]


def prediction_table(predictions: Iterable[Prediction]) -> Table:
    """A line a prediction, and how to read it."""
    title = f"PREDICTED from counts for an H200 ({TARGET}, Triton {version('triton')}), NOT measured"
    how = (
        f"Instructions of warps at {SCHEDULERS * HERTZ / 1e12:.3f}e12/s, the bytes of the DRAM floor at "
        f"{DRAM_BYTES_PER_S / 1e12:.1f}e12/s. The slower of the two bounds the kernel: the floor's share of it is the "
        "most that % of roof can become. Left out: latency, bytes read again, tensor cores, and the kernels for "
        "geometry and lists (about 0.02 ms of a backward by the same count)."
    )
    table = Table(title=title, caption=how)
    for column in ("workload", "type", "pass", "kernel"):
        table.add_column(column, no_wrap=True)
    for column in ("M instr.", "issue ms", "floor MB", "DRAM ms", "bound", "most %"):
        table.add_column(column, justify="right", no_wrap=True)
    for p in predictions:
        table.add_row(
            p.workload,
            p.dtype,
            p.direction,
            p.kernel.removeprefix("roi_align_").removesuffix("_kernel"),
            f"{p.instructions / 1e6:.0f}",
            f"{p.issue_s * 1e3:.3f}",
            f"{p.dram_bytes / 1e6:.0f}",
            f"{p.dram_s * 1e3:.3f}",
            "issue" if p.issue_s > p.dram_s else "DRAM",
            f"{100 * p.dram_s / max(p.issue_s, p.dram_s):.0f}",
        )
    return table
