"""The runs with the ordinary and the fused mask path: that only the path differs, and the verdict's arithmetic.

Curves that stand for runs are invented here, and none of them is a result.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from bench import mask_paths
from bench.cli import app
from bench.mask_paths import (
    FUSED,
    ORDINARY,
    PATHS,
    REFERENCE,
    MaskPathsError,
    PathsRecord,
    gradient_difference,
    held_out_metrics,
    load_paths,
    paths_config,
    paths_settings,
    run_path,
)
from bench.mask_paths_report import (
    BLOCK,
    OUTSIDE,
    PARTS,
    SAME,
    UNDECIDED,
    WITHIN,
    compare_curves,
    compare_final,
    curves_of,
    equal_steps,
    markdown,
    seeds_needed,
    smooth,
    verdict,
)
from bench.mask_study.arms import held_out_set
from bench.mask_study.statistics import TOO_FEW
from mrcnn.modeling import MaskRCNN

STEPS = 25
SPREAD = 0.1  # of five seeds at 0.1 * (-2, -1, 0, 1, 2) / sqrt(2.5), in every step
ORDINARY_CURVES = 1 + SPREAD * np.outer([-2, -1, 0, 1, 2], np.ones(STEPS)) / math.sqrt(2.5)
SEEDS_APART = math.sqrt(2) * SPREAD
ALTERNATING = np.resize([1.0, -1.0], STEPS)


def test_the_ratio_is_that_to_the_distance_of_two_seeds():
    """By hand: half of it in every step. Of all pairs of seeds it is sqrt(2) times the standard deviation."""
    found = compare_curves(ORDINARY_CURVES, ORDINARY_CURVES + SEEDS_APART / 2)
    assert found.word == WITHIN and found.points == 1.0 and not found.blocks.any()
    assert found.ratios == pytest.approx([0.5] * PARTS) and found.whole == pytest.approx(0.5)
    assert compare_curves(ORDINARY_CURVES, ORDINARY_CURVES).ratios.tolist() == [0.0] * PARTS
    pairs = [np.square(a - b).mean() for a, b in itertools.combinations(ORDINARY_CURVES, 2)]
    assert math.sqrt(np.mean(pairs)) == pytest.approx(SEEDS_APART)


def test_one_quarter_beyond_the_spread_is_enough():
    """The last one: quiet steps before must not hide it. One step of it, not yet: the quarter counts."""
    other = ORDINARY_CURVES.copy()
    other[:, -6:] += 1.01 * SEEDS_APART
    found = compare_curves(ORDINARY_CURVES, other)
    assert found.word == OUTSIDE and found.ratios == pytest.approx([0, 0, 0, 1.01]) and found.whole < 0.5
    assert found.blocks.tolist() == [False, False, True] and found.points == 1.0  # the range is 0.25
    other = ORDINARY_CURVES.copy()
    other[:, 3] += 3 * SPREAD
    found = compare_curves(ORDINARY_CURVES, other)
    assert found.word == WITHIN and found.points == pytest.approx(0.96)
    assert found.ratios == pytest.approx([0.3 / math.sqrt(7) / SEEDS_APART, 0, 0, 0])


def test_blocks_are_counted_against_one_standard_deviation():
    """Between one and sqrt(2): within, and all blocks beyond."""
    found = compare_curves(ORDINARY_CURVES, ORDINARY_CURVES + 1.2 * SPREAD)
    assert found.word == WITHIN and found.blocks.tolist() == [True] * 3


def test_differences_of_single_seeds_do_not_cancel():
    """Up in one seed and down in another is as far apart as up in both."""
    signs = np.array([1, -1, 1, -1, 0])[:, None]
    assert compare_curves(ORDINARY_CURVES, ORDINARY_CURVES + 2 * SPREAD * signs).word == OUTSIDE


def test_smoothing_shows_a_bias_that_the_noise_of_the_steps_hides():
    """Why both are judged: large jumps shared by a seed's pictures, and a small shift that stays."""
    noise = np.array([1, -1, 1, -1, 0])[:, None] * ALTERNATING
    ordinary = 1 + noise + 0.001 * np.array([-2, -1, 0, 1, 2])[:, None]
    shifted = ordinary + 0.01
    assert compare_curves(ordinary, shifted).word == WITHIN
    assert compare_curves(smooth(ordinary), smooth(shifted)).word == OUTSIDE
    assert smooth(np.arange(12.0)[None]).tolist() == [pytest.approx([4.5, 5.5, 6.5])]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_outside(which, bad):
    """In either path; with one seed too, which for finite numbers is not enough."""
    curves = [ORDINARY_CURVES.copy(), ORDINARY_CURVES.copy()]
    curves[which][0, -1] = bad
    with np.errstate(invalid="ignore"):
        assert compare_curves(*curves).word == compare_curves(*(c[:1] for c in curves)).word == OUTSIDE


