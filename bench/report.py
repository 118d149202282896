"""The report: verdict first, then the table, the figures, and what is needed to run it again."""

from __future__ import annotations

import contextlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import jinja2
import pandas as pd

from .plots import Plot, format_seconds, make_plots
from .results import Results, best_triton_rows, judge, load_results, read_results

__all__ = ["load_results", "write_report"]

NO_TRITON = (
    "No Triton time exists in this result: it is awaiting a run on a GPU. "
    "The times below are of the baselines, on this machine; they say nothing about the Triton kernels."
)


@dataclass(frozen=True)
class Claim:
    """What can be said about one call: how Triton compares with the best baseline."""

    call: str
    judgement: str  # "faster", "slower", "no clear difference" or "no baseline"
    ratio: float
    triton: str
    baseline: str


def write_report(json_path: Path | str, out_dir: Path | str) -> list[Path]:
    """Write `report.html`, `report.md` and `plots/*.png`; return the files, the page first.

    Everything is rendered before the first file is touched, and each file appears whole or not at all.
    """
    results = read_results(json_path)
    plots = make_plots(results.table)
    context = _context(results, plots)
    out_dir = Path(out_dir)
    files = {
        out_dir / "report.html": _template("report.html.j2").render(context).encode(),
        out_dir / "report.md": _template("report.md.j2").render(context).encode(),
        **{out_dir / "plots" / f"{plot.name}.png": plot.png for plot in plots},
    }
    for path, content in reversed(files.items()):  # the page last, when all it goes with is there
        _write_whole(path, content)
    return list(files)


def claims(table: pd.DataFrame) -> list[Claim]:
    """One claim a call and dtype that Triton has a time for, the worst first: losses must not hide."""
    made = [
        Claim(
            call=f"{row['op']} {row['direction']}, {row['workload']}, {row['dtype']}",
            judgement=judge(row, table),
            ratio=row["ratio_best"],
            triton=format_seconds(row["median"]) + _layout(row["layout"]),
            baseline=f"{row['best_baseline']} {format_seconds(row['best_median'])}",
        )
        for _, row in best_triton_rows(table).iterrows()
    ]
    return sorted(made, key=lambda claim: claim.ratio)


def _context(results: Results, plots: list[Plot]) -> dict:
    made = claims(results.table)
    counts = {word: sum(c.judgement == word for c in made) for word in ("faster", "slower", "no clear difference")}
    return {
        "results": results,
        "machine": _machine(results),
        "claims": made,
        "counts": counts,
        "failed": [gap for gap in results.gaps if gap["status"] == "failed"],
        "skipped": _summarise(gap for gap in results.gaps if gap["status"] != "failed"),
        "no_triton": NO_TRITON,
        "tables": list(results.table.groupby(["op", "direction"], sort=False)),
        "plots": plots,
        "environment": _environment(results),
    }


def _layout(layout: str) -> str:
    """Only RoI ops have a choice of layouts; for the others the word would say nothing."""
    return "" if layout == "contiguous" else f" ({layout})"


def _summarise(gaps) -> dict[str, int]:  # noqa: ANN001
    """Reason -> how many rows: forty identical lines hide the one that differs."""
    counts: dict[str, int] = {}
    for gap in gaps:
        key = f"{gap['provider']}: {gap['reason'].removeprefix('Skipped: ')}"
        counts[key] = counts.get(key, 0) + 1
    return counts


def _machine(results: Results) -> str:
    gpu = results.machine.get("gpu")
    if gpu:
        return f"{gpu['name']} ({gpu['sm_count']} SMs)"
    cpu = results.machine.get("cpu", {}).get("brand_raw") or results.machine.get("machine", "unknown")
    return f"a CPU ({cpu}, threads used: {results.machine.get('cpu_threads', '?')}), no GPU"


def _environment(results: Results) -> dict[str, str]:
    machine, commit = results.machine, results.commit
    versions = machine.get("versions", {})
    settings = machine.get("settings") or {}
    entries = {
        "machine": _machine(results),
        "driver": machine.get("driver"),
        "CUDA": machine.get("cuda") if results.on_gpu else None,
        "highest SM clock": machine.get("sm_clock_max"),
        **versions,
        "Python": machine.get("python_version"),
        "commit": f"{commit.get('id', 'unknown')}{', with uncommitted changes' if commit.get('dirty') else ''}",
        "measured": results.when,
        "TRITON_* settings": ", ".join(f"{k}={v}" for k, v in settings.items()) or "none",
    }
    return {key: str(value) for key, value in entries.items() if value}


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "seconds": _or_dash(format_seconds),
        "ratio": _or_dash(lambda ratio: f"{ratio:.2f}x" if ratio >= 0.1 else f"{ratio:.2g}x"),
    }
    environment.filters |= {"error": _or_dash(lambda error: f"{error:.1e}" if error else "0"), "mib": _or_dash(_mib)}
    return environment.get_template(name)


def _or_dash(formatter):  # noqa: ANN001
    return lambda value: "–" if pd.isna(value) else formatter(value)


def _mib(count: float) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _write_whole(path: Path, content: bytes) -> None:
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
