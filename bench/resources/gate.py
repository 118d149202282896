"""What must not get worse when a kernel, or Triton, changes: properties, not register counts.

Register counts move with every release of the compiler; what costs a kernel its speed, or a result its last bit,
does not have to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .row import Row, vector, wide

# A stray spill of one register costs nothing, and which kernel has it changes with the compiler.
SPILLS_ALLOWED = {"sm_80": 4, "sm_90": 4, "sm_100": 4, "gfx942": 0}

INEXACT = (
    "mask_bce_forward_kernel",
    "mask_bce_backward_kernel",
    "mask_predictor_forward_kernel",
    "mask_predictor_features_kernel",
    "mask_predictor_weight_kernel",
    "weighted_mean_kernel",
    "rpn_loss_forward_kernel",
    "rpn_loss_backward_kernel",
)
"""Kernels whose results need not equal the reference's to the last bit: exp and log are not exact to begin with, nor
does anybody promise the order in which a loss or a weight's gradient is summed."""

FUSES = ("roi_align_forward_kernel",)
"""Exact kernels that ask for fused multiply-adds where they sum. Not so the geometry, which decides: it is a kernel of
its own. The compiler still may not fuse anything on its own account."""

DIVIDES = ("roi_align_matrix_kernel", "roi_align_gather_kernel")
"""Exact kernels that divide approximately to find a place in a list, with room to spare, and for nothing else."""

_PROMISES: dict[str, Callable[[Row], int]] = {
    "16-byte loads": lambda row: wide(row.assembly.loads),
    "16-byte stores": lambda row: wide(row.assembly.stores),
    "vector atomics": lambda row: vector(row.assembly.atomics),
}


def check_resources(rows: list[Row], tables: dict[str, list[Row]], version: str) -> list[str]:
    """A sentence for each thing that is wrong with `rows`, compiled by Triton `version`.

    Args:
        rows: all kernels of some targets.
        tables: the committed rows by Triton version. What every table has for a row is promised; a version without
            a table of its own is held to the promises alone.
        version: Triton's.
    """
    sentences = [f"{_name(row)}: {fault}" for row in rows for fault in _faults(row)]
    sentences += [f"{_name(row)}: {fault}" for row in rows for fault in _broken_promises(row, tables)]
    return sentences + list(_changed_rows(rows, tables.get(version, [])))


def _name(row: Row) -> str:
    return f"{row.target}, {row.call}, {row.kernel}"


def _faults(row: Row) -> Iterator[str]:
    code = row.assembly
    kernel = row.kernel.split("/")[0]
    if code.spills > SPILLS_ALLOWED[row.target]:
        yield f"spills ({code.spills} with {code.registers} registers): a smaller tile or more warps"
    if row.occupancy == 0:
        yield f"not one block fits, with {row.shared} bytes of shared memory and {code.registers} registers"
    if "CAS" in code.atomics:
        yield "its atomics are a compare-and-swap loop: add in a type that the GPU has an atomic for"
    if kernel not in INEXACT:
        if code.fma and (row.fusion or kernel not in FUSES):
            yield f"{code.fma} fused multiply-adds where results must be exact: launch with enable_fp_fusion=False"
        if code.fast_divisions and kernel not in DIVIDES:
            yield f"{code.fast_divisions} approximate divisions where results must be exact: use `divide`"


def _broken_promises(row: Row, tables: dict[str, list[Row]]) -> Iterator[str]:
    committed = [other for table in tables.values() for other in table if other.key == row.key]
    for what, count in _PROMISES.items():
        if committed and all(map(count, committed)) and not count(row):
            yield f"lost its {what}, which every committed table has"


def _worse_than(row: Row, committed: Row) -> Iterator[str]:
    """The same compiler gave more for the row before: a change of the kernel's, to be mended or committed knowingly."""
    old, new = committed.assembly, row.assembly
    if new.spills > old.spills:
        yield f"spills {new.spills} times, {old.spills} in the committed table"
    for what, counts in (("loads", lambda code: code.loads), ("stores", lambda code: code.stores)):
        if wide(counts(new)) < wide(counts(old)):
            yield f"{wide(counts(new))} 16-byte {what}, {wide(counts(old))} in the committed table"


def _changed_rows(rows: list[Row], table: list[Row]) -> Iterator[str]:
    """Rows that the committed table has alone, lacks, or has better."""
    targets = {row.target for row in rows}
    committed = {row.key: row for row in table if row.target in targets}
    measured = {row.key: row for row in rows}
    if committed:
        for row in (measured[key] for key in measured.keys() - committed.keys()):
            yield f"{_name(row)}: not in the committed table; run `mrcnn-bench resources`"
        for key in committed.keys() & measured.keys():
            yield from (f"{_name(measured[key])}: {fault}" for fault in _worse_than(measured[key], committed[key]))
        for row in (committed[key] for key in committed.keys() - measured.keys()):
            yield f"{_name(row)}: only in the committed table; run `mrcnn-bench resources`"
