"""The tables: JSON that the gate reads, a line a row so that a diff shows which kernel changed, and Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from .measure import TARGETS
from .row import Counts, Row, wide

GPUS = {"sm_80": "A100", "sm_90": "H100, H200", "sm_100": "B200", "gfx942": "MI300; compiled, never run"}

_INTRODUCTION = """# Kernel resources, Triton {version}

What Triton {version}, with the `ptxas` and LLVM that it brings, makes of every kernel that the op calls below launch,
forward and backward. No GPU took part: the kernels are compiled as the ops launch them, and the machine code is read.
Written by `mrcnn-bench resources`. `make test` compiles again and fails where a kernel spills (more than four
instructions, or more than here), has fewer 16-byte accesses than here or no vector atomics any more, adds in a
compare-and-swap loop, or is inexact where results have to be exact. Register counts are free to move.

- **gfx942 is compiled only. None of this has ever run on an AMD GPU.**
- Occupancy is theoretical: the part of a processor's warps that registers and shared memory leave room for. Nothing
  here is a time.
- Calls have the sizes of a training step: 256 channels, 800 x 1344 pixels, 81 classes. `7x7 2x2` is 7 x 7 bins of 2 x 2
  samples; with `adaptive` the kernel counts its samples. `many RoIs`: so many that NCHW maps are transposed first;
  `to nchw`: results in NCHW from channels_last maps; `atomic`: the backward that is not deterministic. `label_anchors`
  and `nms_mask` are fp32; `80 x 2000` is 80 groups of 2000 boxes.
- A tile is what one program computes: BINS output bins, C channels, N x M pairs of boxes, A anchors, G objects, BLOCK
  pixels of a mask, or boxes of a group.
- Registers and stack are a thread's. Spills count `LDL` and `STL` instructions on NVIDIA, spilled VGPRs on AMD; the
  bytes behind them are the thread's stack. Shared memory is in bytes a block. Instructions are those in the binary,
  on every path, not those executed.
- Loads, stores and atomics are instructions on global memory: `8×16` is eight that move 16 bytes a thread, `8×F32x4`
  eight that add four floats each. Several widths in one kernel belong to several tensors, or to a vector path and its
  remainder. AMD's scalar loads, one for a whole wave, are left out.
- FMA counts fused multiply-adds in PTX; of AMD's it cannot be told which belong to a division. RoIAlign's forward asks
  for those of its sums.
- A kernel that one call launches in two specialisations appears twice, the second as `name/2`.
"""


def sort_rows(rows: Iterable[Row]) -> list[Row]:
    """By target, call and kernel, so that an unchanged row stays where it is."""
    return sorted(rows, key=lambda row: (TARGETS.index(row.target), row.call, row.kernel))


def write_table(folder: Path, version: str, rows: Iterable[Row]) -> list[Path]:
    """Write the JSON and the Markdown; targets that `rows` lacks keep what the table had."""
    rows = list(rows)
    measured = {row.target for row in rows}
    rows = sort_rows(rows + [row for row in read_tables(folder).get(version, []) if row.target not in measured])
    folder.mkdir(parents=True, exist_ok=True)
    table, page = folder / f"triton-{version}.json", folder / f"triton-{version}.md"
    lines = ",\n".join(json.dumps(row.to_dict()) for row in rows)
    table.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    page.write_text(render(version, rows), encoding="utf-8")
    return [table, page]


def read_tables(folder: Path) -> dict[str, list[Row]]:
    """Every committed table by its Triton version."""
    return {
        path.stem.removeprefix("triton-"): [Row.from_dict(row) for row in json.loads(path.read_text(encoding="utf-8"))]
        for path in sorted(folder.glob("triton-*.json"))
    }


def render(version: str, rows: list[Row]) -> str:
    """The Markdown page."""
    parts = [_INTRODUCTION.format(version=version)]
    for target in TARGETS:
        of_target = [row for row in rows if row.target == target]
        if of_target:
            parts.append(f"## {target} ({GPUS[target]})\n\n{summary(of_target)}\n\n{_markdown(of_target)}\n")
    return "\n".join(parts)


def summary(rows: list[Row]) -> str:
    """What stands out, in a sentence or two."""
    spilling = sum(row.assembly.spills > 0 for row in rows)
    loading = sum(wide(row.assembly.loads) > 0 for row in rows)
    most = max(rows, key=lambda row: row.assembly.registers)
    return (
        f"{len(rows)} kernels, {spilling or 'none'} with spills; {loading} load 16 bytes at a time. "
        f"Most registers: {most.assembly.registers}, {most.kernel} in {most.call}."
    )


def cells(row: Row) -> dict[str, str]:
    """A row as text by column, numbers aligned by whoever draws the table."""
    code = row.assembly
    return {
        "call": row.call,
        "kernel": row.kernel.replace("_kernel", ""),
        "tile": row.tile,
        "warps": str(row.warps),
        "registers": str(code.registers),
        "spills": f"{code.spills} ({code.stack} B)" if code.spills or code.stack else "0",
        "shared": str(row.shared),
        "occupancy": f"{row.occupancy} %",
        "loads": _by_width(code.loads),
        "stores": _by_width(code.stores),
        "atomics": _by_kind(code.atomics),
        "matrix": _by_kind(code.matrix),
        "FMA": "" if code.fma is None else str(code.fma),
        "instructions": str(code.instructions),
    }


TEXT_COLUMNS = ("call", "kernel", "tile", "loads", "stores", "atomics", "matrix")


def _markdown(rows: list[Row]) -> str:
    drawn = [cells(row) for row in rows]
    columns = [name for name in drawn[0] if any(row[name] for row in drawn)]
    rule = ["---" if name in TEXT_COLUMNS else "---:" for name in columns]
    lines = [columns, rule, *([row[name] for name in columns] for row in drawn)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _by_width(counts: Counts) -> str:
    return " ".join(f"{counts[width]}×{width}" for width in sorted(counts, key=int, reverse=True))


def _by_kind(counts: Counts) -> str:
    return " ".join(f"{n}×{kind}" for kind, n in sorted(counts.items()))
