"""What is measured, what is stale and what is missing, a folder of results at a time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from .results import STUDY_FILE, Results, ResultsError, read_results
from .study import why_measure
from .workloads import SUITES, Call, calls


@dataclass(frozen=True)
class Status:
    """One results folder: what each call still awaits."""

    folder: Path | None  # None: no GPU has been measured at all
    machine: str
    awaiting: dict[Call, str]  # call -> "missing", "stale: why" or "failed: why"
    versions: str = ""

    def counts(self, suite: str) -> Counter[str]:
        """Calls of a suite by their state: `measured`, `stale`, `failed`, `missing`."""
        states = (self.awaiting.get(c, "measured").split(":")[0] for c in calls("cuda") if c.workload.suite == suite)
        return Counter(states)


def find_statuses(reports: Path) -> tuple[list[Status], list[str]]:
    """The status of every `study.jsonl` in or below `reports` that is of a GPU, a sentence for each unreadable one.

    Where there is none, one status in which everything is missing.
    """
    statuses, problems = [], []
    for path in sorted([*reports.glob(STUDY_FILE), *reports.glob(f"*/{STUDY_FILE}")]):
        try:
            results = read_results(path)
        except ResultsError as error:
            problems.append(str(error))
            continue
        if results.on_gpu:
            statuses.append(Status(path.parent, results.machine, _awaiting(results), _versions(results)))
    return statuses or [Status(None, "no GPU", _awaiting(Results()))], problems


def status_table(found: Status) -> Table:
    """Suites by state."""
    where = f", {found.folder}" if found.folder else " has been measured"
    table = Table(title=f"{found.machine}{where}", caption=found.versions or None, title_justify="left")
    states = ("measured", "stale", "failed", "missing")
    for column in ("suite", *states):
        table.add_column(column, justify="left" if column == "suite" else "right")
    for suite in (s for s in SUITES if s != "cpu"):
        table.add_row(suite, *(str(found.counts(suite)[state]) for state in states))
    return table


def _awaiting(results: Results) -> dict[Call, str]:
    return {call: why for call in calls("cuda") if (why := why_measure(call, results))}


def _versions(results: Results) -> str:
    versions = results.sessions[max(results.sessions)]["environment"].get("versions", {})
    return ", ".join(f"{name} {version}" for name, version in versions.items())
