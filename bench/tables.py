"""Rows and sessions as text, for the page and for Markdown alike: what is a bound or stale says so in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pandas as pd

from .memory import OUT_OF_MEMORY
from .plots import format_seconds
from .results import Results

CEILINGS = {  # name in a session -> words, unit, size of the unit
    "dram_copy_bytes_per_s": ("ceiling: DRAM copy", "GB/s", 1e9),
    "dram_read_bytes_per_s": ("ceiling: DRAM read", "GB/s", 1e9),
    "dram_write_bytes_per_s": ("ceiling: DRAM write", "GB/s", 1e9),
    "l2_bytes_per_s": ("ceiling: L2 read", "GB/s", 1e9),
    "issue_per_s": ("ceiling: FP32 instructions of a warp", "G/s", 1e9),
    "matmul_bf16_flops_per_s": ("ceiling: bf16 matrix product", "TFLOP/s", 1e12),
    "l2_bytes": ("L2 size", "MiB", 2**20),
}


def seconds_text(value: float) -> str:
    """A time, or a dash where there is none."""
    return "–" if pd.isna(value) else format_seconds(value)


def ratio_text(value: float) -> str:
    """A speed-up, or a dash."""
    return "–" if pd.isna(value) else f"{value:.2f}x" if value >= 0.1 else f"{value:.2g}x"


def share_text(row: object) -> str:
    """How much of its roof a row reaches, and what the roof is made of."""
    return "–" if pd.isna(row.roof_share) else f"{percent_text(row.roof_share)} ({row.bound})"


def percent_text(share: float, digits: int = 0) -> str:
    """A share, or a dash."""
    return "–" if pd.isna(share) else f"{100 * share:.{digits}f} %"


def repeats_text(row: object) -> str:
    """Whether the backward gave the same bits in every run, and in how many; a dash where that was not tried."""
    if pd.isna(row.runs):
        return "–"
    return f"yes, {row.runs:.0f} runs" if row.bitwise else f"no, run {row.runs:.0f} differs"


def _mib(count: float) -> str:
    return "–" if pd.isna(count) else f"{count / 2**20:,.1f} MiB"


def layout_text(layout: str) -> str:
    """Of an op without a choice of layouts the word would say nothing."""
    return "" if layout == "contiguous" else f" {layout}"


def dtype_text(row: object) -> str:
    """Where it is not the one asked for: torchvision's RoIAlign has no bf16."""
    return "" if row.measured_dtype == row.dtype else f" in {row.measured_dtype}"


@dataclass(frozen=True)
class Section:
    """All rows of an op and direction, those of the sweeps apart."""

    title: str
    columns: list[str]
    main: str  # the column that ratios are about
    groups: list[tuple[str, str, list[Line]]]  # name of the call, its shapes, its rows


@dataclass(frozen=True)
class Line:
    """One row as text; `tags` are what must not be overlooked."""

    name: str
    tags: list[str]
    cells: list[str]
    best: bool


COLUMNS: dict[str, Callable[[object], str]] = {
    "kernel_cold": lambda row: seconds_text(row.kernel_cold),
    "kernel_warm": lambda row: seconds_text(row.kernel_warm),
    "op_eager": lambda row: seconds_text(row.op_eager),
    "25 %–75 %": lambda row: "–" if pd.isna(row.q25) else f"{seconds_text(row.q25)} – {seconds_text(row.q75)}",
    "vs best": lambda row: ratio_text(row.ratio),
    "vs same dtype": lambda row: ratio_text(row.ratio_same_dtype),
    "roof (bound)": lambda row: "–" if pd.isna(row.roof) else f"≥ {seconds_text(row.roof)}",
    "% of roof": share_text,
    "repeats bit for bit": repeats_text,
    "error": lambda row: "–" if pd.isna(row.error) else f"{row.error:.1e}" if row.error else "0",
    "peak memory": lambda row: _mib(row.peak_memory_bytes),
    "both passes": lambda row: _mib(row.step_memory_bytes),
    "saved": lambda row: _mib(row.saved_bytes),
    "first_call": lambda row: seconds_text(row.first_call),
}