def test_a_spread_of_nothing_holds_no_difference():
    """Equal seeds: any difference is beyond them, none is not. Two seeds are not enough for either."""
    flat = np.ones((3, STEPS))
    found = compare_curves(flat, flat)
    assert found.word == WITHIN and found.ratios.tolist() == [0.0] * PARTS and found.whole == 0.0  # not 0 / 0
    assert compare_curves(flat, flat + 1e-9).word == OUTSIDE
    assert compare_curves(flat[:2], flat[:2]).word == compare_curves(flat[:1], flat[:1]).word == TOO_FEW


def test_equal_steps_are_counted_until_the_first_that_is_not():
    """A step that is equal again does not count, and NaN equals nothing."""
    one = np.zeros((4, 4))
    other = np.array([[0, 2 * SAME, 0, 0], [0, 0, 0, SAME / 2], [np.nan, 0, 0, 0], [0, 0, 0, -1]])
    assert equal_steps(one, other) == [1, 4, 0, 3]


def invented(ordinary, *others, curves=ORDINARY_CURVES):
    """Runs of five seeds: held-out losses of the ordinary and other paths; curves equal unless a path's are given."""
    runs = []
    for path, losses in zip(PATHS, (ordinary, *others), strict=False):
        for seed, loss in enumerate(losses):
            of_path = curves.get(path, ORDINARY_CURVES) if isinstance(curves, dict) else curves
            curve = [v if np.isfinite(v) else None for v in of_path[seed].tolist()]
            gradient = None if path == ORDINARY else {"whole": 1e-7, "largest": 2e-7, "parameter": "p", "count": 9}
            runs.append(
                {"arm": path, "seed": seed, "curves": {"mask": curve, "total": curve}, "gradient": gradient}
                | {"metrics": {"mask_loss": loss, "given_iou": 0.5 + seed / 100, "objects": 9}, "launches": 2}
                | {"seconds": 60.0, "commit": "c", "source": "s", "gpu": None, "cpu": "a CPU", "cpus": 2, "threads": 1}
                | {"versions": {"torch": "2.0"}}
            )
    return runs


LOSSES = [0.5, 0.6, 0.7, 0.8, 0.9]  # a standard deviation of 0.158


@pytest.mark.parametrize(
    ("differences", "word"),
    [
        ([0.01, -0.01, 0.0, 0.01, -0.01], WITHIN),
        ([0.10, 0.11, 0.09, 0.10, 0.11], WITHIN),  # a bias that is there, and smaller than the spread
        ([0.20, 0.21, 0.19, 0.20, 0.21], OUTSIDE),
        ([-0.20, -0.21, -0.19, -0.20, -0.21], OUTSIDE),
        ([0.3, -0.3, 0.3, -0.3, 0.0], UNDECIDED),  # scattered: 0 is in the interval, which shows nothing
        ([0.15, 0.17, 0.15, 0.17, 0.15], UNDECIDED),  # the bound is in the interval
    ],
)
def test_held_out_losses_need_an_interval_inside_the_spread(differences, word):
    """No difference shown is not enough: the interval has to exclude one as large as the spread."""
    runs = invented(LOSSES, [a + b for a, b in zip(LOSSES, differences, strict=True)])
    interval, spread, found = compare_final(runs, FUSED, "mask_loss")
    assert found == word and spread == pytest.approx(0.15811, abs=1e-5)
    assert interval.mean == pytest.approx(sum(differences) / 5)
    assert verdict(runs, FUSED) == word


def test_an_open_verdict_says_how_many_seeds_it_wants():
    """By hand: differences of 0.2 * (1, -1, 1, -1, 0) deviate by 0.2; t(7) * 0.2 / sqrt(8) = 0.167, of 9: 0.154."""
    runs = invented(LOSSES, [a + 0.2 * b for a, b in zip(LOSSES, [1, -1, 1, -1, 0], strict=True)])
    interval, spread, word = compare_final(runs, FUSED, "mask_loss")
    assert word == UNDECIDED and seeds_needed(interval, spread) == 9
    assert seeds_needed(interval, 0.01) is None
    text = markdown(PathsRecord(paths_settings(STEPS, 4, "cpu"), runs))
    assert f"Curves of training: {WITHIN}; held-out loss: {UNDECIDED}." in text and "takes 9 seeds or more" in text


