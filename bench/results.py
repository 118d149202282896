"""Results files and the table made of them: a line a row of `measure`, with ratios, verdicts and shares of the roof.

Two files hold the same rows: a study's `study.jsonl` (a line a session or call) and pytest-benchmark's JSON (rows in
`extra_info`). Ratios are speed-ups: baseline time over the row's time, so 2 means twice as fast.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from .ceilings import Ceilings
from .floors import Floor, roof
from .providers import BASELINES
from .sources import FOLDERS, model_hash, source_hash
from .timing import METHOD, TIMES
from .verdicts import compare
from .workloads import WORKLOADS, Call

STUDY_FILE = "study.jsonl"
CALL = ["op", "direction", "workload", "dtype"]
NAMES = [*CALL, "suite", "provider", "layout", "measured_dtype", "device"]
ABOVE_ROOF = 1.05
"""A share of the roof that no measurement can reach: ceilings are measured too, to a few per cent."""
AS_MEASURED = (
    "error", "tolerance", "peak_memory_bytes", "step_memory_bytes", "saved_bytes", "waits", "shapes", "bitwise", "runs"
)  # fmt: skip
MAIN_TIME = {"cuda": "kernel_cold", "cpu": "op_eager"}
"""The time that ratios and verdicts are about, unless another one is named."""


class ResultsError(ValueError):
    """The file is not a result of this suite; the message is one sentence for the user."""


class EmptyResultsError(ResultsError):
    """The file is one of this suite's, without a single row."""


@dataclass
class Results:
    """Rows, of each call those of its newest measurement, and the sessions that measured them."""

    rows: list[dict] = field(default_factory=list)
    sessions: dict[int, dict] = field(default_factory=dict)
    lost: dict[str, dict] = field(default_factory=dict)  # name of an attempt that came to nothing -> its entry

    @property
    def machine(self) -> str:
        """What the results are of: the GPU's name, or a CPU."""
        gpus = {(s["environment"].get("gpu") or {}).get("name") for s in self.sessions.values()}
        return ", ".join(sorted(str(name or "a CPU") for name in gpus)) or "unknown"

    @property
    def on_gpu(self) -> bool:
        """Whether device times were taken."""
        return any(row["device"] == "cuda" for row in self.rows)

    def call_rows(self) -> dict[tuple, list[dict]]:
        """The rows of each call."""
        calls: dict[tuple, list[dict]] = {}
        for row in self.rows:
            calls.setdefault(tuple(row[name] for name in CALL), []).append(row)
        return calls

    def table(self, time: str | None = None) -> pd.DataFrame:
        """One line a row, with the columns that `_line` gives; `time` is by default `MAIN_TIME`."""
        lines = []
        for rows in self.call_rows().values():
            ceilings = self.sessions[rows[0]["session"]].get("ceilings")
            lines += _call_lines(rows, time or MAIN_TIME[rows[0]["device"]], ceilings)
        return pd.DataFrame(lines)


def why_stale(row: dict) -> str | None:
    """What has changed since the row was measured; None where it still holds."""
    workload = next((w for w in WORKLOADS if (w.op, w.name) == (row["op"], row["workload"])), None)
    if workload is None or row["op"] not in FOLDERS:
        return "the workload is gone"
    if row.get("inputs") != workload.fingerprint:
        return "the inputs changed"
    if row.get("sources") != source_hash(row["op"]):
        return "the op's source changed"
    if row.get("method") != METHOD:
        return "the way of timing changed"
    return None


def read_results(path: Path | str) -> Results:
    """Read a study's file or folder, or pytest-benchmark's JSON; raise `ResultsError` if it is neither."""
    path = Path(path)
    if path.is_dir():
        path = path / STUDY_FILE
        if not path.exists() and (found := sorted(path.parent.glob("*.json"))):
            raise ResultsError(f"{path} does not exist; for pytest-benchmark's results name the file, e.g. {found[0]}.")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ResultsError(f"{path} does not exist.") from None
    except OSError as error:
        raise ResultsError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise ResultsError(f"{path} is not text ({error}).") from None
    try:
        results = _from_study(text) if path.suffix == ".jsonl" else _from_pytest_benchmark(text)
    except json.JSONDecodeError as error:
        raise ResultsError(f"{path} is not valid JSON ({error}).") from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ResultsError(f"{path} was not written by this suite.") from error
    if not results.rows:
        raise EmptyResultsError(
            f"{path} holds no measurements: run `mrcnn-bench study` or `pytest bench --benchmark-only`."
        )
    return results


def _key(row: dict) -> tuple:
    return tuple(row[name] for name in NAMES)


def _from_study(text: str) -> Results:
    """A line a session, and a line a call with all its rows; the last line of a call counts."""
    results = Results()
    newest: dict[tuple, list[dict]] = {}
    for line in _whole_lines(text):
        entry = json.loads(line)
        if entry["kind"] == "session":
            results.sessions[entry["session"]] = {k: v for k, v in entry.items() if k != "kind"}
        elif entry["kind"] == "lost":
            results.lost[entry["name"]] = entry
        else:
            rows = [{**row, "session": entry["session"]} for row in entry["rows"]]
            newest[tuple(rows[0][name] for name in CALL)] = rows
            results.sessions[entry["session"]]  # KeyError: rows that nobody can say where they are from
    results.rows = [row for rows in newest.values() for row in rows]
    _count_anew(results.rows)
    return results


def _count_anew(rows: list[dict]) -> None:
    """Replace floors that an older model counted: the times stay what they were, their roof does not."""
    from .measure import add_floors

    for row in rows:
        workload = next((w for w in WORKLOADS if (w.op, w.name) == (row["op"], row["workload"])), None)
        if "floor" in row and row.get("model") != model_hash() and workload is not None:
            add_floors(Call(workload, row["direction"], torch.float32), [row])


