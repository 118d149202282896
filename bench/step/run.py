"""What to measure next, and one row after the other written down."""

from __future__ import annotations

import gc
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mrcnn.errors import GraphError

from ..environment import describe_commit, describe_environment
from .measure_provider import Measured, measure_provider, prepare
from .phases import PhaseClock
from .providers import ABLATION, BASELINE, INFERENCE, LADDER, TOP, Provider, all_providers, in_order_of_value
from .record import OK, Log, Record, StepError, check_continues, read_record, source_hash
from .torchvision_baseline import TorchvisionStep
from .workload import FULL, SMALL, Setting, Workload, make_workload

RESERVE = 15.0  # seconds of the budget kept for the report


@dataclass
class Progress:
    """What a run did: names of rows."""

    measured: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)


def run_step(
    out: Path,
    device: torch.device,
    only: Sequence[str] = (),
    groups: Sequence[str] = (),
    budget: float = 480.0,
    commit: str | None = None,
    on_event: Callable[[str], None] = lambda text: None,
    setting: Setting | None = None,
) -> Progress:
    """Measure what is missing or stale in `out`, the most valuable first, and append it to its step.jsonl.

    Raises:
        StepError: nothing matches `only`, or the folder holds figures of another machine or workload.
        OSError: the folder cannot be written.
    """
    deadline = time.monotonic() + budget - min(RESERVE, budget / 10)
    setting = setting or (FULL if device.type == "cuda" else SMALL)
    wanted = choose(list(all_providers(device.type == "cuda", setting.inference)), only, groups)
    record, environment = read_record(out), describe_environment()
    check_continues(record, environment, setting.title)
    log = Log(out)
    torch.backends.cudnn.benchmark = device.type == "cuda"  # for all: shapes are few
    torch._dynamo.config.recompile_limit = 256  # many models share the code of one class, each with graphs of its own
    torch._dynamo.config.accumulated_recompile_limit = 4096
    workload = make_workload(setting, device)
    workload.described["losses"] = expected_losses(workload)
    on_event(_describe(workload))
    session = _session(record, environment, workload, commit)
    log.add(session)
    record.sessions[session["session"]] = session
    return _Run(workload, record, log, session["session"], deadline, on_event).take(wanted)


@torch.no_grad()
def expected_losses(workload: Workload) -> dict[str, float]:
    """torchvision's in fp32, from the weights that every provider starts with."""
    step = TorchvisionStep(workload, PhaseClock(False), "nchw", "fp32", False)
    return {name: float(loss) for name, loss in step.losses().items()}


def _describe(workload: Workload) -> str:
    described = workload.described
    deviations = ", ".join(f"{name} {value:.2f}" for name, value in described.get("activations_std", {}).items())
    losses = ", ".join(f"{name} {value:.4f}" for name, value in described["losses"].items())
    return f"{described['title']}; standard deviations {deviations}; torchvision in fp32: {losses}"


def choose(providers: list[Provider], only: Sequence[str], groups: Sequence[str]) -> list[Provider]:
    """Those of the groups that match any of `only`, the most valuable first.

    Raises:
        StepError: one of `only` matches nothing.
    """
    chosen = [p for p in providers if not groups or p.group in groups]
    for words in only:
        if not any(p.matches(words) for p in chosen):
            raise StepError(f"no row matches {words!r}; rows are: {', '.join(p.name for p in chosen)}")
    return in_order_of_value([p for p in chosen if not only or any(p.matches(words) for words in only)])


def _session(record: Record, environment: dict, workload: Workload, commit: str | None) -> dict[str, Any]:
    on_gpu = workload.device.type == "cuda"
    return {
        "kind": "session",
        "session": max(record.sessions, default=0) + 1,
        "environment": environment if on_gpu else environment | {"gpu": None},
        "commit": {"id": commit, "dirty": None} if commit else describe_commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["mrcnn-bench", *sys.argv[1:]]),
        "on_gpu": on_gpu,
        "workload": workload.described,
    }


