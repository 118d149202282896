"""Reading AMD assembly, which is the text that LLVM writes."""

from __future__ import annotations

import re
from collections import Counter

from .row import Assembly, Counts

_INSTRUCTION = re.compile(r"^\t([a-z]\w+)", re.MULTILINE)
# Not s_load: a scalar load serves the whole wave, and reads the arguments too.
_ACCESS = re.compile(r"(?:global|buffer|flat)_(load|store)_(?:lds_)?([us]?byte|[us]?short|dword(?:x\d)?)")
_ATOMIC = re.compile(r"(?:global|buffer|flat)_atomic_(\w+)")


def read_amd(amdgcn: str) -> Assembly:
    """Count in the assembly text."""
    instructions = Counter(_INSTRUCTION.findall(amdgcn))
    if not instructions:
        raise ValueError("the assembly shows no instruction: has its format changed?")
    return Assembly(
        registers=_metadata(amdgcn, "vgpr_count"),
        stack=_metadata(amdgcn, "private_segment_fixed_size"),
        spills=_metadata(amdgcn, "vgpr_spill_count"),
        loads=_by_width(instructions, "load"),
        stores=_by_width(instructions, "store"),
        atomics=_atomics(instructions),
        matrix={name: n for name, n in instructions.items() if name.startswith(("v_mfma", "v_smfma"))},
        instructions=sum(n for name, n in instructions.items() if name != "s_nop"),
    )


def _metadata(amdgcn: str, field: str) -> int:
    return int(re.search(rf"^\s+(?:- )?\.{field}:\s+(\d+)", amdgcn, re.MULTILINE)[1])


def _by_width(instructions: Counter[str], access: str) -> Counts:
    widths: Counter[str] = Counter()
    for name, n in instructions.items():
        found = _ACCESS.match(name)
        if found and found[1] == access:
            widths[str(_bytes(found[2]))] += n
    return dict(widths)


def _bytes(unit: str) -> int:
    if unit.endswith("byte"):
        return 1
    if unit.endswith("short"):
        return 2
    return 4 * int(unit.removeprefix("dword").removeprefix("x") or 1)


def _atomics(instructions: Counter[str]) -> Counts:
    """By what they do: global_atomic_pk_add_f16 is a pk_add_f16, two numbers at once."""
    kinds: Counter[str] = Counter()
    for name, n in instructions.items():
        if found := _ATOMIC.match(name):
            kinds["CAS" if "cmpswap" in found[1] else found[1]] += n
    return dict(kinds)