def _whole_lines(text: str) -> Iterator[str]:
    """A line without its end was cut off while it was being written: it does not count."""
    return (line for line in text.split("\n")[:-1] if line.strip())


def _from_pytest_benchmark(text: str) -> Results:
    content = json.loads(text)
    rows = [b["extra_info"] for b in content["benchmarks"]] + content.get("not_measured", [])
    for row in rows:
        _key(row)  # KeyError: another suite's file
    session = {
        "session": 0,
        "environment": content.get("machine_info", {}),
        "ceilings": content.get("ceilings"),
        "commit": content.get("commit_info", {}),
        "started": content.get("datetime", "unknown"),
        "command": content.get("command", "python -m pytest bench --benchmark-only --benchmark-json=RESULTS.json"),
    }
    return Results([{**row, "session": 0} for row in rows], {0: session})


def _call_lines(rows: list[dict], time: str, ceilings: dict | None) -> Iterable[dict]:
    """The lines of one call: ratios are between rows that were measured together."""
    roofs = [_roofs(row, ceilings) for row in rows]
    rows = [_refuse_above_roof(row, found) for row, found in zip(rows, roofs, strict=True)]
    timed = [row for row in rows if _samples(row, time)]
    noise = next((row["noise"][time] for row in rows if time in row.get("noise", {})), np.nan)
    baselines = [r for r in timed if r["provider"] in BASELINES]
    best = min(baselines, key=lambda r: np.median(r["times"][time]), default=None)
    for row, found in zip(rows, roofs, strict=True):
        line = {**{n: row[n] for n in NAMES}, "status": row["status"], "reason": row["reason"], "time": time}
        line |= {"stale": why_stale(row), "noise": noise, "session": row["session"]}
        line |= {name: row.get(name) for name in AS_MEASURED}
        line["first_call"] = row.get("first_call", np.nan) if row["status"] == "ok" else np.nan
        for name in TIMES["cuda"]:
            line[name] = np.median(_samples(row, name)) if _samples(row, name) else np.nan
        line |= _quantiles(row, time) | _ratios(row, time, best, baselines, noise) | found
        yield line


def _refuse_above_roof(row: dict, found: dict) -> dict:
    """Faster than the machine can move the bytes: the work was not done, or not timed."""
    beaten = [name for name, share in found.pop("byte_shares").items() if share > ABOVE_ROOF]
    if not beaten:
        return row
    found["roof_share"] = np.nan  # roof / share would be the time
    reason = f"{beaten[0]} is less than its bytes can take: the model of its work or the measurement is wrong"
    return {**{k: v for k, v in row.items() if k not in ("times", "twin")}, "status": "red", "reason": reason}


def _samples(row: dict, time: str) -> list[float]:
    """Those of a row that is "ok": whatever else the file holds has no time."""
    return row.get("times", {}).get(time, []) if row["status"] == "ok" else []


def _quantiles(row: dict, time: str) -> dict:
    samples = _samples(row, time)
    low, median, high = np.quantile(samples, [0.25, 0.5, 0.75]) if samples else [np.nan] * 3
    return {"median": median, "q25": low, "q75": high, "samples": len(samples)}


def _ratios(row: dict, time: str, best: dict | None, baselines: list[dict], noise: float) -> dict:
    """Against the best baseline in any dtype, and against the best one in the row's own dtype."""
    if best is None or not _samples(row, time):
        empty = dict.fromkeys(("best_median", "ratio", "low", "high", "ratio_same_dtype"), np.nan)
        return {"best_baseline": None, "best_waits": False, "verdict": None, **empty}
    ours, theirs = row["times"][time], best["times"][time]
    rounds = min(len(ours), len(theirs))  # a slow provider takes part in the first rounds only
    compared = compare(ours[:rounds], theirs[:rounds], 0.0 if np.isnan(noise) else noise)
    same = [np.median(b["times"][time]) for b in baselines if b["measured_dtype"] == row["measured_dtype"]]
    return {
        "best_baseline": f"{best['provider']} {best['measured_dtype']}",
        "best_waits": bool(best.get("waits")) and time != "op_eager",
        "best_median": np.median(theirs),
        "ratio": compared.ratio,
        "low": compared.low,
        "high": compared.high,
        "verdict": compared.verdict,
        "ratio_same_dtype": min(same) / np.median(ours) if same else np.nan,
    }


def _roofs(row: dict, ceilings: dict | None) -> dict:
    """The fewest bytes, the roof of a cold call in seconds, what it is made of, and the share of it reached."""
    floor = Floor(**row["floor"]) if row.get("floor") else None
    found = {"dram_bytes": floor.dram_bytes if floor else np.nan, "roof": np.nan, "bound": None, "roof_share": np.nan}
    found["byte_shares"] = {}
    if not (floor and ceilings):
        return found
    limits = Ceilings.from_dict(ceilings)
    found["roof"], found["bound"] = roof(floor, limits, cold=True)
    bytes_alone = replace(floor, instructions=0)
    for name in ("kernel_cold", "kernel_warm"):
        if samples := _samples(row, name):
            least, _ = roof(bytes_alone, limits, cold=name == "kernel_cold")
            found["byte_shares"][name] = least / np.median(samples)
    if samples := _samples(row, "kernel_cold"):
        found["roof_share"] = found["roof"] / np.median(samples)
    return found


def best_triton_rows(table: pd.DataFrame) -> pd.DataFrame:
    """Triton's quickest layout of every call, as the baselines are in theirs too; not the other forms of our ops."""
    triton = table[(table["provider"] == "triton") & table["median"].notna()]
    return triton.loc[triton.groupby(CALL, sort=False)["median"].idxmin()]
