"""From pytest-benchmark's JSON to one table: a row a measurement, with its ratios to the baselines.

Ratios are speed-ups: baseline time over the row's time, so 2 means twice as fast.

- `ratio_best`: against the best baseline, whatever its layout, whose precision is at least the row's. A bf16 row
  has to beat an fp32 or fp16 baseline too, where that is the quickest; an fp32 row only fp32 ones.
- `ratio_same_dtype`: against the best baseline measured in the very same dtype.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

CALL = ["op", "direction", "workload"]
NAMES = [*CALL, "dtype", "measured_dtype", "provider", "layout", "device"]
EXTRA = ["shapes", "error", "tolerance", "measures", "peak_memory_bytes", "note"]
TIMES = ["median", "q25", "q75", "samples"]  # seconds
RATIOS = ["best_baseline", "best_median", "ratio_best", "ratio_same_dtype"]
COLUMNS = [*NAMES, *TIMES, *RATIOS, *EXTRA]


class ResultsError(ValueError):
    """The file is not a result of the benchmark suite; the message is one sentence for the user."""


@dataclass(frozen=True)
class Results:
    """One run: the table, the rows without a time, and where it all comes from."""

    table: pd.DataFrame
    gaps: list[dict]
    machine: dict
    commit: dict
    when: str
    command: str

    @property
    def on_gpu(self) -> bool:
        """Whether device times were taken."""
        return bool((self.table["device"] == "cuda").any())


def load_results(path: Path | str) -> pd.DataFrame:
    """The table of a results file, one row a measurement, with the columns `COLUMNS`."""
    return read_results(path).table


def read_results(path: Path | str) -> Results:
    """Read a file written by `pytest bench --benchmark-json=FILE`; raise `ResultsError` if it is not one."""
    path = Path(path)
    content = _read_json(path)
    benchmarks = content.get("benchmarks") if isinstance(content, dict) else None
    if not benchmarks:
        raise ResultsError(f"{path} holds no benchmarks: run `pytest bench --benchmark-only` to measure some.")
    try:
        table = pd.DataFrame([_row(b) for b in benchmarks])
    except (KeyError, TypeError, ValueError) as error:
        raise ResultsError(f"{path} was not written by this benchmark suite: {error!r} is missing.") from error
    return Results(
        table=add_ratios(table)[COLUMNS],
        gaps=content.get("not_measured", []),
        machine=content.get("machine_info", {}),
        commit=content.get("commit_info", {}),
        when=content.get("datetime", "unknown"),
        command=content.get("command", "python -m pytest bench --benchmark-only --benchmark-json=RESULTS.json"),
    )


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ResultsError(f"{path} does not exist.") from None
    except OSError as error:
        raise ResultsError(f"{path} cannot be read: {error.strerror}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path} is not valid JSON ({error}).") from None


def _row(benchmark: dict) -> dict:
    extra, stats = benchmark["extra_info"], benchmark["stats"]
    samples = stats.get("data") or [stats["q1"], stats["median"], stats["q3"]]  # --benchmark-save drops the data
    q25, median, q75 = np.quantile(samples, [0.25, 0.5, 0.75])
    times = {"median": median, "q25": q25, "q75": q75, "samples": stats["rounds"]}
    return {**{name: extra[name] for name in NAMES}, **times, **{name: extra.get(name) for name in EXTRA}}


def add_ratios(table: pd.DataFrame) -> pd.DataFrame:
    """Add the columns `RATIOS`; empty where a call has no baseline to compare with."""
    comparisons = [_compare(row, table) for _, row in table.iterrows()]
    return table.assign(**{name: [c[name] for c in comparisons] for name in RATIOS})


def _compare(row: pd.Series, table: pd.DataFrame) -> dict:
    same_call = (table[CALL] == row[CALL]).all(axis=1)
    rivals = table[same_call & (table["provider"] != "triton")]
    if row["dtype"] == "fp32":
        rivals = rivals[rivals["measured_dtype"] == "fp32"]
    same_dtype = rivals[rivals["measured_dtype"] == row["measured_dtype"]]
    if rivals.empty:
        return {"best_baseline": None, "best_median": np.nan, "ratio_best": np.nan, "ratio_same_dtype": np.nan}
    best = rivals.loc[rivals["median"].idxmin()]
    return {
        "best_baseline": f"{best['provider']} {best['measured_dtype']}",
        "best_median": best["median"],
        "ratio_best": best["median"] / row["median"],
        "ratio_same_dtype": np.nan if same_dtype.empty else same_dtype["median"].min() / row["median"],
    }


def best_triton_rows(table: pd.DataFrame) -> pd.DataFrame:
    """Triton's quickest layout of every call and dtype, as the baselines are in theirs too."""
    triton = table[table["provider"] == "triton"]
    return triton.loc[triton.groupby([*CALL, "dtype"], sort=False)["median"].idxmin()]


def judge(row: pd.Series, table: pd.DataFrame) -> str:
    """ "faster", "slower" or "no clear difference" (quartile ranges overlap) against the best baseline."""
    same_call = (table[CALL] == row[CALL]).all(axis=1)
    best = table[same_call & (table["provider"] != "triton") & (table["median"] == row["best_median"])]
    if best.empty:
        return "no baseline"
    if row["q75"] < best.iloc[0]["q25"]:
        return "faster"
    if row["q25"] > best.iloc[0]["q75"]:
        return "slower"
    return "no clear difference"
