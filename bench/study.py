"""Everything measured in one go, within a time budget: for a GPU that is lent by the minute and may vanish.

The parent schedules and writes; a worker process measures. A call that hangs or kills its CUDA context costs itself
and nothing else: the worker is replaced. Each call's rows are appended to `study.jsonl` as soon as they exist, so
a study that is cut off, or run again, goes on where it was. The most valuable calls come first.
"""

from __future__ import annotations

import concurrent.futures as futures
import contextlib
import json
import multiprocessing
import os
import re
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from .results import STUDY_FILE, Results, ResultsError, read_results, why_stale
from .workloads import DTYPE_NAMES, Call, calls

RESERVE = 20.0  # seconds of the budget kept for starting up and for writing the report
LONGEST_CALL = 240.0  # seconds; compiling the reference for a GPU takes the better part of a minute


class StudyError(ValueError):
    """The study cannot run as asked; the message is one sentence for the user."""


class WorkerError(RuntimeError):
    """The worker raised an error or died; the message is one sentence."""


class TimeIsUpError(WorkerError):
    """The worker took too long and was stopped."""


@dataclass
class Progress:
    """What a study did."""

    measured: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)  # measured earlier and still valid
    lost: dict[str, str] = field(default_factory=dict)  # call -> why it has no rows
    left: list[str] = field(default_factory=list)  # not begun when the time was up


def parse_budget(text: str) -> float:
    """Seconds from `8m`, `90s`, `1.5h` or `1h30m`.

    Raises:
        StudyError: anything else, or nothing.
    """
    parts = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s?)?", text.strip())
    try:
        hours, minutes, seconds = (float(p or 0) for p in parts.groups())
    except (AttributeError, ValueError):
        raise StudyError(f"budget {text!r} is not a time: write 8m, 90s or 1h30m") from None
    total = 3600 * hours + 60 * minutes + seconds
    if not total > 0:
        raise StudyError(f"budget {text!r} is no time at all: write 8m, 90s or 1h30m")
    return total


