"""COCO files: what they may hold, what a user's can get wrong, and the sentence for each."""

from __future__ import annotations

import importlib.util
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes

from mrcnn.data.augment import build_transform
from mrcnn.data.coco import CocoDataset
from mrcnn.data.collate import Collate
from mrcnn.data.rle import mask_api
from mrcnn.errors import DataError

needs_coco = pytest.mark.skipif(
    importlib.util.find_spec("faster_coco_eval") is None, reason="faster-coco-eval is not installed"
)
SQUARE = [[2, 1, 6, 1, 6, 5, 2, 5]]  # covers x 2..5, y 1..4 of the 12 x 10 images below


def annotation(number=1, image_id=3, category_id=7, segmentation=SQUARE, **extra):
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "segmentation": segmentation,
        "bbox": [2, 1, 4, 4],
        "area": 16,
        "iscrowd": 0,
        **extra,
    }


@pytest.fixture
def make(tmp_path):
    """Write a data set of two 12 x 10 (width x height) images, 3 and 9; returns a CocoDataset of it."""

    def build(annotations=None, images=None, categories=None, content=None, **options) -> CocoDataset:
        folder = tmp_path / "images"
        folder.mkdir(exist_ok=True)
        for i in (3, 9):
            if not (folder / f"{i}.png").exists():
                Image.fromarray(np.full((10, 12, 3), 10 * i, np.uint8)).save(folder / f"{i}.png")
        listed = [{"id": i, "file_name": f"{i}.png", "height": 10, "width": 12} for i in (3, 9)]
        if content is None:
            content = {
                "images": listed if images is None else images,
                "annotations": [annotation()] if annotations is None else annotations,
                "categories": categories or [{"id": 90, "name": "dog"}, {"id": 7, "name": "cat"}],
            }
        path = tmp_path / "instances.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return CocoDataset(folder, path, **options)

    return build


def mask_of(dataset, index=0):
    return dataset[index][1]["masks"]


@needs_coco
def test_labels_are_contiguous_where_category_ids_are_not(make):
    """COCO's own ids have gaps (1..90 for 80 classes) and files list them in any order."""
    dataset = make([annotation(category_id=90), annotation(2, category_id=7)])
    assert dataset.class_names == ["__background__", "cat", "dog"]
    assert dataset.category_ids == [0, 7, 90]
    assert dataset[0][1]["labels"].tolist() == [2, 1]
    assert dataset.max_objects == 2


@needs_coco
def test_sample_has_the_promised_types_and_values(make):
    """The transforms dispatch on these types; a plain tensor in their place would not be flipped or resized."""
    image, target = make()[0]
    assert isinstance(image, tv_tensors.Image) and image.dtype == torch.uint8 and image.shape == (3, 10, 12)
    assert torch.all(image == 30)
    assert isinstance(target["boxes"], tv_tensors.BoundingBoxes) and target["boxes"].dtype == torch.float32
    assert target["boxes"].tolist() == [[2, 1, 6, 5]] and target["boxes"].canvas_size == (10, 12)
    assert isinstance(target["masks"], tv_tensors.Mask) and target["masks"].dtype == torch.uint8
    assert target["labels"].dtype == torch.int64
    assert (target["image_id"], target["original_size"]) == (3, (10, 12))


@needs_coco
def test_the_three_segmentation_forms_give_the_same_mask(make):
    """Labelling tools write polygons, uncompressed RLE (column-major runs) or compressed RLE."""
    expected = torch.zeros(1, 10, 12, dtype=torch.uint8)
    expected[0, 1:5, 2:6] = 1
    runs = {"size": [10, 12], "counts": [21, 4, 6, 4, 6, 4, 6, 4, 65]}
    packed = mask_api().encode(np.asfortranarray(expected[0].numpy()))
    packed = {"size": [10, 12], "counts": packed["counts"].decode()}
    for segmentation in (SQUARE, runs, packed):
        assert torch.equal(mask_of(make([annotation(segmentation=segmentation)])), expected)


@needs_coco
@pytest.mark.parametrize("workers", [0, 1])
def test_polygons_reach_the_pool_of_bits_as_pycocotools_rasterises_them(make, workers):
    # From the file to what the kernels read, packed by the worker that loaded the image; slanted edges, two parts.
    polygons = [[0.3, 0.7, 10.9, 3.2, 4.4, 8.6], [9.2, 6.1, 11.8, 6.4, 10.1, 9.7]]
    dataset = make([annotation(1, segmentation=polygons, bbox=[0, 0, 12, 10]), annotation(2, image_id=9)])
    (batch,) = DataLoader(dataset, batch_size=2, num_workers=workers, collate_fn=Collate(3))
    api = mask_api()
    for image, found in enumerate((polygons, SQUARE)):
        expected = api.decode(api.merge(api.frPyObjects(found, 10, 12)))
        dense = batch.targets.masks.dense(image)
        assert torch.equal(dense[0, :10, :12].to(torch.uint8), torch.from_numpy(expected))
        assert dense.sum() == expected.sum()


