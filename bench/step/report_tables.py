"""The tables of README.md, line by line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..plots import format_seconds
from ..verdicts import Comparison, compare
from .providers import ABLATION, BASELINE, CHECK, INFERENCE, LADDER, LOADER, Provider, all_providers
from .record import OK, Record
from .workload import FULL, SMALL

NOT_MEASURED = "not measured"
PHASES = ("forward", "backward", "update")


@dataclass(frozen=True)
class View:
    """The record as the report reads it."""

    record: Record

    @property
    def on_gpu(self) -> bool:
        """Whether its figures are a GPU's."""
        return self.record.newest_session()["on_gpu"]

    def providers(self, *groups: str) -> list[Provider]:
        """Those of the groups, in the report's order, measured or not."""
        setting = FULL if self.on_gpu else SMALL
        return [p for p in all_providers(self.on_gpu, setting.inference) if p.group in groups]

    def row(self, name: str) -> dict[str, Any] | None:
        """The row, where it was measured and holds."""
        row = self.record.row(name)
        return row if row is not None and row["status"] == OK else None

    def best(self, providers: list[Provider]) -> dict[str, Any] | None:
        """The quickest row."""
        rows = [row for p in providers if (row := self.row(p.name))]
        return min(rows, key=lambda row: row["seconds_per_step"], default=None)

    def speed(self, name: str, baseline: dict[str, Any] | None) -> tuple[str, Comparison | None]:
        """How many times as fast as the baseline: with the interval where both were measured in the same rounds."""
        row = self.row(name)
        if row is None or baseline is None or name == baseline["name"]:
            return "–", None
        if not self.on_gpu:
            return "not compared on a CPU", None
        beside = row.get("reference") or {}
        if beside.get("name") != baseline["name"]:
            ratio = baseline["seconds_per_step"] / row["seconds_per_step"]
            return f"{ratio:.2f}x (not in the same rounds)", None
        found = compare(row["block_seconds"], beside["block_seconds"], self.noise(row["group"] == INFERENCE))
        return f"{found.ratio:.2f}x [{found.low:.2f}, {found.high:.2f}], {found.verdict}", found

    def noise(self, inference: bool = False) -> float:
        """The largest difference that one provider measured twice in the same rounds showed."""
        rows = [row for row in self.record.rows.values() if (row["group"] == INFERENCE) == inference]
        return max((row["noise"] for row in rows if row.get("noise") is not None), default=0.0)


def training_line(view: View, provider: Provider, best: dict | None) -> list[str]:
    """Of the table of training steps."""
    row = view.row(provider.name)
    if row is None:
        return [provider.name, why_not(view, provider), *["–"] * 6]
    steps, memory, clock = row["step_ms"], row["memory"], row["clock"]
    return [
        f"**{provider.name}**" if best and provider.name == best["name"] else provider.name,
        f"{row['images_per_second']:.1f}",
        f"{steps['p50']:.1f} ({steps['p5']:.1f}–{steps['p95']:.1f})",
        view.speed(provider.name, best)[0],
        row["mode"],
        f"{memory['allocated_bytes'] / 2**30:.1f} / {memory['reserved_bytes'] / 2**30:.1f}" if memory else "–",
        f"{clock['sm_mhz_median']:.0f} / {clock['sm_mhz_min']:.0f}" if "sm_mhz_min" in clock else "–",
        f"{clock['watts_median']:.0f}" if "watts_median" in clock else "–",
    ]


def ladder(view: View, best: dict | None) -> list[list[str]]:
    """Every rung with why it is there and what it gained over the last that was measured."""
    lines, before = [], None
    for provider in view.providers(LADDER):
        row = view.row(provider.name)
        if row is None:
            lines.append([provider.name, provider.why, why_not(view, provider), "–", "–"])
            continue
        gain = f"{before['seconds_per_step'] / row['seconds_per_step']:.2f}x" if before and view.on_gpu else "–"
        time = format_seconds(row["seconds_per_step"])
        lines.append([provider.name, provider.why, time, gain, view.speed(provider.name, best)[0]])
        before = row
    return lines


def phase_line(view: View, provider: Provider) -> list[str]:
    """Milliseconds of each phase."""
    row = view.row(provider.name)
    if row is None:
        return [provider.name, *[NOT_MEASURED] * len(PHASES)]
    return [provider.name, *(f"{row['phases_ms'][p]:.2f}" if p in row["phases_ms"] else "–" for p in PHASES)]


def device_line(view: View, provider: Provider) -> list[str]:
    """Launches, waits, kernels and graph breaks."""
    row = view.row(provider.name)
    if row is None or not row["trace"]:
        return [provider.name, NOT_MEASURED, *["–"] * 5]
    trace = row["trace"]
    waits = sum(trace["waits"].values())
    return [
        provider.name,
        f"{trace['launches']:.0f}",
        f"{trace['graph_launches']:.0f}",
        f"{waits:.0f} / {row['waits']}",
        f"{trace['kernels']:.0f}",
        f"{sum(trace['groups'].values()):.1f}",
        str(row.get("graph_breaks", "–")),
    ]