def select(device: str, only: Sequence[str]) -> list[Call]:
    """The calls whose name holds every word of at least one of `only`; all of them where that is empty.

    Raises:
        StudyError: nothing matches one of them.
    """
    everything = list(calls(device))
    chosen = []
    for words in only:
        found = [c for c in everything if all(w in f"{c} {c.workload.suite}".split() for w in words.split())]
        if not found:
            names = ", ".join(dict.fromkeys(c.workload.op for c in everything))
            raise StudyError(f"no call matches {words!r}; ops: {names}; every call: mrcnn-bench status --calls")
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
        StudyError: `out` holds the results of another GPU, or nothing matches `only`.
    """
    deadline = time.monotonic() + budget - min(RESERVE, budget / 10)
    wanted = select(device, only)
    progress = Progress()
    with Worker(device) as worker:
        environment, ceilings = worker.call(describe, device, seconds=deadline - time.monotonic())
        earlier = _earlier(out, environment)
        session = max(earlier.sessions, default=0) + 1
        with Log(out, earlier) as log:
            log.write("session", _session(session, environment, ceilings, commit))
            for call in wanted:
                if _is_done(call, earlier, environment):
                    progress.kept.append(str(call))
                elif (left := deadline - time.monotonic()) <= 0:
                    progress.left.append(str(call))
                else:
                    on_event(f"{call}  ({left:.0f} s left)")
                    _measure(call, session, worker, min(left, LONGEST_CALL), log, progress)
    return progress


def _measure(call: Call, session: int, worker: Worker, seconds: float, log: Log, progress: Progress) -> None:
    from .measure import add_floors
    from .providers import variants

    started = time.monotonic()
    future = worker.submit(measure, call, worker.device)
    add_floors(call, [{"measured_dtype": DTYPE_NAMES[v.dtype]} for v in variants(call)])  # while the GPU works
    try:
        rows = worker.result(future, seconds - (time.monotonic() - started))
    except TimeIsUpError as error:
        if seconds < LONGEST_CALL:  # the study's time, not the call's
            progress.left.append(str(call))
        else:
            progress.lost[str(call)] = str(error)
        return
    except WorkerError as error:  # the next call can be measured all the same
        progress.lost[str(call)] = str(error)
        return
    add_floors(call, rows)
    for row in rows:
        log.write("row", {"session": session, **row})
    progress.measured.append(str(call))


def describe(device: str) -> tuple[dict, dict | None]:
    """Environment and ceilings, as seen by the worker."""
    from .environment import describe_environment

    if device == "cpu":
        return describe_environment(), None
    from .ceilings import measure_ceilings

    return describe_environment(), measure_ceilings().to_dict()


def measure(call: Call, device: str) -> list[dict]:
    """`measure_call` in the worker, with memory given back afterwards."""
    import gc

    import torch

    from .environment import sm_clock
    from .measure import measure_call

    rows = measure_call(call, device)
    clock = sm_clock()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return [{**row, "sm_clock": clock} for row in rows]


class Worker:
    """One process that measures, replaced when it hangs or dies. It begins with empty compile caches."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._caches = tempfile.TemporaryDirectory(prefix="study-", ignore_cleanup_errors=True)
        self._pool: futures.ProcessPoolExecutor | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()
        self._caches.cleanup()

    def submit(self, function: Callable[..., object], *args: object) -> futures.Future:
        """Start `function(*args)` in the worker."""
        if self._pool is not None:
            return self._pool.submit(function, *args)
        spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._pool = futures.ProcessPoolExecutor(1, spawn, _die_with_parent)
        caches = {v: f"{self._caches.name}/{v}" for v in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
        with _environment(TRITON_INTERPRET=None, **caches):
            return self._pool.submit(function, *args)

    def result(self, future: futures.Future, seconds: float) -> object:
        """The function's result; on a time-out or a death the worker is stopped and a `WorkerError` raised."""
        try:
            return future.result(timeout=max(seconds, 0))
        except futures.TimeoutError:
            self._stop()
            raise TimeIsUpError(f"stopped after {seconds:.0f} s") from None
        except futures.process.BrokenProcessPool:
            self._stop()
            raise WorkerError("the process died (a broken CUDA context, or out of memory)") from None
        except Exception as error:
            self._stop()  # an error that `measure_call` lets through is one that poisons the process
            raise WorkerError(f"{type(error).__name__}: {error}".split("\n")[0][:300]) from error

    def call(self, function: Callable[..., object], *args: object, seconds: float) -> object:
        """`submit` and `result`."""
        return self.result(self.submit(function, *args), seconds)

    def _stop(self) -> None:
        if self._pool is None:
            return
        for process in list((self._pool._processes or {}).values()):
            process.kill()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = None


def _die_with_parent() -> None:
    """A parent that is killed cannot stop its worker, which would go on holding the GPU."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _environment(**changes: str | None) -> Iterator[None]:
    """Change variables for the processes started inside the block; None unsets one."""
    before = {name: os.environ.get(name) for name in changes}

    def apply(values: dict[str, str | None]) -> None:
        for name, value in values.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

    apply(changes)
    try:
        yield
    finally:
        apply(before)


class Log:
    """`study.jsonl`: rewritten without what is superseded, then appended to line by line, each on disk at once."""

    def __init__(self, out: Path, earlier: Results) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / STUDY_FILE
        used = {row["session"] for row in earlier.rows}
        lines = [_line("session", s) for n, s in sorted(earlier.sessions.items()) if n in used]
        lines += [_line("row", row) for row in earlier.rows]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(lines), encoding="utf-8")
        os.replace(temporary, self.path)

    def __enter__(self) -> Log:
        self._file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def write(self, kind: str, entry: dict) -> None:
        """Append one line; it is on the disk when this returns."""
        self._file.write(_line(kind, entry))
        self._file.flush()
        with contextlib.suppress(OSError):  # a pipe or an odd file system cannot, and need not
            os.fsync(self._file.fileno())


def _line(kind: str, entry: dict) -> str:
    return json.dumps({"kind": kind, **entry}, separators=(",", ":")) + "\n"


def _earlier(out: Path, environment: dict) -> Results:
    from .environment import same_gpu

    if not (out / STUDY_FILE).exists():
        return Results()
    try:
        earlier = read_results(out)
    except ResultsError as error:
        if "holds no measurements" in str(error):  # cut off before the first call was done
            return Results()
        raise StudyError(f"{error} Give another --out, or remove that file.") from error
    if not all(same_gpu(s["environment"], environment) for s in earlier.sessions.values()):
        raise StudyError(f"{out} holds results of {earlier.machine}, this is another machine: give another --out.")
    return earlier


def _is_done(call: Call, earlier: Results, environment: dict) -> bool:
    """All rows are there, still valid, none failed, and of the same versions of PyTorch and Triton."""
    names = (call.workload.op, call.direction, call.workload.name, call.dtype_name)
    rows = earlier.call_rows().get(names, [])
    versions = [earlier.sessions[row["session"]]["environment"].get("versions") for row in rows]
    unchanged = all(why_stale(row) is None and row["status"] != "failed" for row in rows)
    return bool(rows) and unchanged and all(v == environment["versions"] for v in versions)


def _session(session: int, environment: dict, ceilings: dict | None, commit: str | None) -> dict:
    from .environment import describe_commit

    return {
        "session": session,
        "environment": environment,
        "ceilings": ceilings,
        "commit": {"id": commit, "dirty": None} if commit else describe_commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "bench", *sys.argv[1:]]),
    }


def awaiting(results: Results | None, device: str = "cuda") -> Iterator[tuple[Call, str]]:
    """The calls that have no valid measurement in `results`, with the reason: missing, stale or failed."""
    found = results.call_rows() if results else {}
    for call in calls(device):
        rows = found.get((call.workload.op, call.direction, call.workload.name, call.dtype_name), [])
        stale = next((why for row in rows if (why := why_stale(row))), None)
        failed = next((row["reason"] for row in rows if row["status"] == "failed"), None)
        if not rows:
            yield call, "missing"
        elif stale:
            yield call, f"stale: {stale}"
        elif failed:
            yield call, f"failed: {failed}"
