"""COCO metrics against published numbers, and the pictures that go with them."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from mrcnn.data.shapes import ShapesDataset
from mrcnn.errors import DataError
from mrcnn.evaluation import detections_to_coco, evaluate_detections, format_table
from mrcnn.visualize import draw_detections, draw_sheet

pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed")
TRUTH = Path(__file__).parents[2].parent / "shared" / "data" / "coco_eval_truth"


@pytest.fixture(scope="module")
def shapes():
    """A data set and its own ground truth as detections of score 1."""
    dataset = ShapesDataset(6, image_size=64)
    detections = []
    for image, target in dataset:
        found = {**target, "scores": torch.ones(len(target["labels"])), "masks": target["masks"].bool()}
        assert image.shape[-2:] == found["masks"].shape[-2:]
        detections += detections_to_coco(target["image_id"], found, dataset.category_ids)
    return dataset, detections


@pytest.mark.skipif(not TRUTH.is_dir(), reason="the published numbers are not here: ../shared/data")
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_published_numbers_come_out_to_the_last_digit(iou_type):
    """COCO's own example detections: all twelve numbers, and the inputs are left as they were."""
    truth = json.loads((TRUTH / "instances_val2014_100.json").read_text())
    detections = json.loads((TRUTH / f"instances_val2014_fake{iou_type}100_results.json").read_text())
    expected = json.loads((TRUTH / "expected_stats.json").read_text())
    before = copy.deepcopy((truth, detections))
    numbers = evaluate_detections(truth, detections, iou_types=(iou_type,))[iou_type]
    assert (truth, detections) == before
    assert list(numbers) == expected["order"]
    for key in ("published_faster_coco_eval_test", "reproduced_with_pycocotools"):
        assert list(numbers.values()) == pytest.approx(expected[key][iou_type], rel=0, abs=1e-12)


def test_ground_truth_as_detections_is_perfect(shapes):
    """The whole way round: masks -> RLE -> metric. Anything below 1 is a half-pixel or a label shift."""
    dataset, detections = shapes
    results = evaluate_detections(dataset.ground_truth(), json.loads(json.dumps(detections)))
    for numbers in results.values():
        assert numbers["AP"] == pytest.approx(1.0) and numbers["AR100"] == pytest.approx(1.0)


def test_bbox_and_mask_metrics_are_told_apart(shapes):
    """Right boxes with masks of the wrong shape: a bbox column that is really the masks' would show."""
    dataset, detections = shapes
    moved = [{**d, "segmentation": detections[i - 1]["segmentation"]} for i, d in enumerate(detections)]
    results = evaluate_detections(dataset.ground_truth(), moved)
    assert results["bbox"]["AP"] == pytest.approx(1.0) and results["segm"]["AP"] < 0.5


def test_mask_area_decides_the_size_class_of_masks():
    """A thin diagonal has a large box and a small area. Were its false positive sorted by its box, it would
    count against the large objects instead of the small ones."""
    diagonal, corner = np.eye(128, dtype=bool), np.zeros((128, 128), dtype=bool)
    corner[:10, :10] = True
    truth = {
        "images": [{"id": 1, "height": 128, "width": 128}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[0, 0, 10, 0, 10, 10, 0, 10]]}],
    }
    found = {
        "boxes": torch.tensor([[0.0, 0, 128, 128], [0, 0, 10, 10]]),
        "labels": torch.tensor([1, 1]),
        "scores": torch.tensor([0.9, 0.8]),
        "masks": torch.from_numpy(np.stack([diagonal, corner])),
    }
    results = evaluate_detections(truth, detections_to_coco(1, found, [0, 1]))
    assert results["segm"]["APs"] == pytest.approx(0.5) and results["bbox"]["APs"] == pytest.approx(1.0)


def test_annotation_id_zero_counts(shapes):
    """To the evaluator an id of 0 means "unmatched"; files that count from 0 would lose an object."""
    dataset, detections = shapes
    truth = dataset.ground_truth()
    for number, annotation in enumerate(truth["annotations"]):
        annotation["id"] = number
        del annotation["iscrowd"], annotation["area"]
    assert evaluate_detections(truth, detections)["bbox"]["AP"] == pytest.approx(1.0)


def test_nothing_found_is_zero_and_nothing_to_find_is_minus_one(shapes):
    """Early in training there is no detection at all; an unlabelled set has no recall."""
    dataset, detections = shapes
    truth = dataset.ground_truth()
    none = evaluate_detections(truth, [])
    assert none["bbox"]["AP"] == none["segm"]["AR100"] == 0
    for found in ([], detections):
        nothing = evaluate_detections({**truth, "annotations": []}, found)
        assert set(nothing["bbox"].values()) == set(nothing["segm"].values()) == {-1.0}


def test_max_dets_names_and_caps_the_recall(shapes):
    """With 300 nuclei in an image the cap decides the number, so it is part of the number's name."""
    dataset, detections = shapes
    truth = dataset.ground_truth()
    assert list(evaluate_detections(truth, detections, 300, ["bbox"])["bbox"])[6:9] == ["AR1", "AR10", "AR300"]
    few = evaluate_detections(truth, detections, 5, ["bbox"])["bbox"]
    assert list(few)[6:8] == ["AR1", "AR5"] and "AR10" not in few
    assert few["AR1"] < few["AR5"]
    assert list(evaluate_detections(truth, detections, 1, ["bbox"])["bbox"])[6:8] == ["AR1", "ARs"]
    with pytest.raises(ValueError, match="at least 1"):
        evaluate_detections(truth, detections, 0)