def test_a_held_out_loss_that_is_not_finite_is_outside():
    """It must not drop out with its seed."""
    for ordinary, fused in ((LOSSES, [None, *LOSSES[1:]]), ([None, *LOSSES[1:]], LOSSES)):
        assert compare_final(invented(ordinary, fused), FUSED, "mask_loss")[2] == OUTSIDE
    assert compare_final(invented(LOSSES[:2], LOSSES[:2]), FUSED, "mask_loss")[2] == TOO_FEW
    assert compare_final(invented(LOSSES, []), FUSED, "mask_loss")[2] == TOO_FEW


def test_the_worst_word_is_the_verdict():
    """One of the curves outside, or not finite, and all is; another path's curves do not matter."""
    for path, word in ((FUSED, OUTSIDE), (REFERENCE, WITHIN)):
        for shift in (0.2, np.nan):
            runs = invented(LOSSES, LOSSES, LOSSES, curves={path: ORDINARY_CURVES + shift})
            assert verdict(runs, FUSED) == word, (path, shift)
    total_only = invented(LOSSES, LOSSES)
    for run in total_only[5:]:
        run["curves"] = run["curves"] | {"total": [v + 1 for v in run["curves"]["total"]]}
    assert verdict(total_only, FUSED) == OUTSIDE
    assert verdict(invented(LOSSES[:2], LOSSES[:2]), FUSED) == verdict([], FUSED) == TOO_FEW


def test_a_seed_without_its_pair_does_not_count():
    """A run that is cut off leaves one."""
    runs = invented(LOSSES, LOSSES[:4])
    one, other = curves_of(runs, FUSED, "mask")
    assert one.shape == other.shape == (4, STEPS)
    interval, spread, word = compare_final(runs, FUSED, "mask_loss")
    assert (interval.count, word) == (4, WITHIN) and spread == pytest.approx(np.std(LOSSES[:4], ddof=1))


@pytest.mark.parametrize(("shift", "word"), [(0.0, WITHIN), (0.2, OUTSIDE), (np.nan, OUTSIDE)])
def test_the_page_says_what_was_computed(shift, word):
    """The verdict stands in it, with the launches; NaN breaks no table."""
    runs = invented(LOSSES, LOSSES, LOSSES, curves={FUSED: ORDINARY_CURVES + shift})
    text = markdown(PathsRecord(paths_settings(STEPS, 4, "cpu"), runs))
    assert f"**The fused path is: {word}.** Curves of training: {word}; held-out loss: {WITHIN}." in text
    assert f"**The control is: {WITHIN}.**" in text and "seeds or more" not in text
    assert "launched 10 times in all" in text and "in Triton's interpreter, fp32" in text
    assert text.count(f"| **{word}** |") >= 4


