"""The mask-loss study: what is counted, what is concluded from it, and that a study can be cut off.

Numbers that stand for runs are invented here, and none of them is a result.
"""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from bench.cli import app
from bench.mask_study import measure, study
from bench.mask_study.arms import ARMS, CLAIMS, METRICS, THRESHOLDS, arm_config, held_out_set
from bench.mask_study.measure import largest_jump
from bench.mask_study.merging import Tally, match
from bench.mask_study.record import MaskStudyError, Record, load_record, study_settings
from bench.mask_study.report import markdown
from bench.mask_study.statistics import (
    BETTER,
    CONTRADICTED,
    EQUAL,
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
    unlearned,
)
from mrcnn.data.shapes import ShapesDataset
from mrcnn.inference import evaluation_loader


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


class HandMade(ShapesDataset):
    """Two pictures: an L with a bar and a square of its class and one of another in its box; and a square alone."""

    def _draw(self, index):
        corners = [(40, 40, 60, 60)]
        if index == 0:
            corners = [(10, 10, 20, 50), (30, 10, 60, 30), (22, 31, 30, 39), (34, 31, 42, 39), (70, 70, 90, 90)]
        masks = np.zeros((len(corners), 96, 96), dtype=np.uint8)
        for mask, (x0, y0, x1, y1) in zip(masks, corners, strict=True):
            mask[y0:y1, x0:x1] = 1
        if index == 0:
            masks[0, 40:50, 10:50] = 1  # the foot of the L: its box is 40 x 40, and its mask 700 pixels
        labels = np.array([1, 1, 1, 2, 1][: len(corners)])
        return np.full((96, 96, 3), 100, dtype=np.uint8), labels, masks


CONFIG = arm_config("bce", 0, 2)
HAND_MADE = HandMade(2, 96, kinds=8, crowded=True)
OBJECT_FILL = (700 / 1600 + 5) / 6  # all others are rectangles


def exact(truth, boxes):
    return truth


def filling(truth, boxes):
    """The whole box of each object."""
    masks = torch.zeros_like(truth)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    return masks


def measured(monkeypatch, given, found=exact, dataset=HAND_MADE):
    """`measure` of a model whose masks are `given(threshold)` of what is true, and that detects every object."""
    pytest.importorskip("faster_coco_eval")

    def given_masks(model, batch):
        objects = [measure._objects(batch, i) for i in range(len(batch.sizes))]
        return [{t: given(t)(truth, boxes) for t in THRESHOLDS} for _, boxes, truth in objects]

    def detect(model, batch):
        for i, image_id in enumerate(batch.image_ids):
            labels, boxes, truth = measure._objects(batch, i)
            yield (
                image_id,
                {
                    "boxes": torch.cat([boxes, boxes[:1]]),  # and the first once more, as another class
                    "labels": torch.cat([labels, labels[:1] % 8 + 1]),
                    "scores": torch.linspace(0.9, 0.5, len(labels) + 1),
                    "masks": torch.cat([found(truth, boxes), truth[:1]]),
                },
            )

    monkeypatch.setattr(measure, "given_masks", given_masks)
    monkeypatch.setattr(measure, "detect", detect)
    return measure.measure(torch.nn.Identity(), CONFIG, dataset)


def test_perfect_masks_measure_as_perfect(monkeypatch):
    """Counted by hand: the L has two intruders of its class, and the only one of another class; no other object any."""
    metrics, sheet = measured(monkeypatch, lambda threshold: exact)
    for name in ("segm_AP", "segm_AP50", "segm_AP75", "bbox_AP", "given_iou", "best_iou", "matched_iou"):
        assert metrics[name] == pytest.approx(1.0), name
    for name in ("given_merged", "given_spilled", "best_merged", "best_spilled", "matched_merged", "matched_spilled"):
        assert metrics[name] == 0.0, name
    assert metrics["given_fill"] == metrics["given_object_fill"] == pytest.approx(OBJECT_FILL)
    assert metrics["best_threshold"] in THRESHOLDS
    assert (metrics["objects"], metrics["matched"]) == (6, 6)
    assert (metrics["given_intruders"], metrics["matched_intruders"], metrics["matched_with_intruder"]) == (2, 2, 1)
    assert [(row["image"], len(row["masks"])) for row in sheet] == [(0, 5), (1, 1)]


def test_masks_that_fill_the_box_merge_everything(monkeypatch):
    """Their IoU is the share of the box that the object fills: the row that best masks are compared with."""
    metrics, _ = measured(monkeypatch, lambda threshold: filling, filling)
    for name in ("given_iou", "best_iou", "matched_iou", "given_object_fill"):
        assert metrics[name] == pytest.approx(OBJECT_FILL), name
    for name in ("given_merged", "given_spilled", "best_merged", "matched_merged", "given_fill", "matched_fill"):
        assert metrics[name] == 1.0, name
    assert metrics["bbox_AP"] == pytest.approx(1.0) and metrics["segm_AP"] < 0.9