def sections(table: pd.DataFrame) -> Iterator[Section]:
    """Every row but the skipped ones; a column that is empty in the whole section is left out."""
    shown = table[table["status"] != "skipped"]
    for (op, direction), of_op in shown.groupby(["op", "direction"], sort=False):
        for is_sweep, rows in of_op.groupby(of_op["suite"] == "sweep"):
            cells = pd.DataFrame([{n: cell(r) for n, cell in COLUMNS.items()} for r in rows.itertuples()], rows.index)
            cells = cells.loc[:, (cells != "–").any()]
            groups = [
                (f"{workload}, {dtype}", _shapes(of_call), [_line(r, of_call, cells) for r in of_call.itertuples()])
                for (workload, dtype), of_call in rows.groupby(["workload", "dtype"], sort=False)
            ]
            title = f"{op}, {direction}" + (", sweeps" if is_sweep else "")
            yield Section(title, list(cells), rows["time"].iloc[0], groups)


def _line(row: object, of_call: pd.DataFrame, cells: pd.DataFrame) -> Line:
    tags = [row.status] if row.status != "ok" else []
    if row.status == "failed" and row.reason.startswith(OUT_OF_MEMORY):
        tags.append(row.reason.replace(" (", ", ").rstrip(")"))
    tags += ["stale"] if pd.notna(row.stale) else []
    tags += ["waits for the device"] if pd.notna(row.waits) and row.waits and row.status == "ok" else []
    best = row.median == of_call["median"].min()
    return Line(f"{row.provider}{layout_text(row.layout)}{dtype_text(row)}", tags, list(cells.loc[row.Index]), best)


def _shapes(rows: pd.DataFrame) -> str:
    return next(iter(rows["shapes"].dropna()), "")


def machine_text(environment: dict) -> str:
    """The GPU, or the CPU that stood in for one."""
    gpu = environment.get("gpu")
    if gpu:
        return f"{gpu['name']} ({gpu.get('sm_count', '?')} SMs)"
    name = environment.get("cpu_name") or "unknown"
    return f"a CPU ({name}, threads used: {environment.get('cpu_threads', '?')}), no GPU"


def describe_session(session: dict, results: Results) -> dict:
    """What the session ran on, as text; empty values are left out."""
    environment, commit = session["environment"], session.get("commit") or {}
    rows = [r for r in results.rows if r.get("session", 0) == session["session"]]
    clocks = sorted({r["sm_clock"] for r in rows if r.get("sm_clock")}, key=lambda text: (len(text), text))
    dirty = {True: ", with uncommitted changes", False: ""}.get(commit.get("dirty"), ", not known whether clean")
    entries = {
        "machine": machine_text(environment),
        "driver": environment.get("driver"),
        "CUDA": environment.get("cuda") if environment.get("gpu") else None,
        "highest SM clock": environment.get("sm_clock_max"),
        "SM clock after calls": " – ".join(dict.fromkeys([*clocks[:1], *clocks[-1:]])),
        **environment.get("versions", {}),
        "Python": environment.get("python") or environment.get("python_version"),
        "commit": f"{commit.get('id', 'unknown')}{dirty}",
        "TRITON_* settings": ", ".join(f"{k}={v}" for k, v in (environment.get("settings") or {}).items()) or "none",
        **_ceilings(session.get("ceilings") or {}),
        "rows": len(rows),
    }
    return {
        "title": f"Measured {session.get('started', 'at an unknown time')}",
        "entries": {key: str(value) for key, value in entries.items() if value},
        "command": session.get("command", ""),
    }


def _ceilings(measured: dict[str, float]) -> dict[str, str]:
    shown = {name: CEILINGS[name] for name in measured if name in CEILINGS}
    return {words: f"{measured[name] / size:,.0f} {unit}" for name, (words, unit, size) in shown.items()}
