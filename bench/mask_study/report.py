"""README.md of a study: what was asked, the verdicts, the numbers, where it ran, what it does not show."""

from __future__ import annotations

from pathlib import Path

from mrcnn.data.shapes import CROWD_OBJECTS

from ..report import write_whole
from .arms import ARMS, HELD_OUT_SEED, JUMP_CAP, JUMP_WINDOW, METRICS, THRESHOLD, THRESHOLDS, Metric
from .figures import curves, numbers, render, sheet
from .record import STUDY_FILE, Record
from .statistics import (
    BEYOND_BOX,
    CONFIDENCE,
    EMPTY,
    EQUAL,
    TOO_FEW,
    Interval,
    Verdict,
    compare,
    judge,
    paired,
    t_interval,
    unlearned,
    values_of,
)

NOTES_FILE = "notes.md"  # what a person has to say of how a study came about
SHEET_FILE = "sheet.jpg"
NOT_COMPARED = ("final_mask_loss",)  # the arms' losses have different scales


def write_study_report(record: Record, folder: Path) -> list[Path]:
    """Write README.md, the figures and the sheet; README.md first in what is returned, and last to appear."""
    files: dict[Path, bytes] = {folder / "README.md": b""}
    if record.runs:
        for name, figure in (("curves", curves(record)), ("numbers", numbers(record))):
            files |= {folder / f"{name}.{kind}": render(figure, kind) for kind in ("svg", "png")}
        drawn = sheet(record)
        if drawn is not None:
            files[folder / SHEET_FILE] = drawn
    notes = folder / NOTES_FILE
    text = notes.read_text(encoding="utf-8", errors="replace") if notes.exists() else ""
    files[folder / "README.md"] = markdown(record, (folder / SHEET_FILE) in files, text).encode()
    for path, content in reversed(files.items()):
        write_whole(path, content)
    return list(files)


def markdown(record: Record, has_sheet: bool, notes: str = "") -> str:
    """The page; `notes` stand in it as they are."""
    verdicts = judge(record.runs)
    parts = [
        "# Three forms of the mask loss",
        _asked(),
        "## Verdicts",
        _verdicts(record, verdicts),
        *_dependent(verdicts),
        *_unlearned(record),
        "## Numbers",
        _table(record),
        _definitions(record),
    ]
    if record.runs:
        parts += [_figures(has_sheet)]
    parts += ["## How it was set up", _set_up(record), *([notes.strip()] if notes.strip() else [])]
    parts += ["## Limits", _limits(record), "## Where it ran", _ran(record)]
    return "\n\n".join(parts) + "\n"


def _asked() -> str:
    arms = "\n".join(f"- `{name}`: {text}" for name, text in ARMS.items())
    return (
        "Does the form of the mask loss matter, and does it fail in the ways that are told of it? Three arms that "
        f"differ in `model.mask_loss` alone (`mrcnn/modeling/mask_losses.py`):\n\n{arms}\n\n"
        "Four claims, and the number that decides each, are fixed in `bench/mask_study/arms.py`. A claim is "
        "*supported* where the whole 95 % interval of the difference, paired by seed, lies above zero, *contradicted* "
        "where it lies below, and *not supported* where it holds zero."
    )


def _verdicts(record: Record, verdicts: list[Verdict]) -> str:
    lines = ["| claim | verdict | number | difference, 95 % interval |", "| --- | --- | --- | ---: |"]
    for verdict in verdicts:
        claim, fixed = verdict.claim, verdict.fixed
        word = f"**{verdict.word}**" + (", *depends on the threshold*" if verdict.depends_on_threshold else "")
        means, difference = _means(verdict), _interval(verdict.difference, signed=True)
        if fixed is not None:
            thresholds = ", ".join(f"`{arm}` {_thresholds(record, arm)}" for arm in (claim.first, claim.second))
            means += f" (best thresholds: {thresholds})<br>at {THRESHOLD}: {_means(fixed)}"
            difference += f"<br>at {THRESHOLD}: {_interval(fixed.difference, signed=True)}"
        lines.append(_row([f"{claim.name}. {claim.text}", word, means, difference]))
    return "\n".join(lines)


