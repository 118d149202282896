"""The report: verdict first, then every row, the figures, and what is needed to run it again."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import jinja2
import pandas as pd

from .memory_plots import memory_plots
from .plots import Plot, make_plots
from .providers import is_ours
from .results import NAMES, Results, best_triton_rows, read_results
from .tables import (
    describe_session,
    dtype_text,
    layout_text,
    machine_text,
    percent_text,
    ratio_text,
    seconds_text,
    sections,
    share_text,
)
from .verdicts import FASTER, NO_DIFFERENCE, SLOWER
from .workloads import OPS, SUITES, WORKLOADS, calls

NO_GPU = (
    "No Triton time exists in this result: it is awaiting a run on a GPU. "
    "The times below are of the baselines, on this machine; they say nothing about the Triton kernels."
)
NO_CLAIM = "No Triton time outside the sweeps exists in this result: see below for what failed or was not measured."
NO_BASELINE = "no baseline"
_SUITE_PLACES = {suite: place for place, suite in enumerate(SUITES)}
NOTES = (
    "Speed-up: the median time of the best baseline over that of Triton's best mode; 2 means twice as fast. The best "
    "baseline is the quickest of torchvision's op, the PyTorch reference and torch.compile of it (of torchvision's way "
    "for mask_predictor_loss and mask_targets), in its best layout and in any dtype whose result passed the check: "
    "under bf16 it may be an fp32 or fp16 one. The ratio of op_eager, what a caller waits for, stands beside it: "
    "dispatch can eat a win. Triton atomic, triton apart and torchvision deterministic decide nothing: they show what "
    "determinism costs, and what joining two calls gains.",
    "Interval: where the ratio lies with 99 % confidence, from a bootstrap over the rounds of the run. Noise floor: "
    "how far apart two measurements of one and the same provider were in that run. It counts as no difference unless "
    "the whole interval lies outside the noise floor.",
    "% of roof: the shortest time that this machine could need, divided by the measured time. It is the slowest of "
    "moving the fewest possible bytes through DRAM, through L2, and of issuing the fewest possible instructions, at "
    "the ceilings measured in the same session. The roof is a bound: nothing was measured to reach it.",
)
ROW_NOTE = (
    "kernel_cold, kernel_warm: device time with the L2 cache flushed, and with it as the same call left it; op_eager: "
    "what a caller waits for, dispatch included; first_call: with compilation and autotuning. Medians; quartiles and "
    "ratios are those of the main time, the first column. vs best, vs same dtype: time of the best baseline, in any "
    "dtype or in the row's, over the row's time. Error: largest deviation from the PyTorch reference in float64, over "
    "its largest value (of labels, of what NMS keeps, of the order of the best and of pasted pixels: the share that "
    "differs). Peak memory: what a call allocates beyond what was there; both passes: the same of a forward and its "
    "backward together; saved: what is kept from forward to backward. Repeats bit for bit: whether later runs of a "
    "backward, on the same inputs, gave the bits of the first. Where a row waits for the device, the host stops inside "
    "the call."
)
PLOT_NOTE = (
    "Each provider in its quickest layout and dtype, on log scales. Lines run from the 25 % to the 75 % quantile, the "
    "whiskers of speed-ups over the 99 % interval. Hollow: stale. Dotted: the roof, a bound and not a measurement. "
    "Peak memory is what a call, or a forward and its backward, allocates beyond what was there, results included; a "
    "cross at the top is a call that ran out of it."
)


@dataclass(frozen=True)
class Claim:
    """What can be said about one call: how Triton's best mode compares with the best baseline."""

    call: str
    suite: str
    verdict: str  # FASTER, SLOWER, NO_DIFFERENCE or NO_BASELINE
    ratio: float
    low: float
    high: float
    noise: float
    roof: str  # the share of it that is reached
    eager: float  # the ratio of what callers wait for: dispatch may eat the win
    eager_verdict: str
    triton: str  # its time, and in which layout
    mode: str
    baseline: str  # its time, and which one
    rival: str
    stale: bool


def write_report(path: Path | str, out_dir: Path | str, markdown: bool = True) -> list[Path]:
    """Write `report.html` and, for a code host, `report.md` with `plots/*.png`; return the files, the page first.

    `path` is a study's folder or file, or pytest-benchmark's JSON. Everything is rendered before the first file is
    touched, and each file appears whole or not at all.
    """
    results = read_results(path)
    table = _sorted(results.table())
    plots = make_plots(table) + memory_plots(table)
    context = _context(results, table, plots)
    out_dir = Path(out_dir)
    files = {out_dir / "report.html": _template("report.html.j2").render(context).encode()}
    if markdown:
        files[out_dir / "report.md"] = _template("report.md.j2").render(context).encode()
        files |= {out_dir / "plots" / f"{plot.name}.png": plot.png for plot in plots}
    for file, content in reversed(files.items()):  # the page last, when all it goes with is there
        write_whole(file, content)
    return list(files)