@needs_coco
def test_polygon_parts_are_united_and_degenerate_parts_left_out(make):
    """An object cut in two by an occluder has two polygons; tools also leave stray two-point parts, which the
    mask API would silently read as a box."""
    second = [8, 6, 10, 6, 10, 8, 8, 8]
    mask = mask_of(make([annotation(segmentation=[*SQUARE, second, [0, 0, 12, 10]])]))
    assert mask.sum() == 16 + 4 and mask[0, 6:8, 8:10].all()


@needs_coco
def test_box_comes_from_the_mask_where_there_is_none(make):
    """`bbox` is often missing in files converted from masks."""
    entry = annotation()
    del entry["bbox"]
    assert make([entry])[0][1]["boxes"].tolist() == [[2, 1, 6, 5]]


@needs_coco
def test_boxes_are_clipped_to_the_image(make):
    """Boxes a few pixels outside are common; the anchors' labels and roi_align expect them inside."""
    dataset = make([annotation(bbox=[-3, -2, 9, 50])])
    assert dataset[0][1]["boxes"].tolist() == [[0, 0, 6, 10]]


@needs_coco
def test_images_without_objects_are_kept(make):
    """They are negatives to learn from, and evaluation must count false positives on them."""
    _, target = make()[1]
    assert target["boxes"].shape == (0, 4) and target["masks"].shape == (0, 10, 12)
    assert target["labels"].shape == (0,) and target["image_id"] == 9
    assert make([]).max_objects == 1


@needs_coco
def test_crowds_are_no_targets_but_stay_in_the_ground_truth(make):
    """A crowd region is not one object; COCO's metrics need it to ignore the detections inside it."""
    crowd = annotation(2, iscrowd=1, segmentation={"size": [10, 12], "counts": [0, 120]})
    dataset = make([annotation(), crowd])
    assert len(dataset[0][1]["labels"]) == 1 and dataset.crowds == 1 and not dataset.skipped
    assert [a["id"] for a in dataset.ground_truth()["annotations"]] == [1, 2]
    assert dataset.skipped_summary() == "skipped no annotations; 1 crowd annotation left out of training"


@needs_coco
@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"bbox": [2, 1, 0, 4]}, "box without area"),
        ({"bbox": [2, 1, 4, -1]}, "box without area"),
        ({"bbox": [20, 1, 4, 4]}, "box without area"),  # outside of the image: nothing is left of it
        ({"bbox": [2, 1, float("nan"), 4]}, "box without area"),
        ({"bbox": [2, 1, float("inf"), 4]}, "box without area"),
        ({"bbox": [2, 1, 4]}, "malformed box"),
        ({"bbox": "2 1 4 4"}, "malformed box"),
        ({"segmentation": []}, "empty segmentation"),
        ({"segmentation": None}, "empty segmentation"),
        ({"segmentation": [[20, 1, 26, 1, 26, 5]]}, "empty segmentation"),  # outside of the image
        ({"segmentation": {"size": [10, 12], "counts": [120]}}, "empty segmentation"),
        ({"segmentation": [[1, 2, 3, 4]]}, "malformed segmentation"),
        ({"segmentation": [[1, 2, 3, 4, 5, float("nan")]]}, "malformed segmentation"),
        ({"segmentation": [[1, 2, 3, 4, 5, "6"]]}, "malformed segmentation"),
        ({"segmentation": "polygon"}, "malformed segmentation"),
        ({"segmentation": {"size": [12, 10], "counts": [21, 4, 95]}}, "malformed segmentation"),  # transposed
        ({"segmentation": {"size": [10, 12], "counts": [21, 4]}}, "malformed segmentation"),  # ends early
        ({"segmentation": {"size": [10, 12], "counts": [21, 400]}}, "malformed segmentation"),
        ({"segmentation": {"size": [10, 12], "counts": [-5, 125]}}, "malformed segmentation"),
        ({"segmentation": {"size": [10, 12], "counts": "~~~zz"}}, "malformed segmentation"),
        ({"segmentation": {"size": [10, 12], "counts": "41"}}, "malformed segmentation"),  # ends early
        ({"segmentation": {"size": [10, 12]}}, "malformed segmentation"),
    ],
)
def test_unusable_annotations_are_skipped_and_counted(make, extra, reason):
    """One bad annotation in a hundred thousand must not stop a run, nor become a NaN in the loss."""
    dataset = make([annotation(1, **extra), annotation(2)])
    assert dict(dataset.skipped) == {reason: 1}
    assert len(dataset[0][1]["labels"]) == 1
    assert [a["id"] for a in dataset.ground_truth()["annotations"]] == [2]


