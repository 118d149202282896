"""A kernel's machine code, compiled without a GPU: how many instructions its loops have.

Between the lines of a kernel and its instructions stands a compiler that unrolls, splits and merges: what a model of a
kernel takes for granted about the code is checked here, and refused where it does not hold.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from kernels.runtime import HAS_TRITON, INTERPRETED, Launch

TARGET = "sm_90"
RARE = ("CALL",)

# "/*0230*/  @!P1 LDG.E.128 R4, desc[UR14][R6.64] ;", ".L_x_3:", or "$__internal_0_$...:", where a subroutine begins.
_LINE = re.compile(r"^\s*(?:(\.L_x_\d+|\$\S+):|/\*[0-9a-f]{4,}\*/\s+(\S[^;]*?)\s*;)", re.MULTILINE)
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
        found = self._loops()[::-1]
        if len(found) != depth or any(inner[1] > outer[1] for inner, outer in pairwise(found)):
            raise PredictionError(f"expected {depth} nested loops, found {found}")
        return [end - start + 1 for start, end in found]

    def parts(self, shape: str, rare: Sequence[str] = RARE) -> list[int]:
        """Instructions outside of all loops, then those of each loop that are in no loop inside it, by its start.

        `shape` has a pair of brackets a loop: "()(())" is a loop, then one with another one inside. Not counted are
        what a branch skips unless one of the `rare` instructions is needed (the few that call the slow path of a
        division), what stands behind the end, and loops that do nothing but count: the compiler makes them of loops
        that turn out to be empty.

        Raises:
            PredictionError: the code has other loops than these.
        """
        found = [(start, end) for start, end in self._loops() if end - start > 2]
        text, open_ends = "", []
        for start, end in found:
            while open_ends and start > open_ends[-1]:
                text, _ = text + ")", open_ends.pop()
            if open_ends and end > open_ends[-1]:
                raise PredictionError(f"loops overlap: {found}")
            text, _ = text + "(", open_ends.append(end)
        text += ")" * len(open_ends)
        if text != shape:
            raise PredictionError(f"expected the loops {shape or 'none'}, found {text or 'none'}: {found}")
        counts, skipped = [0] * (len(found) + 1), self._skipped(rare)
        for place in range(min(self._end() + 1, len(self.instructions))):
            inside = [number for number, (start, end) in enumerate(found, start=1) if start <= place <= end]
            counts[inside[-1] if inside else 0] += place not in skipped
        return counts

    def detour(self, number: int | None = None, rare: Sequence[str] = RARE) -> int:
        """Instructions that the longest branch ahead inside a loop skips, without those that `parts` does not count.

        Of all loops, or of that with `number`, by their starts from 0 on.
        """
        loops, skipped = self._loops(), self._skipped(rare)
        loops = loops if number is None else loops[number : number + 1]
        spans = [
            range(source + 1, target)
            for source, target, always in self.branches
            if not always and target > source and any(start <= source and target <= end for start, end in loops)
        ]
        return sum(place not in skipped for place in max(spans, key=len, default=()))

    def until_exit(self) -> int:
        """Instructions of a program that has nothing to do: up to the first exit, or past a branch around all loops."""
        last, end = max((end for _, end in self._loops()), default=0), self._end()
        branches = [(source, target) for source, target, always in self.branches if not always]
        around = [(source, target) for source, target in branches if source < last < target <= end]
        exits = [place + 1 for place, text in enumerate(self.instructions) if "EXIT" in text]
        if around and around[0][0] < exits[0]:
            return around[0][0] + 1 + end + 1 - around[0][1]
        return exits[0]

    def _loops(self) -> list[tuple[int, int]]:
        """First and last instruction of each loop, by its start."""
        ends = {}  # of each loop by its start: branches back to it
        for source, to, _ in self.branches:
            if to < source <= self._end():
                ends[to] = max(source, ends.get(to, 0))
        return sorted(ends.items())

    def _end(self) -> int:
        """The exit at the end of what ordinarily runs. Behind it stands what branches back: warps that came apart."""
        exits = (place for place, text in enumerate(self.instructions) if text.startswith("EXIT"))
        return next(exits, max([len(self.instructions), *(source for source, *_ in self.branches)]))

    def _skipped(self, rare: Sequence[str]) -> set[int]:
        """Instructions that a branch skips unless one of the `rare` among them has to be run."""
        ahead = [(source, target) for source, target, _ in self.branches if target > source]
        skipped: set[int] = set()
        for found in (place for place, text in enumerate(self.instructions) if any(word in text for word in rare)):
            around = [(source, target) for source, target in ahead if source < found < target]
            source, target = min(around, key=lambda span: span[1] - span[0], default=(found, found))
            skipped.update(range(source + 1, target))
        return skipped

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
    """Read what `nvdisasm -c` prints; padding is left out, and so are subroutines, which stand at the end."""
    instructions, labels = [], {}
    for label, text in _LINE.findall(sass):
        if label.startswith("$"):
            break
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