def _means(verdict: Verdict) -> str:
    claim = verdict.claim
    title = next(metric.title for metric in METRICS if metric.name == claim.metric)
    return f"{title}: `{claim.first}` {_mean(verdict.first)}, `{claim.second}` {_mean(verdict.second)}"


def _thresholds(record: Record, arm: str) -> str:
    values = values_of(record.runs, arm, "best_threshold").values()
    return " to ".join(f"{v:g}" for v in sorted({min(values), max(values)})) if values else "none"


def _dependent(verdicts: list[Verdict]) -> list[str]:
    """A sentence for each claim whose answer is another at the threshold that users of the model get."""
    return [
        f"**Claim {verdict.claim.name} depends on the threshold.** At each arm's best one the difference is "
        f"{_interval(verdict.difference, signed=True)} ({verdict.word}), at {THRESHOLD} it is "
        f"{_interval(verdict.fixed.difference, signed=True)} ({verdict.fixed.word}): neither says of the loss alone "
        "what the claim says."
        for verdict in verdicts
        if verdict.depends_on_threshold
    ]


def _unlearned(record: Record) -> list[str]:
    """What the verdicts cannot mean where an arm has not learned to draw masks; and by which rule that is said."""
    if not record.runs:
        return []
    found = unlearned(record.runs)
    lines = []
    if found.empty:
        names = _listed({arm: f"{_mean(fill)} of the box filled" for arm, fill in found.empty.items()})
        lines += [
            f"- *Empty* at the threshold of {THRESHOLD}: the masks of {names}; no pixel's class is sure enough. A "
            "difference in mask AP to such an arm says that it learns more slowly, not that its masks would be worse "
            "once learned."
        ]
    if found.lowest:
        names = _listed({arm: f"{count} of {of} runs" for arm, (count, of) in found.lowest.items()})
        lines += [
            f"- *At the edge of the grid*, {THRESHOLDS[0]}: the best threshold of {names}. The best may lie lower "
            "still, and the rows of the best threshold are then not those of its best masks."
        ]
    if found.box_like:
        names = _listed({arm: _interval(above, signed=True) for arm, above in found.box_like.items()})
        lines += [
            f"- *Hardly better than the whole box*: the masks of {names}, as mask IoU at the best threshold above that "
            "of the whole box as a mask. The whole box merges every intruder: how often such a mask merges neighbours "
            "says that it hardly tells object from ground, not that the loss joins instances."
        ]
    rule = (
        f"This is said of an arm whose masks fill less than {EMPTY} of the box at {THRESHOLD}, on average; whose best "
        f"threshold is {THRESHOLDS[0]}, the lowest of the grid, in more than half of its runs; or whose best mask IoU "
        f"is not above the whole box's by more than {BEYOND_BOX}, with the whole 95 % interval, paired by seed."
    )
    if not lines:
        return [f"No warning about masks that are not learned applies. {rule.replace('is said', 'would be said', 1)}"]
    return [f"**Read these verdicts as of {record.settings['steps']} steps.** {rule}", "\n".join(lines)]


def _listed(arms: dict[str, str]) -> str:
    return " and ".join(f"`{arm}` ({text})" for arm, text in arms.items())


def _table(record: Record) -> str:
    arms = list(ARMS)
    pairs = [("bce", arm) for arm in arms if arm != "bce"]
    heads = ["metric", *(f"`{arm}`" for arm in arms), *(f"`{one}` beside `{other}`" for one, other in pairs)]
    lines = [_row(heads), _row(["---", *["---:"] * len(arms), *["---"] * len(pairs)])]
    compared = 0
    for metric in METRICS:
        cells = [_interval(t_interval(list(values_of(record.runs, arm, metric.name).values()))) for arm in arms]
        comparisons = [_comparison(record, metric, one, other) for one, other in pairs]
        compared += sum(":" in comparison for comparison in comparisons)
        lines.append(_row([metric.title, *cells, *comparisons]))
    legend = f"Mean over the seeds, with its 95 % interval in brackets. The last {len(pairs)} columns are exploratory"
    if compared:
        legend += (
            f": nothing is corrected for their {compared} comparisons, and if no arm differed in any of them, and they "
            "were independent, at least one would still be called a difference with a probability of "
            f"{100 * (1 - CONFIDENCE**compared):.0f} %"
        )
    return f"{legend}.\n\n" + "\n".join(lines)