@needs_coco
def test_skipped_summary_is_a_sentence(make):
    """It is printed before training; plurals and order are for a person."""
    bad = [annotation(bbox=[1, 1, 0, 0]), annotation(bbox=[1, 1, 2, 0]), annotation(segmentation=[])]
    assert make(bad).skipped_summary() == "skipped 3 annotations: 2 boxes without area, 1 empty segmentation"


@needs_coco
def test_compressed_rle_of_random_masks_is_not_taken_for_malformed(make):
    """The check that run lengths fill the image is our own reading of COCO's string: long runs, short runs,
    growing and shrinking ones must all pass."""
    rng = np.random.default_rng(0)
    listed = [{"id": 3, "file_name": "3.png", "height": 300, "width": 500}]
    masks = [rng.random((300, 500)) < share for share in (1e-5, 1e-3, 0.1, 0.5, 0.9, 0.999)]
    masks.append(np.pad(np.ones((1, 1)), ((299, 0), (499, 0))))
    rles = [mask_api().encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]
    entries = [annotation(segmentation={**r, "counts": r["counts"].decode()}, bbox=None) for r in rles]
    dataset = make(entries, images=listed)
    assert not dataset.skipped and dataset.max_objects == len(masks)


@needs_coco
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"content": "{'images': []"}, "is not valid JSON"),
        ({"content": '{"images": [{"id": 1, "file_na'}, "is it truncated"),
        ({"content": ""}, "is not valid JSON"),
        ({"content": "[]"}, "its top level is not an object"),
        ({"content": {"images": [], "annotations": []}}, "no list of objects 'categories'"),
        ({"content": {"images": {}, "annotations": [], "categories": []}}, "no list of objects 'images'"),
        ({"annotations": [3]}, "no list of objects 'annotations'"),
        ({"images": []}, "has no images"),
        ({"annotations": [annotation(41, image_id=5)]}, "annotation 41 .* names image id 5,"),
        ({"annotations": [annotation(41, image_id=[5])]}, r"annotation 41 .* names image id \[5\],"),
        ({"annotations": [annotation(41, category_id=8)]}, "annotation 41 .* names category id 8,"),
        ({"annotations": [{"image_id": 3}]}, "annotation number 0 .* names category id None,"),
        ({"categories": [{"id": 7, "name": "a"}, {"id": 7, "name": "b"}]}, "category id 7 is there twice"),
        ({"categories": [{"id": "7", "name": "a"}]}, "category id '7' .* is not an integer"),
        ({"images": [{"id": 3, "file_name": "3.png", "height": 10, "width": 12}] * 2}, "image id 3 is there twice"),
        ({"images": [{"id": 3, "file_name": "3.png", "height": 0, "width": 12}]}, "no valid height and width"),
        ({"images": [{"id": 3, "height": 10, "width": 12}]}, "image 3 .* has no file_name"),
        ({"images": [{"id": 3, "file_name": "../3.png", "height": 10, "width": 12}]}, "leaves the image folder"),
        ({"images": [{"id": 3, "file_name": "a\\..\\..\\3", "height": 1, "width": 1}]}, "leaves the image folder"),
        ({"images": [{"id": 3, "file_name": "/etc/x.png", "height": 1, "width": 1}]}, "leaves the image folder"),
        ({"images": [{"id": 3, "file_name": "C:\\x.png", "height": 1, "width": 1}]}, "leaves the image folder"),
    ],
)
def test_wrong_annotation_files_are_refused_with_a_reason(make, change, sentence):
    """Each is a mistake that people make; the sentence must name the entry, so that it can be found."""
    if "annotations" not in change and "content" not in change:
        change = {**change, "annotations": []}
    with pytest.raises(DataError, match=sentence) as caught:
        make(**change)
    assert "\n" not in str(caught.value)


@needs_coco
def test_missing_json_and_folder_are_named(make, tmp_path):
    """The two paths a user types."""
    make()
    with pytest.raises(DataError, match=r"cannot read annotation file .*nowhere\.json"):
        CocoDataset(tmp_path / "images", tmp_path / "nowhere.json")
    with pytest.raises(DataError, match=r"cannot read annotation file .*images"):
        CocoDataset(tmp_path / "images", tmp_path / "images")
    with pytest.raises(DataError, match=r"image folder .*nowhere does not exist"):
        CocoDataset(tmp_path / "nowhere", tmp_path / "instances.json")


