"""What is shown of a predicted step: tables in the terminal, prediction.json and README.md in a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from .report import write_whole
from .roofline import BYTES, COMPUTE, COUNTED, OVERHEAD, STAGES, Row, StepPrediction, Way, as_dict
from .roofline_fusion import FUSIONS, ONE_PASS
from .roofline_trace import BACKWARD, DATA, FORWARD, MULTIPLE, PRODUCT, WEIGHT

JSON, PAGE = "prediction.json", "README.md"
LARGEST = 10
WHOLE = "(the model)"  # what no layer of its own computes
BOUNDS = (COMPUTE, BYTES, COUNTED, OVERHEAD)
THEIRS = (
    "torchvision's maskrcnn_resnet50_fpn, counted the same way, not measured: its backbone, pyramid and heads on as "
    "many RoIs and the same optimizer, without RoIAlign, anchors, proposals, sampling, losses and the host's time, "
    "because a model that asks for values cannot run on tensors without any. Its own way is the separate one: frozen "
    "batch norm promotes maps to fp32, and all mask channels are formed."
)


@dataclass(frozen=True)
class Sheet:
    """A table, whatever it is written in; the first column is text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def sheets(result: StepPrediction, layers: bool = False) -> Iterator[Sheet]:
    """All tables; `layers` adds the long one of every layer."""
    place = middle(result)
    yield _totals(result)
    yield _stages(result, place)
    yield _ways(result, place)
    yield _bounds(result)
    yield _largest(result, place)
    if odd := _odd(result):
        yield odd
    if result.own_times:
        yield _own(result)
    if result.training:
        yield _saved(result)
    if layers:
        yield _layers(result, place)


def middle(result: StepPrediction) -> int:
    """The place of the efficiency that is shown where there is room for one."""
    return len(result.rates.efficiencies) // 2


def headline(result: StepPrediction) -> str:
    """What it is a prediction of."""
    what = "a training step" if result.training else "a detection"
    height, width = result.size
    return (
        f"PREDICTION, not a measurement: {what} of this project's configuration {result.config}, "
        f"{result.batch} x {height} x {width} pixels, on an H200"
    )


def verdict(result: StepPrediction) -> str:
    """The totals against the target, and where the rest of the time would have to go."""
    rates, place = result.rates, middle(result)
    efficiency, way = rates.efficiencies[place], result.ours.ways[ONE_PASS]
    seconds = way.seconds(place)
    text = (
        f"At an efficiency of {efficiency:g} ({rates.matrix * efficiency / 1e12:.0f} TFLOP/s) with pointwise operators "
        f"in {ONE_PASS}: {_ms(seconds)} ms, {result.rate(seconds):.0f} images/s."
    )
    if not result.training:
        return text
    wanted = result.batch / rates.target
    spare = wanted - seconds
    stages = sorted(STAGES, key=lambda stage: -way.seconds(place, stage))[:3]
    where = ", ".join(f"{stage} {_ms(way.seconds(place, stage))}" for stage in stages)
    least = ", ".join(f"{_efficiency(value)} ({fusion})" for fusion, value in result.ours.break_even.items())
    return (
        f"{text} {rates.target:g} images/s allow {_ms(wanted)} ms: "
        f"{_ms(abs(spare))} ms {'are left for what is not in the model' if spare >= 0 else 'too many'}: products that "
        f"run slower, bytes moved twice, waits. The largest stages, in ms: {where}. The least efficiency that reaches "
        f"{rates.target:g} images/s: {least}."
    )


def _totals(result: StepPrediction) -> Sheet:
    rates = result.rates
    at = [f"{e:g} = {rates.matrix * e / 1e12:.0f} TFLOP/s" for e in rates.efficiencies]
    columns = [
        "pointwise operators",
        "kernels",
        "TFLOP",
        "GB",
        *at,
        *([f"least for {rates.target:g}/s"] if result.training else []),
    ]
    rows = []
    for who, prediction in (("", result.ours), ("torchvision, in part: ", result.theirs)):
        for fusion, way in prediction.ways.items() if prediction else ():
            times = [way.seconds(i) for i in range(len(at))]
            # Of a part of a step images a second would be compared with those of a whole one.
            cells = [f"{_ms(s)} ms" + ("" if who else f", {result.rate(s):.0f}/s") for s in times]
            least = [_efficiency(prediction.break_even[fusion])] if result.training else []
            counts = [str(way.kernels), f"{way.flops / 1e12:.2f}", f"{way.bytes / 1e9:.1f}"]
            rows.append([who + fusion, *counts, *cells, *least])
    ways = " ".join(f"{fusion.capitalize()}: {text}." for fusion, text in FUSIONS.items())
    note = f"By the efficiency of products. {ways}" + (f" {THEIRS}" if result.theirs else "")
    return Sheet("The step: milliseconds and images/s", columns, rows, note)


