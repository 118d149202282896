"""step.jsonl: a line a session and a line a row, written as soon as there is one; a killed run goes on from it."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..environment import same_gpu
from ..sources import ROOT, code_of

STEP_FILE = "step.jsonl"
OK, FAILED, RED = "ok", "failed", "red"
# What a row's numbers come from.
SOURCES = ("kernels", "mrcnn", "bench/step", "bench/timing.py", "bench/jpeg_set.py", "bench/step_profile/run.py")
BASELINE_SOURCES = (
    *(
        f"bench/step/{name}.py"
        for name in ("workload", "torchvision_baseline", "phases", "measure", "measure_provider")
    ),
    *("bench/timing.py", "bench/step_profile/run.py", "mrcnn/data/shapes.py"),
)
NOT_SOURCES = ("bench/step/report.py", "bench/step/report_tables.py", "bench/step/command.py", "mrcnn/cli")


class StepError(ValueError):
    """Something that the user can mend; the message is a sentence for them."""


@functools.cache
def source_hash(baseline: bool) -> str:
    """Of the code that a row depends on; comments and docstrings do not count."""
    digest = hashlib.sha256()
    for place in BASELINE_SOURCES if baseline else SOURCES:
        for file in sorted((ROOT / place).rglob("*.py")) or [ROOT / place]:
            name = file.relative_to(ROOT).as_posix()
            if file.exists() and not name.startswith(NOT_SOURCES):
                code = code_of(file.read_text(encoding="utf-8"))
                digest.update(f"{name}\n{code}\n".encode())
    return digest.hexdigest()[:12]


@dataclass
class Record:
    """Sessions by number; of each row the newest measurement."""

    sessions: dict[int, dict[str, Any]] = field(default_factory=dict)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    def row(self, name: str) -> dict[str, Any] | None:
        """The newest one of that name."""
        return self.rows.get(name)

    def newest_session(self) -> dict[str, Any]:
        """The last one that began."""
        return self.sessions[max(self.sessions)]


def read_record(folder: Path) -> Record:
    """What is in the folder; a line that was cut off while it was written does not count.

    Raises:
        StepError: the file is not of this command.
    """
    record, path = Record(), folder / STEP_FILE
    if not path.exists():
        return record
    try:
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            entry = json.loads(line)
            if entry["kind"] == "session":
                record.sessions[entry["session"]] = entry
            else:
                record.sessions[entry["session"]]  # KeyError: a row that nobody can say where it is from
                record.rows[entry["name"]] = entry
    except (ValueError, KeyError, TypeError) as error:
        raise StepError(f"{path} was not written by this command ({error!r}): choose another folder") from None
    return record


def check_continues(record: Record, environment: dict, setting: str) -> None:
    """Raise StepError where the record is of another kind of GPU or another workload."""
    if not record.sessions:
        return
    earlier = record.newest_session()
    if not same_gpu(earlier["environment"], environment):
        raise StepError("the folder holds figures of another machine: choose another folder")
    if earlier["workload"]["title"] != setting:
        raise StepError("the folder holds figures of another workload: choose another folder")


class Log:
    """Appends whole lines."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / STEP_FILE
        if self.path.exists() and (content := self.path.read_bytes()) and not content.endswith(b"\n"):
            with self.path.open("r+b") as file:  # drop what a killed run left of a line
                file.truncate(content.rfind(b"\n") + 1)

    def add(self, entry: dict[str, Any]) -> None:
        """On disk when it returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
