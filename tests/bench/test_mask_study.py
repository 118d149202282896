"""The mask-loss study: what is counted, what is concluded from it, and that a study can be cut off.

Numbers that stand for runs are invented here, and none of them is a result.
"""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

from bench.cli import app
from bench.mask_study import study
from bench.mask_study.arms import ARMS, CLAIMS, arm_config
from bench.mask_study.measure import largest_jump
from bench.mask_study.merging import Tally, match
from bench.mask_study.record import MaskStudyError, load_record, study_settings
from bench.mask_study.statistics import (
    BETTER,
    CONTRADICTED,
    HIGHER,
    NO_DIFFERENCE,
    NOT_SUPPORTED,
    SUPPORTED,
    TOO_FEW,
    WORSE,
    claim_word,
    compare,
    judge,
    paired,
    t_interval,
)


def test_t_interval_is_the_textbooks():
    """Student's sleep data, 1908: differences of ten patients; R's t.test(sleep) says 1.58 [0.70, 2.46]."""
    interval = t_interval([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4])
    assert interval.mean == pytest.approx(1.58)
    assert (interval.low, interval.high) == (pytest.approx(0.7001, abs=1e-3), pytest.approx(2.4599, abs=1e-3))
    assert interval.sign == 1 and t_interval([-1.0, -1.1, -0.9]).sign == -1 and t_interval([-1.0, 1.0]).sign == 0
    assert t_interval([]) is None and t_interval([3.0]).low is None and t_interval([3.0]).sign == 0


def rectangles(*corners):
    """Bool [n, 20, 40] masks of (x0, y0, x1, y1)."""
    masks = torch.zeros(len(corners), 20, 40, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, corners, strict=True):
        mask[y0:y1, x0:x1] = True
    return masks


# Two objects that touch at x = 10. The box that is asked about reaches six columns into the second one.
TRUTH = rectangles((0, 0, 10, 10), (10, 0, 20, 10))
BOX = torch.tensor([0.0, 0.0, 16.0, 10.0])


def tally(mask, labels, truth=TRUTH, box=BOX):
    counted = Tally()
    counted.add(mask, box, 0, torch.tensor(labels), truth)
    return counted


def test_merged_instances_are_counted_by_hand():
    """Merged: at least half of the neighbour's pixels in the box; a spill is the same onto another class."""
    perfect, merged = TRUTH[0], rectangles((0, 0, 16, 10))[0]
    assert dataclasses.astuple(tally(perfect, [1, 1]))[4:] == (1, 0, 0, 0)
    assert dataclasses.astuple(tally(merged, [1, 1]))[4:] == (1, 1, 0, 0)
    assert dataclasses.astuple(tally(merged, [1, 2]))[4:] == (0, 0, 1, 1)
    assert tally(rectangles((0, 0, 13, 10))[0], [1, 1]).merged == 1  # three of six columns: half is enough
    assert tally(rectangles((0, 0, 12, 10))[0], [1, 1]).merged == 0


def test_without_a_neighbour_in_the_box_nothing_can_merge():
    """The rate is over opportunities: a neighbour outside, or hardly inside, is none."""
    everything = torch.ones(20, 40, dtype=torch.bool)
    alone = tally(everything, [1, 1], box=torch.tensor([0.0, 0.0, 10.0, 10.0]))
    grazed = tally(everything, [1, 1], box=torch.tensor([0.0, 0.0, 12.0, 10.0]))  # a fifth of it is inside
    tiny = tally(everything, [1, 1], truth=rectangles((0, 0, 10, 10), (10, 0, 13, 5)))  # fewer than 16 pixels
    for counted in (alone, grazed, tiny):
        assert counted.same == counted.merged == 0 and counted.means()["merged"] is None


def test_iou_and_fill_of_a_mask():
    """IoU is with the mask's own object, the fill with the box."""
    means = tally(rectangles((0, 0, 5, 10))[0], [1, 1]).means()
    assert means["iou"] == 0.5 and means["fill"] == 50 / 160 and means["object_fill"] == 100 / 160


def test_detections_match_an_object_of_their_class_once():
    """The best-scored detection takes the object, the second finds it taken, another class never matches."""
    truth, labels = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10]]), torch.tensor([1, 2])
    found = torch.tensor([[0.0, 0, 10, 9], [0, 0, 10, 10], [20, 0, 30, 10], [20, 0, 29, 10], [50, 0, 60, 10]])
    assert match(found, torch.tensor([1, 1, 1, 2, 2]), truth, labels) == [(0, 0), (3, 1)]
    assert match(found[:0], labels[:0], truth, labels) == [] == match(found[:2], labels, truth[:0], labels[:0])


def test_largest_jump():
    """Over the median of the steps before; what is not finite is the worst there is."""
    assert largest_jump([1.0] * 10 + [3.0, 1.0]) == 3.0
    assert largest_jump([2.0 - i / 50 for i in range(40)]) < 1
    assert largest_jump([1.0, None, 1.0]) == 1000.0
    assert largest_jump([1.0]) == 1.0


def invented(**values):
    """Runs with invented values of every claim's metric: arm -> one value a seed."""
    metrics = {claim.metric for claim in CLAIMS}
    return [
        {"arm": arm, "seed": seed, "metrics": dict.fromkeys(metrics, value)}
        for arm, column in values.items()
        for seed, value in enumerate(column)
    ]