def _stages(result: StepPrediction, place: int) -> Sheet:
    way = result.ours.ways[ONE_PASS]
    rows = []
    for stage in STAGES:
        of = [row for row in way.rows if row.stage == stage]
        if not of:
            continue
        flops = [sum(row.flops for row in of if row.part == part) for part in (FORWARD, DATA, WEIGHT)]
        times = [_ms(way.seconds(i, stage)) for i in range(len(result.rates.efficiencies))]
        kernels, size = sum(row.kernels for row in of), sum(row.bytes for row in of)
        rows.append([stage, *map(_giga, flops), f"{size / 1e9:.2f}", str(kernels), *times, _bound(of, place)])
    at = [f"ms at {e:g}" for e in result.rates.efficiencies]
    columns = [
        "stage",
        "GFLOP forward",
        "data",
        "weight",
        "GB",
        "kernels",
        *at,
        f"bound at {result.rates.efficiencies[place]:g}",
    ]
    note = (
        "Forward, backward for the data and for the weights. What bounds: the share of a stage's time in kernels that "
        "take longer to compute, to move bytes, or to be launched."
    )
    return Sheet(f"By stage, pointwise operators in {ONE_PASS}", columns, rows, note)


def _ways(result: StepPrediction, place: int) -> Sheet:
    """What fusion is worth, stage by stage: where a gap would be."""
    ways = [result.ours.ways[fusion] for fusion in FUSIONS]
    theirs = result.theirs.ways["separate"] if result.theirs else None
    rows = []
    for stage in STAGES:
        times = [way.seconds(place, stage) for way in ways]
        if any(times):
            other = [_ms(theirs.seconds(place, stage)) if stage != "our ops" else "–"] if theirs else []
            worst = _ms(ways[1].seconds(len(result.rates.efficiencies) - 1, stage) - ways[1].seconds(0, stage))
            rows.append([stage, *map(_ms, times), *other, worst])
    efficiencies = result.rates.efficiencies
    last = f"{efficiencies[0]:g} to {efficiencies[-1]:g}"
    columns = ["stage", *FUSIONS, *(["torchvision, separate"] if theirs else []), f"lost from {last}"]
    title = f"Where a gap would be: ms by stage at an efficiency of {efficiencies[place]:g}"
    note = f"The last column: what {ONE_PASS} loses when products run at the last efficiency instead of the first."
    return Sheet(title, columns, rows, note)


def _bounds(result: StepPrediction) -> Sheet:
    rows = []
    for fusion, way in result.ours.ways.items():
        for place, efficiency in enumerate(result.rates.efficiencies):
            found = way.bounds(place)
            rows.append([f"{fusion}, {efficiency:g}", *(_ms(found.get(bound, 0.0)) for bound in BOUNDS)])
    note = (
        f"Kernels' whole time by the slowest of their parts; {COUNTED}: our ops, by instructions or the floor's bytes."
    )
    return Sheet("What binds: ms of the step", ["way, efficiency", *BOUNDS], rows, note)


def _largest(result: StepPrediction, place: int) -> Sheet:
    way = result.ours.ways[ONE_PASS]
    layers = _by_layer(way)
    order = sorted(layers, key=lambda layer: -sum(row.seconds[place] for row in layers[layer]))[:LARGEST]
    rows = []
    for layer in order:
        of = layers[layer]
        seconds = sum(row.seconds[place] for row in of)
        size, flops = sum(row.bytes for row in of), sum(row.flops for row in of)
        share = f"{100 * seconds / way.seconds(place):.1f} %"
        rows.append([layer or WHOLE, _giga(flops), f"{size / 1e6:.0f}", _ms(seconds), share, _bound(of, place)])
    title = f"The {len(rows)} largest layers, all passes, at an efficiency of {result.rates.efficiencies[place]:g}"
    return Sheet(title, ["layer", "GFLOP", "MB", "ms", "share", "bound"], rows)


def _odd(result: StepPrediction) -> Sheet | None:
    """Products with sides that tensor cores do not like."""
    found: dict[str, set[int]] = {}
    for who, prediction in (("", result.ours), ("torchvision: ", result.theirs)):
        for row in prediction.ways[ONE_PASS].rows if prediction else ():
            if row.kind == PRODUCT and row.odd_channels:
                found.setdefault(who + row.layer, set()).update(row.odd_channels)
    if not found:
        return None
    rows = [[layer or WHOLE, ", ".join(map(str, sorted(channels)))] for layer, channels in found.items()]
    note = f"No multiples of {MULTIPLE}: libraries pad them or take slower kernels. The times above know nothing of it."
    return Sheet("Odd channels", ["layer", "channels"], rows, note)


OWN_BYTES = (
    "Their DRAM time is that of the bytes that the workload's boxes touch; the MB of other tables count whole tensors."
)


def _own(result: StepPrediction) -> Sheet:
    rows = [
        [name, str(time.kernels), _ms(time.issue_s), _ms(time.dram_s), _ms(time.seconds)]
        for name, times in result.own_times.items()
        for time in times
    ]
    return Sheet(
        "Our ops by machine code",
        ["op", "kernels", "issue ms", "DRAM ms", "ms"],
        rows,
        f"{result.own_note} {OWN_BYTES}".strip(),
    )