@pytest.mark.parametrize("best", [THRESHOLDS[0], 0.3, THRESHOLDS[-1]])
def test_the_best_threshold_is_the_one_of_the_highest_iou(monkeypatch, best):
    """At the ends of the grid too; the rows at 0.5 stay those of 0.5, and so do the masks of the sheet."""
    metrics, sheet = measured(monkeypatch, lambda threshold: exact if threshold == best else filling)
    assert (metrics["best_threshold"], metrics["best_iou"], metrics["best_merged"]) == (best, 1.0, 0.0)
    assert (metrics["given_iou"], metrics["given_merged"]) == (pytest.approx(OBJECT_FILL), 1.0)
    assert sheet != measured(monkeypatch, lambda threshold: exact)[1]


def test_empty_masks_merge_nothing(monkeypatch):
    """Why merging is judged at the best threshold."""
    metrics, _ = measured(monkeypatch, lambda threshold: lambda truth, boxes: torch.zeros_like(truth))
    assert metrics["given_iou"] == metrics["given_fill"] == metrics["given_merged"] == 0.0


def test_perfect_masks_on_the_studys_own_pictures(monkeypatch):
    """Visible masks share no pixel, so that the truth merges none of them; there are some to merge."""
    metrics, _ = measured(monkeypatch, lambda threshold: exact, dataset=held_out_set(CONFIG, 6))
    assert metrics["given_iou"] == pytest.approx(1.0) and metrics["given_merged"] == 0.0
    assert metrics["given_intruders"] > 5 and 0.3 < metrics["given_object_fill"] < 0.8
    assert measured(monkeypatch, lambda threshold: filling, dataset=held_out_set(CONFIG, 6))[0]["given_merged"] == 1.0


@pytest.mark.parametrize("arm", ARMS)
def test_given_masks_are_those_of_the_objects_own_box_and_class(arm):
    """A head that draws the left half of the box, at a probability of 0.25, in the channel of each object's class."""
    batch = next(iter(evaluation_loader(HAND_MADE, CONFIG)))
    classes = torch.cat([batch.targets.labels[i, :n] for i, n in enumerate(batch.targets.count.tolist())])
    asked = []

    def pooler(features, rois, sizes):
        asked.extend(rois)
        return rois

    class Head(torch.nn.Identity):
        def all_logits(self, rois):
            logits = torch.full((len(rois), 9, 28, 28), 8.0)
            for row, label in zip(logits, classes.tolist(), strict=True):
                row[label] = -8.0
                row[:, :, :14] = 0.0
                row[label, :, :14] = np.log(1 / 3) if arm == "bce" else np.log(7 / 3 if arm == "softmax" else 8 / 3)
            return logits

        def class_logits(self, rois, labels):
            return self.all_logits(rois)[torch.arange(len(rois)), labels]

    model = torch.nn.Linear(1, 1)
    model.config = SimpleNamespace(mask_loss=arm, mask_pool_size=14)
    model.normalize, model.backbone, model.fpn = (lambda images, sizes: images), (lambda x: x), (lambda x: x)
    model.pooler, model.mask_head = pooler, Head()
    with torch.no_grad():
        pictures = measure.given_masks(model, batch)
    assert asked[0][:, 0].tolist() == [0.0] * 5 + [1.0] and asked[0][5, 1:].tolist() == [40, 40, 60, 60]
    for i, by_threshold in enumerate(pictures):
        labels, boxes, _ = measure._objects(batch, i)
        left = boxes.clone()
        left[:, 2] = (boxes[:, 0] + boxes[:, 2]) / 2
        nothing = torch.zeros(len(labels), 96, 96, dtype=torch.bool)
        wanted = filling(nothing, left)
        grown = filling(nothing, left + torch.tensor([-2, -2, 2, 2]))  # pasting blurs the edges
        for threshold, masks in by_threshold.items():
            if threshold > 0.25:
                assert not masks.any()
            else:
                assert (masks & wanted).sum() > 0.9 * wanted.sum() and not (masks & ~grown).any()


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


SETTINGS = study_settings(2, 3, "cpu")


def learned(**changes):
    """Record of three seeds whose arms have all learned masks; changes: arm -> metric -> value. Invented."""
    usual = {metric.name: 0.5 for metric in METRICS} | {"best_iou": 0.7, "best_threshold": 0.4, "non_finite": 0}
    counts = dict.fromkeys(("given_intruders", "matched_with_intruder", "matched", "objects"), 9)
    made_by = {"threads": 1, "source": "0", "commit": {"id": "0" * 40, "dirty": False}}
    made_by |= {"train_seconds": 1.0, "measure_seconds": 1.0}
    runs = []
    for seed in range(3):
        for arm in ARMS:
            metrics = usual | {name: value + seed / 1000 for name, value in changes.get(arm, {}).items()} | counts
            environment = {"versions": {"torch": "2.0"}, "python": "3.12", "cpu_name": "a CPU", "cpus": 2}
            runs.append({"arm": arm, "seed": seed, "metrics": metrics, "environment": environment, **made_by})
    return Record(SETTINGS, runs)