def test_claims_are_judged_by_the_interval_of_the_paired_difference():
    """Seeds differ a lot, arms a little: only the pairing shows it. All numbers are invented."""
    runs = invented(bce=[0.1, 0.3, 0.5], softmax=[0.05, 0.24, 0.45], canvas=[0.2, 0.1, 0.6])
    assert [verdict.word for verdict in judge(runs)] == [SUPPORTED, NOT_SUPPORTED, NOT_SUPPORTED, CONTRADICTED]
    difference = paired(runs, "segm_AP", "bce", "softmax")
    assert compare(difference, True) == BETTER and compare(difference, False) == WORSE
    assert compare(difference, None) == HIGHER
    assert compare(paired(runs, "segm_AP", "bce", "canvas"), True) == NO_DIFFERENCE


def test_a_seed_without_its_pair_does_not_count():
    """And two pairs are not enough for a verdict."""
    runs = invented(bce=[0.1, 0.2, 0.3], softmax=[0.0, 0.1, None], canvas=[0.1])
    assert paired(runs, "segm_AP", "bce", "softmax").count == 2
    assert claim_word(paired(runs, "segm_AP", "bce", "softmax")) == TOO_FEW
    assert paired([], "segm_AP", "bce", "softmax") is None and claim_word(None) == TOO_FEW


def test_arms_differ_in_the_mask_loss_alone():
    """Else the study would compare something else."""
    one, *others = (dataclasses.asdict(arm_config(arm, 3, 10)) for arm in ARMS)
    for other, arm in zip(others, list(ARMS)[1:], strict=True):
        assert other["model"].pop("mask_loss") == arm
        assert other["model"] == {k: v for k, v in one["model"].items() if k != "mask_loss"}
        assert other["train"] == one["train"] and other["data"] == one["data"]


def mask_study(folder, *options):
    arguments = ["mask-study", "--out", str(folder), "--steps", "2", "--images", "3", "--device", "cpu", *options]
    return CliRunner().invoke(app, arguments)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study of one seed and two steps, which can show nothing."""
    pytest.importorskip("faster_coco_eval")
    folder = tmp_path_factory.mktemp("mask-study")
    result = mask_study(folder, "--seeds", "1")
    assert result.exit_code == 0, result.output
    return folder


def test_a_tiny_study_ends_with_a_report_that_claims_nothing(finished):
    """One seed has no interval: the report must say so, and still hold everything."""
    text = (finished / "README.md").read_text()
    assert text.count(f"**{TOO_FEW}**") == len(CLAIMS)
    assert not any(f"**{word}**" in text for word in (SUPPORTED, NOT_SUPPORTED, CONTRADICTED))
    for claim in CLAIMS:
        assert claim.text in text
    for name in ("curves.svg", "curves.png", "numbers.svg", "sheet.png"):
        assert (finished / name).stat().st_size > 1000
    values = json.loads((finished / "study.json").read_text())
    assert [run["arm"] for run in values["runs"]] == list(ARMS)
    first = {run["arm"]: run["curves"]["total"][0] - run["curves"]["mask"][0] for run in values["runs"]}
    assert max(first.values()) - min(first.values()) < 1e-3  # same weights, same pictures: all other losses agree


def test_a_study_keeps_its_finished_runs(finished, monkeypatch):
    """Nothing is trained again, and other settings are refused rather than mixed."""
    before = (finished / "study.json").read_bytes()
    monkeypatch.setattr(study, "run_pair", lambda *arguments: pytest.fail("a finished run was run again"))
    result = mask_study(finished, "--seeds", "1")
    assert result.exit_code == 0 and "kept from before: 3 of 3" in result.output
    assert (finished / "study.json").read_bytes() == before
    other = CliRunner().invoke(app, ["mask-study", "--out", str(finished), "--steps", "3", "--images", "3"])
    assert other.exit_code == 2 and "other settings (steps" in other.output


def test_a_study_that_is_cut_off_has_what_it_finished(tmp_path, monkeypatch):
    """A run is in study.json as soon as it ends."""
    done = []

    def run_pair(config, *arguments):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(config.model.mask_loss)
        metrics = dict.fromkeys(
            ("segm_AP", "segm_AP50", "bbox_AP", "given_iou", "best_iou", "best_merged", "jump"), 0.5
        )
        return {"metrics": metrics, "curves": {}, "sheet": [], "train_seconds": 1.0, "measure_seconds": 1.0}

    monkeypatch.setattr(study, "run_pair", run_pair)
    assert mask_study(tmp_path, "--seeds", "1").exit_code == 130
    assert [run["arm"] for run in load_record(tmp_path).runs] == done == ["bce", "softmax"]


def test_errors_are_sentences(tmp_path):
    """A damaged file, a missing one, a device that there is not."""
    with pytest.raises(MaskStudyError, match=r"holds no study\.json"):
        load_record(tmp_path)
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(MaskStudyError, match="cannot be read"):
        load_record(tmp_path, study_settings(2, 3, "cpu"))
    result = CliRunner().invoke(app, ["mask-study", "--out", str(tmp_path), "--device", "tpu"])
    assert result.exit_code == 2 and "unknown device 'tpu'" in result.output
    assert mask_study(tmp_path / "new", "--seeds", "0").exit_code == 2