def _saved(result: StepPrediction) -> Sheet:
    both = [result.ours, *([result.theirs] if result.theirs else [])]
    rows = [
        [stage, *(f"{of.saved.get(stage, 0) / 1e6:.0f}" for of in both)]
        for stage in STAGES
        if any(of.saved.get(stage) for of in both)
    ]
    rows.append(["all", *(f"{of.saved_bytes / 1e6:.0f}" for of in both)])
    return Sheet(
        "MB kept for the backward", ["stage", "ours", *(["torchvision, in part"] if result.theirs else [])], rows
    )


def _layers(result: StepPrediction, place: int) -> Sheet:
    parts, rows = (FORWARD, DATA, WEIGHT), []
    for layer, of in _by_layer(result.ours.ways[ONE_PASS]).items():
        products = {row.part: row for row in of if row.kind == PRODUCT}
        flops = [_giga(products[p].flops) if p in products else "" for p in parts]
        sizes = [f"{products[p].bytes / 1e6:.1f}" if p in products else "" for p in parts]
        times = [_ms(products[p].seconds[place]) if p in products else "" for p in parts]
        others = [row for row in of if row.kind != PRODUCT]
        other = [_others([r for r in others if (r.part == BACKWARD) == back], place) for back in (False, True)]
        rows.append([layer or WHOLE, of[0].stage, *flops, *sizes, *times, *other, _bound(of, place)])
    columns = ["layer", "stage", "GFLOP forward", "data", "weight", "MB forward", "data", "weight"]
    columns += ["ms forward", "data", "weight", "other MB, ms forward", "other MB, ms backward", "bound"]
    title = f"Every layer, pointwise operators in {ONE_PASS}, at an efficiency of {result.rates.efficiencies[place]:g}"
    note = (
        "Of products: forward, backward for the data (its input) and for the weight. Other: the kernels without a "
        "product, biases, activations, casts and sums among them. Our ops stand under their own names."
    )
    return Sheet(title, columns, rows, note)


def _others(rows: Sequence[Row], place: int) -> str:
    """MB and ms of kernels without a product."""
    return f"{sum(r.bytes for r in rows) / 1e6:.1f}, {_ms(sum(r.seconds[place] for r in rows))}" if rows else ""


def _by_layer(way: Way) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in way.rows:
        found.setdefault(row.layer, []).append(row)
    return found


def _bound(rows: Sequence[Row], place: int) -> str:
    """What takes most of their time, and how much of it."""
    total: dict[str, float] = {}
    for row in rows:
        for bound, seconds in row.bounds[place].items():
            total[bound] = total.get(bound, 0.0) + seconds
    first = max(total, key=total.__getitem__)
    return f"{first} {100 * total[first] / sum(total.values()):.0f} %"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}" if seconds >= 9.95e-5 else f"{seconds * 1e3:.3f}"


def _giga(flops: int) -> str:
    return f"{flops / 1e9:.1f}" if flops else ""


def _efficiency(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


# Written


def rich_table(sheet: Sheet) -> Table:
    """For a terminal."""
    table = Table(
        title=sheet.title, caption=escape(sheet.note), caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for i, column in enumerate(sheet.columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    for row in sheet.rows:
        table.add_row(*map(escape, row))
    return table


def markdown(result: StepPrediction, command: str) -> str:
    """The page."""
    parts = [f"# {headline(result)}", f"**A prediction from counts: nothing here was measured.** {verdict(result)}"]
    parts.append("Written by\n\n```\n" + command + "\n```")
    parts += ["## Assumptions", "\n".join(f"- {text}" for text in _assumptions(result))]
    for sheet in sheets(result, layers=True):
        lines = [_line(sheet.columns), _line(["---", *["---:"] * (len(sheet.columns) - 1)]), *map(_line, sheet.rows)]
        parts += [f"## {sheet.title}", "\n".join(lines), *([sheet.note] if sheet.note else [])]
    return "\n\n".join(parts) + "\n"


def _assumptions(result: StepPrediction) -> list[str]:
    batch = (
        f"A batch is {result.batch_bytes / 1e6:.1f} MB with {result.objects} object slots an image: "
        f"{_ms(result.copy_s)} ms over PCIe, hidden behind the step before."
    )
    return [*result.rates.assumptions, batch, *([result.own_note] if result.own_note else [])]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def write_prediction(result: StepPrediction, out: Path, command: str) -> list[Path]:
    """prediction.json and README.md to the folder `out`; raises OSError where it cannot be written."""
    out.mkdir(parents=True, exist_ok=True)
    content = {JSON: json.dumps(as_dict(result)) + "\n", PAGE: markdown(result, command)}
    for name, text in content.items():
        write_whole(out / name, text.encode())
    return [out / name for name in content]