def groups(view: View, names: list[str | None]) -> dict[str, Any]:
    """Device milliseconds of a step by group of kernels, the best baseline beside ours."""
    rows = {name: row for name in names if name and (row := view.row(name)) and row["trace"]}
    groups = list(dict.fromkeys(group for row in rows.values() for group in row["trace"]["groups"]))
    lines = [[g, *(f"{row['trace']['groups'].get(g, 0.0):.2f}" for row in rows.values())] for g in groups]
    return {"names": list(rows), "lines": lines}


def ours(view: View, top: str) -> list[list[str]]:
    """Milliseconds of each of our kernels."""
    row = view.row(top)
    return [[name, f"{ms:.3f}"] for name, ms in row["trace"].get("ours", {}).items()] if row else []


def ablation(view: View, top: str) -> list[list[str]]:
    """What each op is worth, and how its reference ran."""
    whole, lines = view.row(top), []
    for provider in view.providers(ABLATION):
        row = view.row(provider.name)
        if row is None:
            lines.append([provider.name, why_not(view, provider), "–", "–", ""])
            continue
        worth = row["seconds_per_step"] - whole["seconds_per_step"] if whole and view.on_gpu else None
        same = whole is not None and row["mode"] == whole["mode"]
        text = "–" if worth is None else f"{1e3 * worth:+.2f} ms"
        note = "" if same or whole is None else f"{row['mode']}, not {whole['mode']}: {'; '.join(row['notes'])}"
        lines.append([provider.name, format_seconds(row["seconds_per_step"]), text, row["mode"], note])
    return lines


def by_images(view: View) -> dict[str, list[tuple[str, dict]]]:
    """Names and rows of inference, by the number of images."""
    found: dict[str, list[tuple[str, dict]]] = {}
    for provider in view.providers(INFERENCE):
        if row := view.row(provider.name):
            found.setdefault(f"batch {provider.options['images']}", []).append((provider.name, row))
    return found


def inference(view: View) -> list[list[str]]:
    """A line a provider."""
    lines, all_of = [], view.providers(INFERENCE)
    for provider in all_of:
        images = provider.options["images"]
        rivals = [p for p in all_of if p.name.startswith("torchvision") and p.options["images"] == images]
        row, best = view.row(provider.name), view.best(rivals)
        if row is None:
            lines.append([provider.name, why_not(view, provider), "–", "–", "–", "–"])
            continue
        waits = "–" if row["waits"] is None else str(row["waits"])
        found = f"{min(row['detections'])}–{max(row['detections'])}"
        times = [format_seconds(row["seconds_per_step"]), f"{row['images_per_second']:.1f}"]
        lines.append([provider.name, *times, view.speed(provider.name, best)[0], waits, found])
    return lines


def loader(view: View) -> list[list[str]]:
    """A line a rate."""
    lines = []
    for provider in view.providers(LOADER):
        row = view.row(provider.name)
        if row is None:
            lines.append([provider.name, why_not(view, provider)])
        else:
            lines += [[name, f"{rate['images_per_second']:.1f}"] for name, rate in row["rates"].items()]
    return lines


def check(view: View) -> str:
    """What comparing bit for bit showed."""
    (provider,) = view.providers(CHECK)
    row = view.record.row(provider.name)
    if row is None or "check" not in row:
        return f"{provider.name}: {why_not(view, provider)}."
    check = row["check"]
    modes = " against ".join(check["modes"])
    if not view.on_gpu:
        modes += ", as a CPU has no graphs: the step against itself"
    if check["equal"]:
        return f"{check['steps']} steps ({modes}): losses and weights are equal, bit for bit."
    first = check["first_difference"]
    differs = f"losses differ from step {first} on" if first else "losses are equal"
    return f"**{check['steps']} steps ({modes}): {differs}; {len(check['weights'])} weights differ.**"


def counts_line(view: View, provider: Provider) -> list[str]:
    """What the provider worked on, and which of its losses are far from torchvision's."""
    row = view.record.row(provider.name)
    counts = (row or {}).get("counts")
    if not counts:
        return [provider.name, *[NOT_MEASURED] * 5, "–"]
    names = ("anchors", "anchors_positive", "rois", "rois_positive", "mask_rois")
    far = ", ".join(row.get("far_losses", [])) or "none"
    return [provider.name, *(str(counts.get(name, "–")) for name in names), far]


def missing(view: View) -> list[str]:
    """Rows without figures, and why."""
    everything = view.providers(BASELINE, LADDER, ABLATION, INFERENCE, LOADER, CHECK)
    return [f"{p.name}: {why_not(view, p)}" for p in everything if view.row(p.name) is None]


def why_not(view: View, provider: Provider) -> str:
    """As a cell of a table."""
    row = view.record.row(provider.name)
    return NOT_MEASURED if row is None else f"{NOT_MEASURED} ({row['status']}: {row['reason']})".replace("|", "/")
