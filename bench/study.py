"""Everything measured in one go, within a time budget: for a GPU that is lent by the minute and may vanish.

This process schedules and writes; a worker process measures. A call that hangs or kills its CUDA context costs itself
and nothing else. Each call is one line of `study.jsonl`, on disk as soon as it exists, so that a study that is cut
off, or run again, goes on where it was. The most valuable calls come first; `torch.compile` of the reference, which
takes longer to compile than everything else to run, comes in a second pass that measures its calls once more.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from .memory import ran_out
from .providers import is_ours
from .results import STUDY_FILE, EmptyResultsError, Results, ResultsError, read_results, why_stale
from .sources import source_hash
from .worker import TimeIsUpError, Worker, WorkerError
from .workloads import DTYPE_NAMES, Call, calls

RESERVE = 30.0  # seconds of the budget kept for starting up and for writing the report
LONGEST_CALL = 240.0  # seconds
LATER = "to be compiled in the study's second pass"
COMPILED = "torch.compile"


class StudyError(ValueError):
    """The study cannot run as asked; the message is one sentence for the user."""


@dataclass
class Progress:
    """What a study did."""

    measured: list[str] = field(default_factory=list)
    compiled: list[str] = field(default_factory=list)  # measured once more, with torch.compile
    kept: list[str] = field(default_factory=list)  # measured earlier and still valid
    lost: dict[str, str] = field(default_factory=dict)  # call -> what went wrong
    left: list[str] = field(default_factory=list)  # not done when the time was up


def parse_budget(text: str) -> float:
    """Seconds from `8m`, `90s`, `1.5h` or `1h30m`.

    Raises:
        StudyError: anything else (a bare number may be meant as minutes), nothing, or more than a week.
    """
    parts = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s)?", text.strip())
    try:
        hours, minutes, seconds = (float(p or 0) for p in parts.groups())
    except (AttributeError, ValueError):
        raise StudyError(f"budget {text!r} is not a time: write 8m, 90s or 1h30m") from None
    total = 3600 * hours + 60 * minutes + seconds
    if not 0 < total < 7 * 86400:
        raise StudyError(f"budget {text!r} is no time at all or longer than a week: write 8m, 90s or 1h30m")
    return total


def select(device: str, only: Sequence[str]) -> list[Call]:
    """The calls that have every word of at least one of `only`, in order; all of them where that is empty.

    Words are those of the call's name and its suite. `roi_align` stands for all RoI ops, `rpn` for those of the region
    proposal network.

    Raises:
        StudyError: nothing matches one of them.
    """
    everything = list(calls(device))
    chosen = []
    for words in only:
        found = [c for c in everything if c.words.issuperset(words.split())]
        if not found:
            known = ", ".join(dict.fromkeys(w for c in everything for w in (*c.key, c.workload.suite)))
            raise StudyError(f"no call on a {device} device matches {words!r}; the words are {known}")
        chosen += found
    return [c for c in everything if c in chosen] if only else everything


def run_study(
    out: Path,
    device: str,
    only: Sequence[str] = (),
    budget: float = 480.0,
    commit: str | None = None,
    on_event: Callable[[str], None] = lambda text: None,
) -> Progress:
    """Measure what is missing or stale in `out` and append it to its `study.jsonl`.

    Raises:
        StudyError: another study is writing to `out`, it holds the results of another GPU, or nothing matches `only`.
        WorkerError: the worker process cannot even describe its machine.
    """
    deadline = time.monotonic() + budget - min(RESERVE, budget / 10)
    wanted = select(device, only)
    with _only_one(out), Worker() as worker:
        try:
            environment, ceilings, problem = worker.call(describe, device, seconds=deadline - time.monotonic())
        except TimeIsUpError:
            raise StudyError(f"a budget of {budget:.0f} s is too short: starting up alone took longer") from None
        if problem:
            on_event(f"no roofs: {problem}")
            worker.replace()  # whatever went wrong may have broken its CUDA context
        earlier = _earlier(out, environment)
        number = max(earlier.sessions, default=0) + 1
        session = _session(number, environment, ceilings, commit)
        with Log(out, earlier) as log:
            longest = min(LONGEST_CALL, budget / 3)
            return _Study(device, session, deadline, longest, worker, log, earlier, on_event).run(wanted)


@dataclass
class _Study:
    """The state of one run, from the first call to the last."""

    device: str
    session: dict
    deadline: float
    longest: float  # seconds for one call
    worker: Worker
    log: Log
    earlier: Results
    on_event: Callable[[str], None]
    progress: Progress = field(default_factory=Progress)
    rows: dict[tuple, list[dict]] = field(default_factory=dict)  # call -> what there is of it by now
    is_noted: bool = False  # whether the session has its line: it is of no use before it has a call

    def run(self, wanted: list[Call]) -> Progress:
        versions = self.session["environment"]["versions"]
        self.rows = self.earlier.call_rows()
        reasons = {call: why_measure(call, self.earlier, versions) for call in wanted}
        self.progress.kept = [str(call) for call, why in reasons.items() if why is None]
        lacking = [call for call, why in reasons.items() if why == f"missing: {COMPILED}"]
        for call in self._hopeless_last([c for c in wanted if reasons[c] is not None and c not in lacking], str):
            # A call in which something failed may hold a compiled row that did not: it is measured as a whole.
            whole = reasons[call].startswith("failed") and self._has_compiled(call)
            done = self._measure(call, str(call), () if whole else (COMPILED,), self.progress.measured)
            if done and not whole and _compiles(call, self.device):
                lacking.append(call)
        for call in self._hopeless_last([call for call in wanted if call in lacking], _with_compiled):
            self._measure(call, _with_compiled(call), (), self.progress.compiled)
        return self.progress

    def _hopeless_last(self, chosen: list[Call], name: Callable[[Call], str]) -> list[Call]:
        """What was lost or failed with this very code may well be so again, and cost minutes: it comes last."""

        def is_hopeless(call: Call) -> bool:
            lost = self.earlier.lost.get(name(call), {}).get("sources") == source_hash(call.workload.op)
            return lost or any(row["status"] == "failed" for row in self.rows.get(call.key, []))

        return sorted(chosen, key=is_hopeless)

    def _has_compiled(self, call: Call) -> bool:
        return any(row["provider"] == COMPILED and row["status"] == "ok" for row in self.rows[call.key])

    def _measure(self, call: Call, name: str, later: tuple[str, ...], done: list[str]) -> bool:
        """Whether the call has been measured, and is on disk."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            self.progress.left.append(name)
            return False
        self.on_event(f"{name}  ({left:.0f} s left)")
        try:
            rows = self._result(call, later, min(left, self.longest))
        except TimeIsUpError as error:
            if left < self.longest:  # the study's time, not the call's
                self.progress.left.append(name)
            else:
                self._lose(call, name, error)
            return False
        except WorkerError as error:  # the next call can be measured all the same
            self._lose(call, name, error)
            return False
        self._write(call, rows)
        done.append(name)
        return True

    def _result(self, call: Call, later: tuple[str, ...], seconds: float) -> list[dict]:
        from .measure import add_floors
        from .providers import variants

        started = time.monotonic()
        future = self.worker.submit(measure, call, self.device, later)
        if self.device == "cuda":  # the floors are counted while the GPU works; a CPU has better things to do
            add_floors(call, [{"measured_dtype": DTYPE_NAMES[v.dtype]} for v in variants(call)])
        rows = self.worker.result(future, seconds - (time.monotonic() - started))
        add_floors(call, rows)
        if not later:  # compiled and warm by now: the first call was the first pass's
            first = {_variant(row): row.get("first_call") for row in self.rows.get(call.key, [])}
            for row in rows:
                if row["status"] == "ok" and first.get(_variant(row)):
                    row["first_call"] = first[_variant(row)]
        return rows

    def _write(self, call: Call, rows: list[dict]) -> None:
        self._note_session()
        self.log.write({"kind": "call", "session": self.session["session"], "rows": rows})
        self.rows[call.key] = rows

    def _note_session(self) -> None:
        if not self.is_noted:
            self.log.write({"kind": "session", **self.session})
            self.is_noted = True

    def _lose(self, call: Call, name: str, error: WorkerError) -> None:
        """Note it, and in the rows as well unless they hold a time: a stale one is worth more than a failure."""
        from .measure import failed_rows

        self.progress.lost[name] = str(error)
        if not any("times" in row for row in self.rows.get(call.key, [])):
            self._write(call, failed_rows(call, self.device, str(error)))
        self._note_session()
        self.log.write({"kind": "lost", "name": name, "sources": source_hash(call.workload.op), "reason": str(error)})