def _comparison(record: Record, metric: Metric, one: str, other: str) -> str:
    """A word and the interval behind it; or why there is no such word."""
    if metric.name in NOT_COMPARED:
        return "not comparable"
    difference = paired(record.runs, metric.name, one, other)
    word = compare(difference, metric.up)
    return word if word in (TOO_FEW, EQUAL) else f"{word}: {_interval(difference, signed=True)}"


def _definitions(record: Record) -> str:
    lines = [f"- {metric.title}: {metric.meaning}." for metric in METRICS]
    objects = t_interval([run["metrics"]["given_object_fill"] for run in record.runs])
    counts = {name: _range(record, name) for name in ("given_intruders", "matched_with_intruder", "matched", "objects")}
    return (
        "What they are:\n\n" + "\n".join(lines) + "\n\n"
        "*Boxes given* isolates the mask branch: the mask head is asked for each held-out object in its own box and "
        "class, so that the box side has no say. An *intruder* is another visible object with at least 16 pixels, and "
        "at least a quarter of its visible pixels, inside the box; it is *covered* where the mask contains at least "
        "half of those pixels in the box. A covered intruder of the same class is a merged instance. Objects' masks "
        "are what is visible of them and share no pixel, so that a perfect mask merges none. Objects fill "
        f"{_mean(objects)} of their boxes. A run has {counts['objects']} held-out objects with "
        f"{counts['given_intruders']} intruders of the same class, and {counts['matched']} matched detections, "
        f"{counts['matched_with_intruder']} of them with such an intruder."
    )


def _figures(has_sheet: bool) -> str:
    parts = [
        "## Pictures",
        "Loss, averaged over ten steps: mean over the seeds, and from the lowest to the highest seed. Mask losses of "
        "different arms have different scales.",
        "![total and mask loss of the three arms](curves.png)",
        "Each run a dot, the mean a line, its 95 % interval upright.",
        "![numbers of every run by arm](numbers.png)",
    ]
    if has_sheet:
        parts += [
            f"Held-out pictures of the first seed, none chosen: masks of every object in its own box, at {THRESHOLD}.",
            f"![ground truth beside the masks of the three arms]({SHEET_FILE})",
        ]
    return "\n\n".join(parts)


def _set_up(record: Record) -> str:
    settings = record.settings
    config = settings["config"]
    model, train, side = config["model"], config["train"], config["data"]["image_size"]
    low, high = CROWD_OBJECTS
    return (
        f"- Data: `ShapesDataset`, {settings['kinds']} classes, `crowded`: {low} to {high} shapes a picture of {side} "
        f"x {side} pixels, most of them put against another, most of those of its class. The colour tells the class, "
        "lighter or darker: classes are learnt quickly, and neighbours of one class look alike. No picture is seen "
        f"twice in training; measured on {settings['images']} others, new ones for each seed (data seed + "
        f"{HELD_OUT_SEED}). No augmentation.\n"
        f"- Model: `tiny` ({model['backbone']}, group norm, {model['fpn_channels']}-channel pyramid, from scratch), "
        "with group norm in pyramid and heads, smaller anchors, all RoIs pooled from P2, "
        f"{model['roi_samples']} RoIs an image and {model['mask_layers']} convolutions in the mask head.\n"
        f"- Training: {train['steps']} steps of {train['batch_size']} pictures, AdamW, learning rate {train['lr']}, "
        f"{train['schedule']} after {train['warmup_steps']} steps of warm-up, gradients clipped at "
        f"{train['clip_norm']}.\n"
        "- Paired: the arms of a seed begin with the same weights and see the same pictures in the same order; they "
        "take turns within a seed.\n"
        f"- Largest jump: a step's total loss over the median of the {JUMP_WINDOW} before it, the largest of the run; "
        f"a loss that is not finite counts as {JUMP_CAP:.0f}.\n"
        f"- Probabilities above {THRESHOLD} make the mask, in every arm, as they do for users of the model. With "
        "`softmax` and `canvas` that needs the class's channel to beat all others together: a mask head that sees the "
        "object but not its class leaves it out, though the box head knew. The rows of the best threshold, chosen for "
        "each run on the held-out pictures themselves, take that out; claim 3 is judged there, as an empty mask merges "
        "nothing.\n"
        "- `softmax` with one class is identically 0, loss and gradients: there is nothing to compete with. That is a "
        "matter of algebra and is not run here."
    )