def claims(table: pd.DataFrame, eager: pd.DataFrame) -> list[Claim]:
    """One claim a call that Triton has a time for, but for sweeps; in each suite the worst first: losses must not hide.

    `eager` is the same table made of the times that callers wait for.
    """
    eager = eager.set_index(NAMES)
    made = [
        _claim(row, eager.loc[tuple(row[NAMES])])
        for _, row in best_triton_rows(table[table["suite"] != "sweep"]).iterrows()
    ]
    return sorted(made, key=lambda c: (_SUITE_PLACES.get(c.suite, len(SUITES)), pd.isna(c.ratio), c.ratio))


def _claim(row: pd.Series, eager: pd.Series) -> Claim:
    has_baseline = pd.notna(row["ratio"])
    return Claim(
        call=f"{row['op']} {row['direction']}, {row['workload']}, {row['dtype']}",
        suite=row["suite"],
        verdict=row["verdict"] if has_baseline else NO_BASELINE,
        **{name: row[name] for name in ("ratio", "low", "high", "noise")},
        roof=share_text(row),
        eager=eager["ratio"],
        eager_verdict=eager["verdict"],
        triton=seconds_text(row["median"]),
        mode=layout_text(row["layout"]).strip(),
        baseline=seconds_text(row["best_median"]),
        rival=_rival(row) if has_baseline else "",
        stale=pd.notna(row["stale"]),
    )


def _rival(row: pd.Series) -> str:
    """The best baseline; a device time of one that waits inside holds the host's time too, and op_eager is fairer."""
    return f"{row['best_baseline']}{', waits for the device' if row['best_waits'] else ''}"


def _sorted(table: pd.DataFrame) -> pd.DataFrame:
    """In the order of the workload table; a study that went on later has its rows in any order."""
    known = sorted(WORKLOADS, key=lambda w: _SUITE_PLACES[w.suite])
    places = {(w.op, w.name): place for place, w in enumerate(known)}
    keys = {
        "_op": table["op"].map({op: place for place, op in enumerate(OPS)}),
        "_backward": table["direction"] == "backward",
        "_place": [places.get(names, len(known)) for names in zip(table["op"], table["workload"], strict=True)],
        "_dtype": table["dtype"],
    }
    return table.assign(**keys).sort_values(list(keys), kind="stable").drop(columns=list(keys))


def _context(results: Results, table: pd.DataFrame, plots: list[Plot]) -> dict:
    made = claims(table, results.table("op_eager"))
    valid = [claim for claim in made if not claim.stale]
    used = {row["session"] for row in results.rows}  # one that was cut off before its first call says nothing
    groups = {"all calls outside the sweeps": valid, "the train suite": [c for c in valid if c.suite == "train"]}
    bad = table[table["status"].isin(["red", "failed"])]
    ours = bad["provider"].map(is_ours).astype(bool)
    skipped = table[table["status"] == "skipped"]
    return {
        "machines": list(dict.fromkeys(machine_text(s["environment"]) for s in results.sessions.values())),
        "claims": made,
        "suites": {suite: list(group) for suite, group in groupby(made, key=lambda claim: claim.suite)},
        "notes": NOTES if made else (),
        "row_note": ROW_NOTE,
        "plot_note": PLOT_NOTE,
        "counts": {name: _counts(group) for name, group in groups.items() if group},
        "no_claims": NO_CLAIM if results.on_gpu else NO_GPU,
        "times": " and ".join(dict.fromkeys(table["time"])),
        "bad_triton": _reasons(bad[ours]),
        "bad_baselines": _reasons(bad[~ours]),
        "skipped": Counter(f"{r.provider}: {r.reason.removeprefix('Skipped: ')}" for r in skipped.itertuples()),
        "missing": _missing(results) if results.on_gpu else 0,
        "stale": Counter(table["stale"].dropna()),
        "sections": list(sections(table)),
        "plots": plots,
        "sessions": [describe_session(results.sessions[n], results) for n in sorted(used, reverse=True)],
    }


def _reasons(bad: pd.DataFrame) -> list[tuple[str, str, str]]:
    """(status, row, reason) of rows that are red or failed."""
    names = "{0.op} {0.direction}, {0.workload}, {0.dtype}: {0.provider}"
    return [
        (row.status, names.format(row) + layout_text(row.layout) + dtype_text(row), row.reason)
        for row in bad.itertuples()
    ]


def _counts(group: list[Claim]) -> dict[str, int]:
    words = Counter(claim.verdict for claim in group)
    return {word: words[word] for word in (FASTER, SLOWER, NO_DIFFERENCE, NO_BASELINE)} | {"all": len(group)}


def _missing(results: Results) -> int:
    """Calls of the workload table without any row."""
    found = results.call_rows()
    return sum((c.workload.op, c.direction, c.workload.name, c.dtype_name) not in found for c in calls("cuda"))


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"ratio": ratio_text, "percent": lambda share: percent_text(share, 1), "interval": _interval}
    return environment.get_template(name)


def _interval(claim: Claim) -> str:
    return "" if pd.isna(claim.low) else f"[{claim.low:.2f}, {claim.high:.2f}]"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".report-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