def _variant(row: dict) -> tuple[str, str, str]:
    return row["provider"], row["layout"], row["measured_dtype"]


def _with_compiled(call: Call) -> str:
    return f"{call}, with {COMPILED}"


def describe(device: str) -> tuple[dict, dict | None, str]:
    """Environment, ceilings, and why there are none, as seen by the worker."""
    from .environment import describe_environment

    if device == "cpu":
        return describe_environment(), None, ""
    from .ceilings import measure_ceilings

    try:
        return describe_environment(), measure_ceilings().to_dict(), ""
    except Exception as error:  # times without a roof are worth having
        return describe_environment(), None, f"{type(error).__name__}: {error}".split("\n")[0]


def measure(call: Call, device: str, later: tuple[str, ...]) -> list[dict]:
    """`measure_call` in the worker, with memory given back afterwards."""
    import gc

    import torch

    from .environment import sm_clock
    from .measure import measure_call

    rows = measure_call(call, device, leave_out=dict.fromkeys(later, LATER))
    clock = sm_clock()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return [{**row, "sm_clock": clock} for row in rows]


class Log:
    """`study.jsonl`: rewritten without what is superseded, then appended to line by line, each on disk at once."""

    def __init__(self, out: Path, earlier: Results) -> None:
        self.path = out / STUDY_FILE
        used = {row["session"] for row in earlier.rows}
        lines = [{"kind": "session", **s} for number, s in sorted(earlier.sessions.items()) if number in used]
        for rows in earlier.call_rows().values():
            lines.append({"kind": "call", "session": rows[0]["session"], "rows": rows})
        lines += earlier.lost.values()
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as self._file:
            for line in lines:
                self.write(line)
        os.replace(temporary, self.path)

    def __enter__(self) -> Log:
        self._file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def write(self, entry: dict) -> None:
        """Append one line; it is on the disk when this returns."""
        self._file.write(json.dumps(entry, separators=(",", ":")) + "\n")
        self._file.flush()
        with contextlib.suppress(OSError):  # an odd file system cannot, and need not
            os.fsync(self._file.fileno())


