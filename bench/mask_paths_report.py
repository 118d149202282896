"""What the runs of `mask-paths` say: differences of two paths beside the spread over seeds, the page and its plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev

import numpy as np
from matplotlib.figure import Figure

from .mask_paths import FUSED, KERNEL, ORDINARY, PATHS, REFERENCE, RESULTS_FILE, PathsRecord
from .mask_study.figures import render
from .mask_study.statistics import MIN_SEEDS, T_QUANTILES, TOO_FEW, Interval, paired, t_interval, values_of
from .plots import MARKS
from .report import write_whole

WITHIN, OUTSIDE, UNDECIDED = "within the spread", "outside the spread", "not decided"
PARTS = 4  # of a run, each judged alone: quiet steps at its beginning must not hide what comes later
BLOCK = 10  # steps of a block, and of the moving average
SAME = 1e-6  # mask losses this close are called equal
FLOOR = 1e-8  # where the plot ends; two equal losses have no logarithm
CURVES = (("mask", False), ("mask", True), ("total", False), ("total", True))  # loss, smoothed
FINAL = (("mask_loss", "mask loss"), ("given_iou", "mask IoU"))
COMPARED = (FUSED, REFERENCE)


@dataclass(frozen=True)
class CurveComparison:
    """Two paths' losses, step by step."""

    differences: np.ndarray  # of each part of the run: root mean square over its steps and the seeds
    spreads: np.ndarray  # of each part: the same between ordinary runs of two seeds
    whole: float  # difference over spread of all steps together
    blocks: np.ndarray  # of each ten steps: whether the difference is more than the standard deviation over the seeds
    points: float  # share of all steps of all seeds where it is at most the range of the ordinary seeds
    word: str

    @property
    def ratios(self) -> np.ndarray:
        """Difference over spread of each part; 0 where both are."""
        return ratio(self.differences, self.spreads)


def ratio(differences: np.ndarray, spreads: np.ndarray) -> np.ndarray:
    """0 / 0 is 0 here: what does not differ is no part of any spread."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((differences == 0) & (spreads == 0), 0.0, differences / spreads)


def compare_curves(ordinary: np.ndarray, other: np.ndarray) -> CurveComparison:
    """Losses [seeds, steps] of two paths of the same seeds, NaN where one was not finite.

    Within the spread: in every quarter of the run the paths of a seed are no farther apart than ordinary runs of two
    seeds, both as root mean squares. The latter is sqrt(2) times the standard deviation over the seeds. What is not
    finite is outside.
    """
    seeds, steps = ordinary.shape
    squares = np.square(other - ordinary).mean(axis=0)
    variances = ordinary.var(axis=0, ddof=1) if seeds > 1 else np.full(steps, np.nan)
    parts = np.array_split(np.arange(steps), min(PARTS, steps))
    differences, spreads = (np.sqrt([v[part].mean() for part in parts]) for v in (squares, 2 * variances))
    whole = ratio(np.sqrt(squares.mean()), np.sqrt(2 * variances.mean())).item()
    tens = range(0, steps, BLOCK)
    blocks = np.array([squares[i : i + BLOCK].mean() > variances[i : i + BLOCK].mean() for i in tens])
    points = (np.abs(other - ordinary) <= np.ptp(ordinary, axis=0)).mean()
    if not (np.isfinite(ordinary).all() and np.isfinite(other).all()):
        word = OUTSIDE
    elif seeds < MIN_SEEDS:
        word = TOO_FEW
    else:
        word = WITHIN if (differences <= spreads).all() else OUTSIDE
    return CurveComparison(differences, spreads, whole, blocks, points, word)


def compare_final(runs: Sequence[dict], path: str, metric: str) -> tuple[Interval | None, float | None, str]:
    """The difference path - ordinary over seeds, the ordinary path's standard deviation, and the word for both.

    Within the spread: the whole 95 % interval of the mean difference is nearer to 0 than one standard deviation, which
    few seeds or scattered differences do not show. Outside: none of it is. A number that is not finite is outside.
    """
    both = _seeds(runs, path)
    runs = [run for run in runs if run["seed"] in both]
    difference, values = paired(runs, metric, path, ORDINARY), values_of(runs, ORDINARY, metric)
    spread = stdev(values.values()) if len(values) > 1 else None
    if (difference.count if difference else 0) < len(both):
        return difference, spread, OUTSIDE
    if difference is None or difference.count < MIN_SEEDS:
        return difference, spread, TOO_FEW
    if -spread <= difference.low and difference.high <= spread:
        return difference, spread, WITHIN
    return difference, spread, OUTSIDE if difference.low > spread or difference.high < -spread else UNDECIDED


def verdict(runs: Sequence[dict], path: str) -> str:
    """Of the curves and of the held-out mask loss; the worst word counts."""
    return _worst([curves_word(runs, path), compare_final(runs, path, "mask_loss")[2]])


def curves_word(runs: Sequence[dict], path: str) -> str:
    """Of both losses' curves, raw and smoothed."""
    if not _seeds(runs, path):
        return TOO_FEW
    return _worst([compare_curves(*curves_of(runs, path, *curve)).word for curve in CURVES])


