"""Reading NVIDIA machine code and PTX, with the disassemblers that Triton brings."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

from .row import Assembly, Counts

# "/*0230*/  @!P1 LDG.E.128 R4, desc[UR14][R6.64] ;"
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
_GLOBAL_ATOMIC = re.compile(r"(?:RED|REDG|ATOM|ATOMG|UTMAREDG)$")  # not REDUX, a warp's, nor ATOMS, shared memory's
_ATOMIC_KIND = re.compile(r"\.(CAS|(?:B?F|[SU])?(?:16|32|64)(?:x\d+)?)(?=\.|$)")
_MATRIX = re.compile(r"(?:[A-Z]*HMMA|[HQI]GMMA|[ID]MMA|OMMA|QMMA|UTC\w*MMA)$")


def read_nvidia(cubin: bytes, ptx: str) -> Assembly:
    """Disassemble and count."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path))
        # Without dataflow analysis it is a third quicker.
        sass = _output(knobs.nvidia.nvdisasm.path, "-c", "-ndf", str(path))
    return parse_nvidia(usage, sass, ptx)


def parse_nvidia(usage: str, sass: str, ptx: str) -> Assembly:
    """Count in the text of `cuobjdump --dump-resource-usage`, of `nvdisasm -c` and of the PTX."""
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    instructions = Counter(_INSTRUCTION.findall(sass))
    if not instructions:
        raise ValueError("nvdisasm shows no instruction: has its format changed?")
    ptx = "\n".join(line for line in ptx.splitlines() if not line.lstrip().startswith((".loc", ".file")))
    return Assembly(
        registers=int(registers),
        stack=int(stack),
        spills=sum(n for name, n in instructions.items() if _opcode(name) in ("LDL", "STL")),
        loads=_by_width(instructions, ("LDG", "LDGSTS")),
        stores=_by_width(instructions, ("STG",)),
        atomics=_atomics(instructions),
        matrix={name: n for name, n in instructions.items() if _MATRIX.match(_opcode(name))},
        instructions=sum(n for name, n in instructions.items() if name != "NOP"),
        fma=len(re.findall(r"\bfma\.r[nzmp]", ptx)),
        ieee_divisions=len(re.findall(r"\bdiv\.rn\.", ptx)),
        fast_divisions=len(re.findall(r"\bdiv\.(?:full|approx)\.", ptx)),
    )


def _opcode(name: str) -> str:
    return name.split(".")[0]


def _by_width(instructions: Counter[str], opcodes: tuple[str, ...]) -> Counts:
    widths: Counter[str] = Counter()
    for name, n in instructions.items():
        opcode, *modifiers = name.split(".")
        if opcode in opcodes:
            widths[str(next((_WIDTHS[m] for m in modifiers if m in _WIDTHS), 4))] += n
    return dict(widths)


def _atomics(instructions: Counter[str]) -> Counts:
    """By type and vector width: REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU is an F32x4."""
    kinds: Counter[str] = Counter()
    for name, n in instructions.items():
        if _GLOBAL_ATOMIC.match(_opcode(name)):
            found = _ATOMIC_KIND.search(name)
            kinds[found[1] if found else "32"] += n
    return dict(kinds)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