def test_gradients_are_compared_as_a_whole_and_one_by_one():
    """The worst parameter is named, also where it is NaN."""
    ordinary = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.1])}
    found = gradient_difference({"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([0.3])}, ordinary)
    assert (found["parameter"], found["largest"]) == ("b", pytest.approx(2.0))
    assert found["whole"] == pytest.approx(math.sqrt((0.25 + 0.04) / 25.01))
    found = gradient_difference({"a": torch.tensor([np.nan, 4.0]), "b": torch.tensor([0.3])}, ordinary)
    assert (found["parameter"], found["largest"], found["whole"]) == ("a", None, None)
    with pytest.raises(ValueError, match="other parameters"):
        gradient_difference({"a": ordinary["a"]}, ordinary)


def test_one_judge_for_all_paths():
    """The held-out loss is a function of the weights: which path made them leaves nothing behind."""
    config = paths_config(0, 1)
    found = []
    for backend in PATHS.values():
        torch.manual_seed(0)
        model = MaskRCNN(config.model)
        model.mask_loss.backend = backend
        found.append(held_out_metrics(model, config, held_out_set(config, 3)))
    assert found[0] == found[1] == found[2]
    assert found[0]["mask_loss"] > 0.1 and 0 < found[0]["given_iou"] < 1 and found[0]["objects"] >= 6


def test_a_path_that_does_not_take_its_kernels_is_no_result(monkeypatch):
    """Both runs ordinary would agree perfectly."""
    monkeypatch.setitem(mask_paths.PATHS, FUSED, "torchvision")
    config = paths_config(0, 1)
    with pytest.raises(RuntimeError, match="launched 0 times in 1 steps of path 'fused'"):
        run_path(config, FUSED, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def few_paths(folder, *options):
    arguments = ["mask-paths", "--out", str(folder), "--seeds", "2", "--steps", "3", "--images", "2", *options]
    return CliRunner().invoke(app, arguments)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two seeds of three steps, with fewer RoIs and smaller masks: the interpreter is slow."""
    folder = tmp_path_factory.mktemp("mask-paths")
    original = mask_paths.paths_config

    def small(seed, steps):
        config = original(seed, steps)
        return dataclasses.replace(config, model=dataclasses.replace(config.model, roi_samples=8, mask_pool_size=7))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_paths, "paths_config", small)
        result = few_paths(folder)
        assert result.exit_code == 1 and f"the fused path is: {TOO_FEW}" in result.output, result.output
        yield folder


def test_a_tiny_run_ends_with_a_report_that_claims_nothing(finished):
    """Two seeds show no spread; but the runs of a seed begin alike, and the fused one launched its kernels."""
    text = (finished / "README.md").read_text()
    assert f"**The fused path is: {TOO_FEW}.**" in text and "--seeds 2 --steps 3 --images 2" in text
    assert (finished / "curves.png").stat().st_size > 1000
    runs = json.loads((finished / "results.json").read_text())["runs"]
    assert [(run["arm"], run["seed"], run["launches"]) for run in runs] == [
        (path, seed, 3 if path == FUSED else 0) for seed in range(2) for path in PATHS
    ]
    tolerance = 1e-2 if torch.cuda.is_available() else 1e-5  # bf16 there
    first = np.array([[run["curves"][loss][0] for loss in ("mask", "total")] for run in runs]).reshape(2, 3, 2)
    assert np.ptp(first, axis=1).max() < tolerance < 0.01 < abs(first[0] - first[1]).max()
    for run in runs:
        assert len(run["curves"]["mask"]) == len(run["curves"]["total"]) == 3
        if run["arm"] != ORDINARY:
            assert 0 < run["gradient"]["whole"] <= run["gradient"]["largest"] < tolerance * 10


def test_finished_runs_are_kept_and_a_lost_one_is_run_again(finished, tmp_path, monkeypatch):
    """By seed and path; a seed more than was asked for stays."""
    values = json.loads((finished / "results.json").read_text())
    lost = values["runs"].pop(2)
    (tmp_path / "results.json").write_text(json.dumps(values))
    asked = []

    def run_again(config, path, images, device, on_step):
        asked.append((config.train.seed, path))
        return {k: lost[k] for k in ("metrics", "curves", "gradient", "launches", "seconds")}

    monkeypatch.setattr(mask_paths, "run_path", run_again)
    result = few_paths(tmp_path, "--commit", "abc")
    assert "kept from before: 5 of 6" in result.output and asked == [(0, REFERENCE)]
    record = load_paths(tmp_path)
    assert len(record.runs) == 6 and record.run(REFERENCE, 0)["commit"] == "abc"
    assert (
        few_paths(tmp_path, "--seeds", "1").exit_code == 1 and len(load_paths(tmp_path).runs) == 6 and len(asked) == 1
    )


def test_a_run_that_is_cut_off_has_what_it_finished(finished, tmp_path, monkeypatch):
    """A run is in results.json as soon as it ends, and the page can be had of it."""
    done = load_paths(finished).runs

    def run_path(config, path, *arguments):
        if path == REFERENCE:
            raise KeyboardInterrupt
        return {k: v for k, v in done[list(PATHS).index(path)].items() if k not in ("arm", "seed")}

    monkeypatch.setattr(mask_paths, "run_path", run_path)
    result = few_paths(tmp_path)
    assert result.exit_code == 130 and "run the same command to go on" in result.output
    assert [run["arm"] for run in load_paths(tmp_path).runs] == [ORDINARY, FUSED]
    assert few_paths(tmp_path, "--report-only").exit_code == 1
    assert f"The control is: {TOO_FEW}.**" in (tmp_path / "README.md").read_text()


def test_errors_are_sentences(finished, tmp_path):
    """Other settings, a damaged file, a missing one, too few of anything."""
    other = few_paths(finished, "--steps", "4")
    assert other.exit_code == 2 and "other settings (steps" in other.output
    assert few_paths(tmp_path, "--report-only").exit_code == 2
    assert few_paths(tmp_path, "--images", "0").exit_code == 2
    with pytest.raises(MaskPathsError, match=r"holds no results\.json"):
        load_paths(tmp_path)
    (tmp_path / "results.json").write_text('{"runs": 3}')
    with pytest.raises(MaskPathsError, match="cannot be read"):
        load_paths(tmp_path)


def test_the_configuration_has_classes_and_few_rois():
    """K channels mean something with eight classes; the paths of a seed share everything but the path."""
    config = paths_config(3, 40)
    assert (config.model.num_classes, config.model.mask_loss, config.train.seed) == (9, "bce", 3)
    slots = config.train.batch_size * int(config.model.roi_samples * config.model.roi_positive_fraction)
    assert slots == 16 and STEPS > 2 * BLOCK
    settings = paths_settings(40, 4, "cpu")
    assert "seed" not in settings["config"]["train"] and settings == json.loads(json.dumps(settings))