@needs_coco
def test_missing_images_are_found_before_training(make):
    """All of them at once: finding them one by one, hours apart, is what this prevents."""
    listed = [{"id": i, "file_name": f"{i}.png", "height": 10, "width": 12} for i in (3, 100, 101, 102, 103)]
    with pytest.raises(DataError, match=r"4 of 5 images are missing .*\(100\.png, 101\.png, 102\.png, \.\.\.\)"):
        make(images=listed)
    assert len(make(images=listed, require_files=False)) == 5


@needs_coco
def test_damaged_images_are_named(make, tmp_path):
    """A download that broke off, and a file that is no image at all."""
    dataset = make()
    noise = np.random.default_rng(0).integers(0, 255, (10, 12, 3), dtype=np.uint8)
    path = tmp_path / "images" / "3.png"
    Image.fromarray(noise).save(path)
    for data in (path.read_bytes()[:200], b"<html>404</html>", b""):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"3\.png cannot be decoded"):
            dataset[0]


@needs_coco
def test_image_of_another_size_is_refused(make, tmp_path):
    """Resized copies of the images make every box wrong without any other sign."""
    dataset = make()
    Image.new("RGB", (24, 20)).save(tmp_path / "images" / "3.png")
    with pytest.raises(DataError, match=r"20 x 24 pixels .* annotations say 10 x 12"):
        dataset[0]


@needs_coco
def test_skip_broken_takes_the_next_image_and_says_so(make, tmp_path):
    """One truncated file in the night must not end a long run; a folder of only such files must."""
    dataset = make(skip_broken=True)
    (tmp_path / "images" / "9.png").write_bytes(b"broken")
    with pytest.warns(UserWarning, match=r"9\.png cannot be decoded"):
        _, target = dataset[1]  # the last: the next one is the first
    assert target["image_id"] == 3 and dataset.broken == {"9.png": 1}
    (tmp_path / "images" / "3.png").write_bytes(b"broken")
    with pytest.warns(UserWarning), pytest.raises(DataError, match="none of the 2 images"):
        dataset[0]


@needs_coco
@pytest.mark.parametrize(
    ("picture", "rgb"),
    [
        (Image.new("L", (12, 10), 77), (77, 77, 77)),
        (Image.new("1", (12, 10), 1), (255, 255, 255)),
        (Image.new("RGBA", (12, 10), (1, 2, 3, 0)), (1, 2, 3)),
        (Image.new("RGB", (12, 10), (200, 100, 50)).quantize(4), (200, 100, 50)),
        (Image.fromarray(np.full((10, 12), 77 * 256, np.uint16)), (77, 77, 77)),  # convert() gives 255
    ],
    ids=["grey", "bilevel", "alpha", "palette", "16-bit"],
)
def test_pictures_of_all_modes_become_rgb(make, tmp_path, picture, rgb):
    """Microscopes write 16-bit grey, which Pillow's own conversion turns white."""
    dataset = make()
    picture.save(tmp_path / "images" / "3.png")
    assert dataset[0][0][:, 5, 5].tolist() == list(rgb)


@needs_coco
def test_cmyk_jpeg_becomes_rgb(make, tmp_path):
    """JPEGs from print workflows have four channels."""
    listed = [{"id": 3, "file_name": "3.jpg", "height": 10, "width": 12}]
    (tmp_path / "images").mkdir()
    Image.new("CMYK", (12, 10), (255, 0, 0, 0)).save(tmp_path / "images" / "3.jpg")
    red, green, blue = make([], images=listed)[0][0][:, 5, 5].tolist()
    assert red < 20 and green > 235 and blue > 235  # cyan


@needs_coco
def test_works_in_dataloader_workers(make):
    """Datasets, transforms and the collate function are pickled into worker processes on some systems."""
    dataset = pickle.loads(pickle.dumps(make(transform=build_transform(True, 32, 64))))
    collate = pickle.loads(pickle.dumps(Collate(dataset.max_objects)))
    (batch,) = DataLoader(dataset, batch_size=2, num_workers=1, collate_fn=collate)
    assert batch.image_ids == [3, 9] and batch.targets.count.tolist() == [1, 0]


@needs_coco
def test_photographs_with_polygons():
    """Real labelme polygons: every instance is usable and no mask reaches far outside of its box."""
    root = Path(__file__).parents[2].parent / "shared" / "data" / "fruits_nuts"
    if not root.is_dir():
        pytest.skip("the photographs are not here: ../shared/data/fruits_nuts")
    dataset = CocoDataset(root / "images", root / "trainval.json")
    assert sum(len(record.labels) for record in dataset._records) == 165 and not dataset.skipped
    target = dataset[0][1]
    boxes = masks_to_boxes(target["masks"])
    assert (boxes - target["boxes"].as_subclass(torch.Tensor)).abs().max() < 3