@dataclass
class _Run:
    workload: Workload
    record: Record
    log: Log
    session: int
    deadline: float
    on_event: Callable[[str], None]
    rival: Measured | None = None  # the baseline that is kept alive, to be measured beside the next provider

    def take(self, wanted: list[Provider]) -> Progress:
        """Measure, in order; what has failed before comes last."""
        progress = Progress()
        wanted = sorted(wanted, key=lambda p: self._status(p) not in (None, OK))
        last_baseline = max((i for i, p in enumerate(wanted) if p.group == BASELINE), default=-1)
        top = [p for p in wanted if p.name == TOP]
        # Once more after the last baseline, where one of those has turned out to be the best.
        for provider in [*wanted[: last_baseline + 1], *top, *wanted[last_baseline + 1 :]]:
            if self._is_fresh(provider):
                if provider.name not in progress.measured + progress.kept:
                    progress.kept.append(provider.name)
            elif time.monotonic() > self.deadline:
                progress.left.append(provider.name)
            elif provider.name not in progress.failed:
                self._measure(provider, progress)
        self._drop_rival()
        return progress

    def _status(self, provider: Provider) -> str | None:
        row = self.record.row(provider.name)
        return row["status"] if row else None

    def _is_fresh(self, provider: Provider) -> bool:
        row = self.record.row(provider.name)
        if row is None or row["status"] != OK or row["sources"] != _sources(provider):
            return False
        best = self._best_baseline(provider)
        beside = (row.get("reference") or {}).get("name")
        return provider.name != TOP or best is None or beside in (None, best.name)

    def _measure(self, provider: Provider, progress: Progress) -> None:
        self.on_event(f"{provider.name} ...")
        row = {"kind": "row", "session": self.session, "name": provider.name, "group": provider.group}
        row |= {"why": provider.why, "options": provider.options, "sources": _sources(provider)}
        if provider.group == BASELINE and provider.compiles:
            self._drop_rival_if(lambda rival: rival.provider.compiles)
            # Sizes and strides that an earlier candidate has made symbols would slow this one.
            torch._dynamo.reset()
        rival = self._rival_of(provider)
        left = max(self.deadline - time.monotonic(), 30.0)
        row |= measure_provider(provider, self.workload, rival, left, twin=provider.name == TOP)
        if row.pop("out_of_memory", False) and rival is not None:
            rival = None  # or it would stay alive
            self._drop_rival()
            row |= measure_provider(provider, self.workload, None, left)
        _collect()
        self.log.add(row)
        self.record.rows[provider.name] = row
        if row["status"] == OK:
            progress.measured = list(dict.fromkeys([*progress.measured, provider.name]))
        else:
            progress.failed[provider.name] = row["reason"]
        self.on_event(f"{provider.name}: {outcome(row)}")
        if row["status"] != OK and row["reason"].startswith(GraphError.__name__):
            raise StepError(f"{provider.name}: {row['reason']}; run the same command again for the other rows")
        if self.workload.device.type == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                raise StepError(f"the GPU's context is broken ({error}): run the same command again") from None

    def _best_baseline(self, provider: Provider) -> Provider | None:
        """The quickest that was measured of what `provider` is compared with; of the eager ones for a baseline."""
        family = _family(provider)
        known = all_providers(self.workload.device.type == "cuda", self.workload.setting.inference)
        candidates = [
            (row["seconds_per_step"], p)
            for p in known
            if _is_baseline(p) and _family(p) == family and p.name != provider.name
            if (row := self.record.row(p.name)) and row["status"] == OK and row["sources"] == _sources(p)
            if not (_is_baseline(provider) and p.compiles)
        ]
        return min(candidates, key=lambda found: found[0])[1] if candidates else None

    def _rival_of(self, provider: Provider) -> Measured | None:
        """Its best baseline, alive; None where there is none or it cannot be made again."""
        best = self._best_baseline(provider)
        if best is None or provider.group not in (BASELINE, LADDER, INFERENCE, ABLATION):
            self._drop_rival()
            return None
        if self.rival is None or self.rival.provider.name != best.name:
            self._drop_rival()
            if best.compiles:
                torch._dynamo.reset()
            try:
                self.rival = prepare(best, self.workload)
            except Exception as error:
                self.on_event(f"{best.name} cannot be made again: {error}")
        return self.rival

    def _drop_rival_if(self, condition: Callable[[Measured], bool]) -> None:
        if self.rival is not None and condition(self.rival):
            self._drop_rival()

    def _drop_rival(self) -> None:
        self.rival = None
        _collect()


def outcome(row: dict) -> str:
    """A line for the terminal."""
    if row["status"] != OK:
        return f"{row['status']}: {row['reason']}"
    if "check" in row:
        modes = " against ".join(row["check"]["modes"])
        return f"{modes}: {'equal, bit for bit' if row['check']['equal'] else 'NOT equal'}"
    if "rates" in row:
        return ", ".join(f"{name} {rate['images_per_second']:.1f} img/s" for name, rate in row["rates"].items())
    counts = ", ".join(f"{count} {name}" for name, count in row.get("counts", {}).items())
    time = f"{row['images_per_second']:.1f} img/s, {1e3 * row['seconds_per_step']:.1f} ms, {row['mode']}"
    return f"{time}; {counts}" if counts else time


def _family(provider: Provider) -> str:
    return f"inference {provider.options['images']}" if provider.group == INFERENCE else "training"


def _is_baseline(provider: Provider) -> bool:
    return provider.name.startswith("torchvision")


def _sources(provider: Provider) -> str:
    return source_hash(_is_baseline(provider))


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