@contextlib.contextmanager
def _only_one(out: Path) -> Iterator[None]:
    """Two studies that write to one file would lose each other's lines."""
    out.mkdir(parents=True, exist_ok=True)
    lock = out / "study.lock"
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StudyError(f"another study is writing to {out}: wait for it, or give another --out.") from None
        except OSError:
            pass  # a file system without locks
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _earlier(out: Path, environment: dict) -> Results:
    from .environment import same_gpu

    if not (out / STUDY_FILE).exists():
        return Results()
    try:
        earlier = read_results(out)
    except EmptyResultsError:  # cut off before the first call was done
        if not (text := (out / STUDY_FILE).read_text(encoding="utf-8")) or text.startswith('{"kind":'):
            return Results()
        raise StudyError(f"{out / STUDY_FILE} was not written by a study. Give another --out, or remove it.") from None
    except ResultsError as error:
        raise StudyError(f"{error} Give another --out, or remove that file.") from error
    if not all(same_gpu(s["environment"], environment) for s in earlier.sessions.values()):
        raise StudyError(f"{out} holds results of {earlier.machine}, this is another machine: give another --out.")
    return earlier


def _compiles(call: Call, device: str) -> bool:
    from .providers import why_not_here

    return why_not_here(COMPILED, call, device) is None


def _session(number: int, environment: dict, ceilings: dict | None, commit: str | None) -> dict:
    from .environment import describe_commit

    return {
        "session": number,
        "environment": environment,
        "ceilings": ceilings,
        "commit": {"id": commit, "dirty": None} if commit else describe_commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "bench", *sys.argv[1:]]),
    }


def variants_of(call: Call) -> set[tuple[str, str, str]]:
    """(provider, layout, dtype) of the rows that the call has to have."""
    from .providers import variants

    return {(v.provider, v.layout, DTYPE_NAMES[v.dtype]) for v in variants(call)}


def why_measure(call: Call, results: Results, versions: dict | None = None) -> str | None:
    """Why the call has to be measured (again): missing, stale or failed; None where it has not.

    With `versions`, other versions of PyTorch or Triton are a reason, too.
    """
    rows = results.call_rows().get(call.key, [])
    if not rows:
        return "missing"
    stale = next((why for row in rows if (why := why_stale(row))), None)
    measured_with = results.sessions[rows[0]["session"]]["environment"].get("versions")
    if stale or (versions is not None and measured_with != versions):
        return f"stale: {stale or 'measured with other versions of PyTorch or Triton'}"
    if {_variant(row) for row in rows} != variants_of(call):
        return "stale: the providers changed"
    # That a baseline needs more memory than there is does not change by trying again: it is a result.
    broken = [row for row in rows if row["status"] == "failed" and (is_ours(row["provider"]) or not ran_out(row))]
    if failed := next((row["reason"] for row in broken), None):
        return f"failed: {failed}"
    if any(row["reason"] == LATER for row in rows):
        return f"missing: {COMPILED}"
    return None