def test_metrics_are_quiet(shapes, capfd):
    """A progress bar may be running; the evaluator's own tables would tear it."""
    dataset, detections = shapes
    evaluate_detections(dataset.ground_truth(), detections)
    assert capfd.readouterr() == ("", "")


def test_results_of_other_images_are_refused(shapes):
    """The usual mistake: predictions of one split, annotations of another."""
    dataset, detections = shapes
    stray = [{**detections[0], "image_id": 77}]
    with pytest.raises(DataError, match=r"1 image ids .* such as 77"):
        evaluate_detections(dataset.ground_truth(), stray)
    boxes_only = [{k: v for k, v in detections[0].items() if k != "segmentation"}]
    with pytest.raises(DataError, match="has no segmentation"):
        evaluate_detections(dataset.ground_truth(), boxes_only)


def test_detections_to_coco_maps_labels_and_leaves_its_input_alone():
    """Contiguous labels go back to COCO's ids, xyxy to xywh; a second use of the boxes must not see xywh."""
    boxes = torch.tensor([[1.0, 2, 4, 8]])
    found = {"boxes": boxes, "labels": torch.tensor([2]), "scores": torch.tensor([0.5], dtype=torch.bfloat16)}
    entries = detections_to_coco(9, found, [0, 7, 90])
    assert entries == [{"image_id": 9, "category_id": 90, "bbox": [1, 2, 3, 6], "score": 0.5}]
    assert boxes.tolist() == [[1, 2, 4, 8]]
    empty = {"boxes": boxes[:0], "labels": torch.zeros(0), "scores": boxes[:0, 0], "masks": torch.zeros(0, 5, 5)}
    assert detections_to_coco(9, empty, [0]) == []


def test_table_shows_numbers_and_what_is_not_available(shapes):
    """64-pixel pictures have no large objects: -1 must not be read as a bad score."""
    dataset, detections = shapes
    console = Console(record=True, width=60, file=io.StringIO())
    console.print(format_table(evaluate_detections(dataset.ground_truth(), detections)))
    text = console.export_text()
    lines = {line.split()[1]: line for line in text.splitlines() if len(line.split()) > 5}
    assert lines["AP"].count("1.000") == 2 and lines["APl"].count("n/a") == 2


def test_drawing_marks_the_object_and_leaves_the_rest():
    """Inside of the mask the colour changes, away from box and caption it does not; small pictures grow."""
    image = torch.full((3, 60, 100), 90, dtype=torch.uint8)
    masks = torch.zeros(2, 60, 100, dtype=torch.bool)
    masks[0, 20:40, 20:60] = True
    boxes = torch.tensor([[20.0, 20, 60, 40], [5, 5, 4, 4]])  # the second is degenerate: drawn, not an error
    picture = draw_detections(image, boxes, torch.tensor([1, 99]), torch.tensor([0.9, 0.1]), masks, ["bg", "é"])
    factor = picture.width // 100
    assert picture.size == (100 * factor, 60 * factor) and factor >= 4
    pixels = np.asarray(picture)
    assert (pixels[30 * factor, 40 * factor] != 90).any() and (pixels[50 * factor, 80 * factor] == 90).all()
    nothing = draw_detections(image, boxes[:0], torch.zeros(0), None, masks[:0], ["bg"])
    assert (np.asarray(nothing) == 90).all()


def test_instances_have_colours_of_their_own():
    """Two touching objects of one class must be told apart."""
    image, masks = torch.zeros(3, 500, 500, dtype=torch.uint8), torch.zeros(2, 500, 500, dtype=torch.bool)
    masks[0, 100:300, 100:200], masks[1, 100:300, 200:300] = True, True
    boxes = torch.tensor([[100.0, 100, 200, 300], [200, 100, 300, 300]])
    pixels = np.asarray(draw_detections(image, boxes, torch.tensor([1, 1]), None, masks, ["bg", "cell"]))
    assert np.abs(pixels[250, 150].astype(int) - pixels[250, 250]).max() > 60


def test_sheet_holds_every_picture(tmp_path):
    """Pictures of different sizes, in rows: left and right as the titles say."""
    rows = [(Image.new("RGB", (500, 300), "red"), Image.new("RGB", (480, 300), "blue"))]
    rows.append((Image.new("RGB", (100, 50), "lime"), Image.new("RGB", (100, 50), "yellow")))
    draw_sheet(rows, tmp_path / "new" / "sheet.png")
    pixels = np.asarray(Image.open(tmp_path / "new" / "sheet.png")).reshape(-1, 3)
    colours = {tuple(c): n for c, n in zip(*np.unique(pixels, axis=0, return_counts=True), strict=True)}
    assert colours[(255, 0, 0)] == 150_000 and colours[(0, 0, 255)] == 144_000
    assert colours[(0, 255, 0)] == colours[(255, 255, 0)] == 5_000
    with pytest.raises(ValueError, match="at least one row"):
        draw_sheet([], tmp_path / "none.png")
