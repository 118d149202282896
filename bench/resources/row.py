"""One kernel, compiled as one op call launches it, for one target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Counts = dict[str, int]


@dataclass(frozen=True)
class Assembly:
    """What a compiled kernel's assembly says. Loads and stores are global memory's, counted by their bytes a thread."""

    registers: int  # a thread
    spills: int  # instructions that move a register to memory or back (NVIDIA), registers so moved (AMD)
    stack: int  # bytes a thread
    loads: Counts
    stores: Counts
    atomics: Counts  # by type and vector width, e.g. {"F32x4": 8}; "CAS" is a compare-and-swap loop
    matrix: Counts  # tensor core instructions
    instructions: int
    # In PTX; None on AMD, where every IEEE division is itself made of fused multiply-adds.
    fma: int | None = None
    ieee_divisions: int | None = None
    fast_divisions: int | None = None


@dataclass(frozen=True)
class Row:
    """A line of the table. (target, call, kernel) is its name."""

    target: str
    call: str
    kernel: str
    tile: str  # the block sizes among the compile-time constants
    warps: int
    shared: int  # bytes a block
    occupancy: int  # theoretical, percent
    assembly: Assembly
    fusion: bool = False  # whether the compiler may fuse multiplications and additions that nobody asked it to fuse

    @property
    def key(self) -> tuple[str, str, str]:
        """What names a row in every table."""
        return self.target, self.call, self.kernel

    def to_dict(self) -> dict[str, Any]:
        """Plain values in one flat dictionary, for JSON."""
        values = {k: v for k, v in vars(self).items() if k != "assembly"} | vars(self.assembly)
        return {k: dict(sorted(v.items())) if isinstance(v, dict) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        """The inverse of `to_dict`."""
        own = {k: v for k, v in values.items() if k in cls.__dataclass_fields__}
        return cls(**own, assembly=Assembly(**{k: v for k, v in values.items() if k not in own}))


def wide(counts: Counts) -> int:
    """Loads or stores of 16 bytes a thread or more: what a memory-bound kernel lives on."""
    return sum(n for width, n in counts.items() if int(width) >= 16)


def vector(atomics: Counts) -> int:
    """Atomics that add several numbers at once."""
    return sum(n for kind, n in atomics.items() if "x" in kind or kind.startswith("pk_"))