def _worst(words: list[str]) -> str:
    return next(word for word in (OUTSIDE, TOO_FEW, UNDECIDED, WITHIN) if word in words)


def seeds_needed(difference: Interval, spread: float) -> int | None:
    """For an interval inside the spread, if the differences scatter like these and their mean is 0; None: over 31."""
    t = lambda count: T_QUANTILES[min(count - 1, len(T_QUANTILES)) - 1]
    deviation = (difference.high - difference.low) / 2 * difference.count**0.5 / t(difference.count)
    return next((n for n in range(MIN_SEEDS, len(T_QUANTILES) + 2) if t(n) * deviation / n**0.5 <= spread), None)


def curves_of(runs: Sequence[dict], path: str, loss: str, smoothed: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Losses [seeds, steps] of the ordinary path and of `path`, of the seeds that have both."""
    found = {(run["arm"], run["seed"]): run["curves"][loss] for run in runs}
    both = []
    for arm in (ORDINARY, path):
        rows = np.array([[np.nan if v is None else v for v in found[arm, s]] for s in _seeds(runs, path)])
        both.append(smooth(rows) if smoothed else rows)
    return both[0], both[1]


def smooth(curves: np.ndarray) -> np.ndarray:
    """Moving average of [seeds, steps] over ten steps; the first value is that of the first ten."""
    window = min(BLOCK, curves.shape[1])
    return np.stack([np.convolve(row, np.full(window, 1 / window), "valid") for row in curves])


def equal_steps(ordinary: np.ndarray, other: np.ndarray) -> list[int]:
    """Of each seed: after how many steps the mask losses first differ by more than SAME."""
    apart = ~(np.abs(other - ordinary) <= SAME)  # NaN is apart
    return [int(row.argmax()) if row.any() else len(row) for row in apart]


def _seeds(runs: Sequence[dict], path: str) -> list[int]:
    """That have both paths."""
    return sorted(set.intersection(*({run["seed"] for run in runs if run["arm"] == arm} for arm in (ORDINARY, path))))


def figure(record: PathsRecord) -> Figure:
    """The smoothed mask loss of both paths; and how far they are apart, step by step."""
    ours, theirs, control = (MARKS[PATHS[path]][0] for path in (FUSED, ORDINARY, REFERENCE))
    drawn = Figure(figsize=(7.2, 6.4), layout="constrained")
    above, below = drawn.subplots(2, 1)
    ordinary, fused = curves_of(record.runs, FUSED, "mask", smoothed=True)
    steps = np.arange(ordinary.shape[1]) + min(BLOCK, record.settings["steps"])
    above.fill_between(steps, ordinary.min(0), ordinary.max(0), color=theirs, alpha=0.2, lw=0,
                       label="ordinary: lowest to highest seed")  # fmt: skip
    above.plot(steps, ordinary.mean(0), color=theirs, lw=1.8, label="ordinary: mean")
    above.plot(steps, fused.T, color=ours, lw=0.8, label=_once("fused: each seed", len(fused)))
    above.set_title(f"mask loss, mean of the last {BLOCK} steps", fontsize=9)

    for path, colour, line in ((REFERENCE, control, ":"), (FUSED, ours, "-")):
        if _seeds(record.runs, path):
            one, other = curves_of(record.runs, path, "mask")
            gaps = np.maximum(np.abs(other - one), FLOOR).T
            label = _once(f"|{path} - ordinary|: each seed", gaps.shape[1])
            below.plot(np.arange(1, len(gaps) + 1), gaps, color=colour, lw=0.8, ls=line, label=label)
    ordinary, _ = curves_of(record.runs, FUSED, "mask")
    if len(ordinary) > 1:
        below.plot(np.arange(1, ordinary.shape[1] + 1), ordinary.std(0, ddof=1), color=theirs, lw=1.8,
                   label="ordinary: standard deviation over the seeds")  # fmt: skip
    below.set_title(f"mask loss of a step: difference of the paths; {FLOOR:.0e} stands for less", fontsize=9)
    below.set_yscale("log")
    below.set_ylim(bottom=FLOOR)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", lw=0.5)
        axes.set_axisbelow(True)
        axes.set_xlabel("step")
        axes.legend(frameon=False, fontsize=8)
    return drawn


def _once(label: str, lines: int) -> list[str]:
    """A label for the first of many lines."""
    return [label, *["_"] * (lines - 1)]


def write_paths_report(record: PathsRecord, folder: Path) -> list[Path]:
    """Write README.md and curves.png; README.md first in what is returned, and last to appear."""
    files = {folder / "README.md": markdown(record).encode()}
    if _seeds(record.runs, FUSED):
        files[folder / "curves.png"] = render(figure(record), "png")
    for path, content in reversed(files.items()):
        write_whole(path, content)
    return list(files)


def markdown(record: PathsRecord) -> str:
    """The page."""
    parts = [
        "# Training with the ordinary and with the fused mask path",
        _asked(record),
        _verdict(record),
    ]
    if _seeds(record.runs, FUSED):
        parts += ["![mask loss of both paths, and their difference beside the spread over seeds](curves.png)"]
        parts += ["## Step by step", _curves(record), "## Held-out pictures, after the last step", _final(record)]
        parts += ["## Each seed", _each(record)]
    parts += ["## How it was set up", _set_up(record), "## Where it ran", _ran(record)]
    return "\n\n".join(parts) + "\n"


def _asked(record: PathsRecord) -> str:
    bf16 = " Autocast to bf16, as in training." if record.settings["device"] == "cuda" else ""
    return (
        "Does a training run with the fused kernels of `mask_predictor_loss` stay within the seed-to-seed spread of "
        "runs with the ordinary path? Runs of a seed differ in `MaskLoss.backend` alone; weights, pictures, random "
        f"numbers and every other op are the same.{bf16}\n\n"
        "- `ordinary`: convolution to K channels, the class's channel gathered, binary cross-entropy (`torchvision`)\n"
        "- `fused`: the Triton kernels, which form one channel of K and store no logit (`triton`)\n"
        "- `reference`: the same loss in plain PyTorch, in another order (`torch`). The control: it shows how far two "
        "runs part that differ by PyTorch's own rounding."
    )


def _verdict(record: PathsRecord) -> str:
    words = {
        path: f"{verdict(record.runs, path)}.** Curves of training: {curves_word(record.runs, path)}; held-out loss: "
        f"{compare_final(record.runs, path, 'mask_loss')[2]}"
        for path in COMPARED
    }
    return (
        f"**The fused path is: {words[FUSED]}.\n\n**The control is: {words[REFERENCE]}.\n\n"
        f"*{WITHIN.capitalize()}*: in every quarter of the run the two paths of a seed are no farther apart than "
        "ordinary runs of two seeds are, as root mean squares over seeds and steps, in the mask loss and in the total "
        f"loss, as they are and smoothed over {BLOCK} steps; and the whole 95 % interval of the mean difference in the "
        "held-out mask loss is nearer to 0 than the standard deviation over the seeds. A quarter or an interval beyond "
        "that is *outside*, and so is a loss that is not finite; an interval that holds the bound is *not decided*.\n\n"
        "That is not the first rule. The first one asked, in every block of ten steps, for at most one standard "
        "deviation, where two seeds are 1.41 apart. It was changed when two of the five seeds of the first run were "
        "in: the control broke it too, which differs by PyTorch's rounding alone, and an ordinary run of another seed "
        "would have. The column *blocks beyond* keeps its count.\n\n"
        "The spread is a coarse sieve: a gradient that is wrong by a few percent would pass it. The first step's "
        "gradients, below, would show that; they are of the same weights."
    )


def _curves(record: PathsRecord) -> str:
    lines = [
        "| path | loss | farthest quarter | whole run | blocks beyond | points within | verdict |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    wholes = {}
    for path in COMPARED:
        for loss, smoothed in CURVES if _seeds(record.runs, path) else ():
            found = compare_curves(*curves_of(record.runs, path, loss, smoothed))
            wholes[path, loss, smoothed] = found.whole
            worst = int(np.argmax(np.nan_to_num(found.ratios, nan=np.inf)))
            name = f"{loss} loss, smoothed" if smoothed else f"{loss} loss"
            cells = [f"`{path}`", name, f"{found.ratios[worst]:.2f} (quarter {worst + 1})", f"{found.whole:.2f}"]
            cells += [f"{found.blocks.sum()} of {len(found.blocks)}", f"{found.points:.0%}", f"**{found.word}**"]
            lines.append(_row(cells))
    beside = [wholes[FUSED, *c] / wholes[REFERENCE, *c] for c in CURVES if wholes.get((REFERENCE, *c), 0) > 0]
    control = f" The fused path's are {min(beside):.2f} to {max(beside):.2f} times the control's." if beside else ""
    return "\n".join(lines) + (
        "\n\nFarthest quarter and whole run: the distance of the paths over that of two seeds; 1 is the bound, 0.71 "
        f"one standard deviation.{control} Not judged: *blocks beyond*, blocks of {BLOCK} steps where "
        "the distance is more than one standard deviation over the seeds, and *points within*, steps of single seeds "
        "where the difference is at most the range of the ordinary seeds."
    )


def _final(record: PathsRecord) -> str:
    lines = [
        "| path | | ordinary, mean | standard deviation over seeds | difference, 95 % interval | verdict |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    for path in COMPARED:
        for metric, title in FINAL:
            difference, spread, word = compare_final(record.runs, path, metric)
            ordinary = t_interval(list(values_of(record.runs, ORDINARY, metric).values()))
            cells = [_number(ordinary and ordinary.mean), _number(spread), _interval(difference)]
            judged = metric == FINAL[0][0]
            lines.append(_row([f"`{path}`", title, *cells, f"**{word}**" if judged else f"{word} (not judged)"]))
    images = record.settings["images"]
    return "\n".join(lines) + (
        f"\n\nMean over the objects of {images} pictures that no run is trained on, others for every seed, each object "
        "asked for in its own box and class. The ordinary path computes the loss of all, so that only the weights "
        "differ. IoU is that of the masks at a probability of 0.5." + _needed(record)
    )


def _needed(record: PathsRecord) -> str:
    """Why it is not decided, if it is not: usually for want of seeds."""
    difference, spread, word = compare_final(record.runs, FUSED, "mask_loss")
    if word != UNDECIDED:
        return ""
    needed = seeds_needed(difference, spread)
    return (
        f" The loss is not decided: the interval of {difference.count} seeds reaches beyond the spread. If differences "
        f"scatter like these, one inside it takes {needed or 'more than 31'} seeds or more even where their mean is 0."
    )


def _each(record: PathsRecord) -> str:
    heads = ["seed", *(f"equal steps, `{p}`" for p in COMPARED), *(f"first gradient, `{p}`" for p in COMPARED)]
    lines = [_row([*heads, *(f"held-out loss, `{p}`" for p in PATHS)]), _row(["---", *["---:"] * 7])]
    equal = {p: dict(zip(_seeds(record.runs, p), equal_steps(*curves_of(record.runs, p, "mask")), strict=True))
             for p in COMPARED if _seeds(record.runs, p)}  # fmt: skip
    for seed in _seeds(record.runs, FUSED):
        runs = {path: record.run(path, seed) for path in PATHS}
        cells = [str(equal.get(path, {}).get(seed, "none")) for path in COMPARED]
        for path in COMPARED:
            gradient = runs[path] and runs[path]["gradient"]
            cells.append(f"{_power(gradient['whole'])}, {_power(gradient['largest'])}" if gradient else "none")
        cells += [_number(run and run["metrics"]["mask_loss"]) for run in runs.values()]
        lines.append(_row([str(seed), *cells]))
    found = [run["gradient"] for run in record.runs if run["arm"] == FUSED]
    names = ", ".join(f"`{name}`" for name in sorted({g["parameter"] for g in found}))
    launches = sum(run["launches"] for run in record.runs if run["arm"] == FUSED)
    return "\n".join(lines) + (
        f"\n\n*Equal steps*: so many pass before the mask losses differ by more than {SAME:.0e}. From there on "
        "rounding decides ReLUs, boxes and which RoIs are drawn, and the runs are two samples of one training. *First "
        f"gradient*: norm of the difference over the norm, in the first step, of all {found[0]['count']} parameters "
        f"together, and of the one where it is largest (`fused`: {names}). Later gradients belong to other weights. "
        f"`{KERNEL}` was launched {launches} times in all, once a step of the fused runs and never in the others."
    )


def _set_up(record: PathsRecord) -> str:
    config = record.settings["config"]
    model, train, side = config["model"], config["train"], config["data"]["image_size"]
    slots = train["batch_size"] * int(model["roi_samples"] * model["roi_positive_fraction"])
    return (
        f"- Model and data: those of the [mask study](../mask-study) with `mask_loss=bce`: {model['backbone']} from "
        f"scratch, {model['num_classes']} classes with the background, crowded shapes of {side} x {side} pixels, no "
        f"augmentation; {model['mask_channels']} channels in the mask head and at most {slots} RoIs for masks a step.\n"
        f"- Training: {record.settings['steps']} steps of {train['batch_size']} pictures, SGD with momentum "
        f"{train['momentum']}, learning rate {train['lr']}, {train['schedule']} after {train['warmup_steps']} steps of "
        f"warm-up, gradients clipped at {train['clip_norm']}. Not the study's AdamW: the length of Adam's first steps "
        "does not depend on the gradient's, so that rounding in a gradient that is nearly 0 parts the runs at once."
    )


def _ran(record: PathsRecord) -> str:
    settings, runs = record.settings, record.runs
    lines = list(dict.fromkeys(f"- {_machine(run, settings['device'])}" for run in runs))
    commits, sources = ({run[key] for run in runs} for key in ("commit", "source"))
    lines.append(f"- {len(runs)} runs, {sum(run['seconds'] for run in runs) / 60:.0f} minutes in all")
    lines.append(f"- Commit {', '.join(sorted(commits)) or 'none'}; hash of the code that counts: {_listed(sources)}")
    lines.append(f"- Every run's curves and numbers: [{RESULTS_FILE}]({RESULTS_FILE})")
    command = (
        f"mrcnn-bench mask-paths --out reports/mask-paths --seeds {len({run['seed'] for run in runs})} "
        f"--steps {settings['steps']} --images {settings['images']} --device {settings['device']}"
    )
    return "\n".join(lines) + f"\n\n```bash\n{command}\n```"


def _machine(run: dict, device: str) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version)
    if device == "cuda":
        return f"{run['gpu']}, the compiled kernels, bf16 autocast; {versions}"
    cpu = f"{run['cpu'] or 'a CPU'} ({run['cpus']} cores, {run['threads']} in use, no GPU)"
    return f"{cpu}, the kernels in Triton's interpreter, fp32; {versions}"


def _interval(interval: Interval | None) -> str:
    if interval is None:
        return "none"
    mean = f"{interval.mean:+.4f}"
    return mean if interval.low is None else f"{mean} [{interval.low:+.4f}, {interval.high:+.4f}]"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def _power(value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.1e}"


def _listed(names: set[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names)) or "none"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