def _limits(record: Record) -> str:
    seeds = len({run["seed"] for run in record.runs})
    reached = t_interval(list(values_of(record.runs, "bce", "segm_AP50").values()))
    return (
        f"{seeds} seed{'s' if seeds != 1 else ''}, a small model, a short training and synthetic shapes: the intervals "
        "say how far the mean would move with other seeds and pictures, not with another data set or a longer "
        "training. Each interval is a 95 % one; four claims are tested and nothing is corrected for that. An interval "
        "of few seeds leans on differences being roughly normal. *No difference shown* is not equality.\n\n"
        f"The training is short: `bce` reaches a mask AP50 of {_mean(reached)}. What the box side finds bounds every "
        "mask AP, and the rows with boxes given say more of the masks. The two forms of softmax also have to learn the "
        "classes in the mask head, which takes longer than telling object from ground: what the table says of them at "
        "the threshold of 0.5 is a statement about this budget, and a longer training may change it."
    )


def _machine(run: dict, device: str) -> str:
    """Where a run was made, by what."""
    environment = run["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    machine = (
        environment["gpu"]["name"]
        if device == "cuda"
        else f"{environment['cpu_name'] or 'a CPU'} ({environment['cpus']} cores, {run['threads']} in use, no GPU)"
    )
    return f"{machine}; Python {environment['python']}, {versions}"


def _commit(run: dict) -> str:
    commit = run["commit"]
    return f"`{commit['id'][:12]}`" + (" and uncommitted changes" if commit["dirty"] else "")


def _mixed(runs: list[dict]) -> list[str]:
    """What to say where runs were made by different versions."""
    versions = [run["environment"]["versions"] | {"Python": run["environment"]["python"]} for run in runs]
    different = {
        name: found
        for name in sorted({name for each in versions for name in each})
        if len(found := list(dict.fromkeys(each.get(name) for each in versions))) > 1
    }
    if not different:
        return []
    names = "; ".join(f"{name} {', '.join(str(v or 'none') for v in found)}" for name, found in different.items())
    return [
        f"- **Runs of different versions are mixed** ({names}): where the runs of a seed were not all made by the "
        "same, their difference may be the versions' and not the arms'"
    ]


def _ran(record: Record) -> str:
    settings, runs = record.settings, record.runs
    seconds = sum(run["train_seconds"] + run["measure_seconds"] for run in runs)
    sources = sorted({run["source"] for run in runs})
    lines = [
        *(f"- {machine}" for machine in dict.fromkeys(_machine(run, settings["device"]) for run in runs)),
        *_mixed(runs),
        f"- {len(runs)} runs, seeds {_list(sorted({run['seed'] for run in runs}))}, {seconds / 60:.0f} minutes in all",
        f"- Commit {', '.join(dict.fromkeys(map(_commit, runs))) or 'none'}; hash of the code that counts: "
        f"`{'`, `'.join(sources)}`" + (" (**more than one**)" if len(sources) > 1 else ""),
        f"- Every run's curves and numbers: [{STUDY_FILE}]({STUDY_FILE})",
    ]
    count = len({run["seed"] for run in record.runs})
    command = (
        f"mrcnn-bench mask-study --out reports/mask-study --seeds {count} --steps {settings['steps']} "
        f"--images {settings['images']} --device {settings['device']}"
    )
    return "\n".join(lines) + f"\n\n```bash\n{command}\n```"


def _range(record: Record, name: str) -> str:
    values = [run["metrics"][name] for run in record.runs]
    if not values:
        return "no"
    low, high = int(min(values)), int(max(values))
    return str(low) if low == high else f"{low} to {high}"


def _mean(interval: Interval | None) -> str:
    return "none" if interval is None else _number(interval.mean)


def _interval(interval: Interval | None, signed: bool = False) -> str:
    if interval is None:
        return "none"
    mean = _number(interval.mean, signed)
    return mean if interval.low is None else f"{mean} [{_number(interval.low)}, {_number(interval.high)}]"


def _number(value: float, signed: bool = False) -> str:
    return f"{value:{'+' if signed else ''}.3f}"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _list(values: list[int]) -> str:
    return ", ".join(map(str, values)) or "none"