def test_masks_that_are_not_learned_are_warned_of():
    """Each rule alone, on its own arm, and none where all is well."""
    text = markdown(learned(), False)
    assert "Read these verdicts as of" not in text and "No warning about masks that are not learned applies" in text
    for arm, metrics, words in (
        ("softmax", {"given_fill": 0.02}, "*Empty* at the threshold of 0.5: the masks of `softmax` (0.021 of the box"),
        ("canvas", {"best_threshold": -0.5}, "the best threshold of `canvas` (3 of 3 runs)"),
        ("canvas", {"best_iou": 0.53}, "*Hardly better than the whole box*: the masks of `canvas` (+0.031 ["),
    ):
        text = markdown(learned(**{arm: metrics}), False)
        assert "**Read these verdicts as of 2 steps.**" in text and words in text
        assert text.count("\n- *") == 1  # no other warning


def test_the_rules_of_the_warnings_at_their_edges():
    """More than half of the runs at the lowest threshold; the whole interval above the box's IoU by more than 0.05."""
    record = learned()
    arm = [run["metrics"] for run in record.runs if run["arm"] == "canvas"]
    arm[0]["best_threshold"] = THRESHOLDS[0]
    assert not unlearned(record.runs).lowest
    arm[1]["best_threshold"] = THRESHOLDS[0]
    assert unlearned(record.runs).lowest == {"canvas": (2, 3)}
    for metrics, iou in zip(arm, (0.57, 0.60, 0.63), strict=True):
        metrics["best_iou"] = iou  # above 0.55 in each, on average by 0.05, and not with confidence
    assert list(unlearned(record.runs).box_like) == ["canvas"]
    for metrics, iou in zip(arm, (0.59, 0.60, 0.61), strict=True):
        metrics["best_iou"] = iou
    assert not unlearned(record.runs).box_like


def test_a_claim_whose_sign_depends_on_the_threshold_says_so():
    """Both thresholds' numbers stand in the row of claim 3, whatever they are."""
    higher, lower = {"best_merged": 0.8, "given_merged": 0.3}, {"best_merged": 0.8, "given_merged": 0.8}
    text = markdown(learned(canvas=higher), False)
    assert "**supported**, *depends on the threshold*" in text and "**Claim 3 depends on the threshold.**" in text
    assert "(best thresholds: `canvas` 0.4, `bce` 0.4)<br>at 0.5: merged, boxes given: `canvas` 0.301" in text
    text = markdown(learned(canvas=lower), False)
    assert "depends on the threshold" not in text and "<br>at 0.5: merged, boxes given: `canvas` 0.801" in text


def test_rows_without_a_difference_have_no_word():
    """Nothing that is equal everywhere is called `no difference shown`, and only what has a word is counted."""
    text = markdown(learned(canvas={"jump": 0.7, "segm_AP": 0.1}), False)
    assert compare(t_interval([0.0, 0.0, 0.0]), True) == EQUAL
    row = next(line for line in text.splitlines() if line.startswith("| steps not finite"))
    assert row.count(EQUAL) == 2 and text.count("not comparable |") == 2
    assert "exploratory: nothing is corrected for their 2 comparisons" in text and "probability of 10 %" in text


def test_runs_of_different_versions_are_named():
    """A study that is continued may find another PyTorch."""
    record = learned()
    assert "are mixed" not in markdown(record, False)
    record.runs[-1]["environment"]["versions"]["torch"] = "2.1"
    assert "**Runs of different versions are mixed** (torch 2.0, 2.1)" in markdown(record, False)


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
    for name in ("curves.svg", "curves.png", "numbers.svg", "sheet.jpg"):
        assert (finished / name).stat().st_size > 1000
    values = json.loads((finished / "study.json").read_text())
    assert [run["arm"] for run in values["runs"]] == list(ARMS)
    first = {run["arm"]: run["curves"]["total"][0] - run["curves"]["mask"][0] for run in values["runs"]}
    assert max(first.values()) - min(first.values()) < 1e-3  # same weights, same pictures: all other losses agree


def test_notes_are_taken_into_the_report(finished):
    """As they are, and under the set-up."""
    notes = finished / "notes.md"
    notes.write_text("Why *this*:\n\n- because | of `that`\n")
    try:
        assert mask_study(finished, "--report-only").exit_code == 0
    finally:
        notes.unlink()
    text = (finished / "README.md").read_text()
    assert "\n\nWhy *this*:\n\n- because | of `that`\n\n## Limits" in text
    assert mask_study(finished, "--report-only").exit_code == 0
    assert "Why *this*" not in (finished / "README.md").read_text()


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


def test_errors_are_sentences(tmp_path, monkeypatch):
    """A damaged file, a missing one, a device that there is not."""
    with pytest.raises(MaskStudyError, match=r"holds no study\.json"):
        load_record(tmp_path)
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(MaskStudyError, match="cannot be read"):
        load_record(tmp_path, study_settings(2, 3, "cpu"))
    result = CliRunner().invoke(app, ["mask-study", "--out", str(tmp_path), "--device", "tpu"])
    assert result.exit_code == 2 and "'tpu'" in result.output
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["mask-study", "--out", str(tmp_path / "new"), "--device", "cuda"])
    assert result.exit_code == 2 and "PyTorch sees no GPU" in result.output
    assert mask_study(tmp_path / "new", "--seeds", "0").exit_code == 2
