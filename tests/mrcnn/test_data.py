"""Synthetic shapes, transforms and collation: what must survive the way from a sample to a batch."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import warnings

import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.ops import box_iou, masks_to_boxes
from torchvision.transforms import v2

from mrcnn.data import augment
from mrcnn.data.augment import build_transform, resize_masks
from mrcnn.data.collate import Collate, targets_from_lists
from mrcnn.data.rle import decode_masks, mask_api, run_lengths
from mrcnn.data.shapes import KINDS, ShapesDataset, _shape_mask
from mrcnn.errors import ConfigError

needs_coco = pytest.mark.skipif(
    importlib.util.find_spec("faster_coco_eval") is None, reason="faster-coco-eval is not installed"
)


def test_shapes_depend_on_seed_and_index_alone():
    """Workers draw the same picture whoever is asked, and the validation set is not the training set."""
    first, again, other = ShapesDataset(4), ShapesDataset(9), ShapesDataset(4, seed=1)
    assert torch.equal(first[3][0], again[3][0]) and torch.equal(first[3][1]["masks"], again[3][1]["masks"])
    assert not torch.equal(first[3][0], other[3][0]) and not torch.equal(first[3][0], first[2][0])
    with pytest.raises(IndexError):
        first[4]


def test_shapes_masks_are_visible_parts_and_boxes_are_tight():
    """Later shapes hide earlier ones: masks must be disjoint, and boxes those of what can be seen."""
    dataset = ShapesDataset(40, image_size=64, seed=2)
    seen = set()
    for image, target in (dataset[i] for i in range(len(dataset))):
        masks, boxes = target["masks"].as_subclass(torch.Tensor), target["boxes"].as_subclass(torch.Tensor)
        assert image.shape == (3, 64, 64) and image.dtype == torch.uint8
        assert masks.sum(0).max() <= 1 and masks.sum((1, 2)).min() >= 16
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
            assert mask[y0:y1, x0:x1].sum() == mask.sum()
            assert mask[y0].any() and mask[y1 - 1].any() and mask[:, x0].any() and mask[:, x1 - 1].any()
        assert 1 <= len(boxes) <= dataset.max_objects
        seen.update(target["labels"].tolist())
    assert seen == {1, 2, 3}


@needs_coco
def test_shapes_ground_truth_is_what_the_samples_say():
    """The evaluator sees the COCO dict, the model the samples; they must be the same objects."""
    dataset = ShapesDataset(5, image_size=64)
    truth = json.loads(json.dumps(dataset.ground_truth()))
    assert [c["id"] for c in truth["categories"]] == dataset.category_ids[1:]
    by_image = [[a for a in truth["annotations"] if a["image_id"] == i] for i in dataset.image_ids]
    for entries, (_, target) in zip(by_image, dataset, strict=True):
        decoded = mask_api().decode([entry["segmentation"] for entry in entries]).transpose(2, 0, 1)
        assert np.array_equal(decoded, target["masks"].numpy())
        assert [e["category_id"] for e in entries] == target["labels"].tolist()
        assert [e["area"] for e in entries] == target["masks"].sum((1, 2)).tolist()
        x, y, w, h = torch.tensor([e["bbox"] for e in entries]).T
        assert torch.equal(torch.stack([x, y, x + w, y + h], 1), target["boxes"].as_subclass(torch.Tensor))


def sample(boxes_and_rectangles, height=60, width=80):
    """An image and a target whose masks are the given integer rectangles."""
    boxes = torch.tensor(boxes_and_rectangles, dtype=torch.float32).reshape(-1, 4)
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = 1
    image = tv_tensors.Image(torch.randint(0, 256, (3, height, width), dtype=torch.uint8))
    return image, {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
        "labels": torch.arange(1, len(boxes) + 1),
        "masks": tv_tensors.Mask(masks),
        "image_id": 1,
        "original_size": (height, width),
    }


@pytest.mark.parametrize(
    ("image_size", "max_size", "expected"),
    [
        (120, 200, (120, 160)),
        (120, 140, (105, 140)),  # the longer side decides
        (120, 120, (90, 120)),  # v2.Resize refuses equal sizes
        (30, 100, (30, 40)),
        (0, 10, (60, 80)),  # 0 keeps the size whatever max_size is
    ],
)
def test_evaluation_only_resizes(image_size, max_size, expected):
    """Boxes and masks must follow the image, by the same factor."""
    transform = build_transform(False, image_size, max_size)
    image, target = transform(*sample([[8, 12, 40, 48]]))
    assert image.shape[1:] == expected and image.dtype == torch.uint8
    assert target["masks"].shape[1:] == expected and target["boxes"].canvas_size == expected
    factor = expected[0] / 60
    wanted = torch.tensor([[8, 12, 40, 48]]) * factor
    assert torch.allclose(target["boxes"].as_subclass(torch.Tensor), wanted, atol=1e-4)
    ends = masks_to_boxes(target["masks"].as_subclass(torch.Tensor)) + torch.tensor([0, 0, 1, 1])
    assert (ends - wanted).abs().max() <= 1
    assert target["original_size"] == (60, 80) and target["image_id"] == 1


def test_flip_keeps_boxes_and_masks_together():
    """Augmentation at the image's own size: each box stays tight around its mask, flipped or not, and both
    cases occur."""
    transform = build_transform(True, 0, 0)
    outcomes = set()
    torch.manual_seed(0)
    for _ in range(20):
        _, target = transform(*sample([[8, 12, 40, 48], [50, 0, 80, 5]]))
        boxes = target["boxes"].as_subclass(torch.Tensor)
        tight = masks_to_boxes(target["masks"].as_subclass(torch.Tensor)) + torch.tensor([0, 0, 1, 1])
        assert torch.equal(boxes, tight)
        outcomes.add(tuple(boxes[0].tolist()))
    assert outcomes == {(8, 12, 40, 48), (40, 12, 72, 48)}


def test_train_without_augment_is_deterministic_and_equals_evaluation():
    """`augment=False` is for overfitting checks: the same sample must come out every time."""
    original = sample([[8, 12, 40, 48]])
    plain = build_transform(True, 90, 200, augment=False)(*original)[0]
    assert torch.equal(plain, build_transform(False, 90, 200)(*original)[0])
    torch.manual_seed(0)
    augmented = [build_transform(True, 90, 200)(*original)[0] for _ in range(8)]
    assert len({tuple(image.shape) for image in augmented}) > 1


def test_transform_drops_vanished_objects_whole():
    """Shrinking 1/10 leaves 0.5 pixels of the middle object: box, label and mask must go together."""
    _, target = build_transform(False, 6, 100)(*sample([[0, 0, 40, 40], [50, 50, 55, 55], [60, 0, 80, 30]]))
    assert target["labels"].tolist() == [1, 3]
    assert target["boxes"].shape == (2, 4) and target["masks"].shape[0] == 2


def test_transform_keeps_objects_at_the_border():
    """Scaled by 800/333 and the like, a box's end lands a rounding error outside of the image."""
    for width in range(61, 91):
        _, target = build_transform(False, 97, 1000)(*sample([[3, 3, width, 60]], width=width))
        assert target["labels"].tolist() == [1]


def test_masks_are_resized_as_by_torchvision():
    """Only the objects' rectangles are looked at: growing, shrinking and keeping, to one pixel and from one; masks that
    are empty, full, at the edges, in two far parts, and of values other than 0 and 1."""
    generator = np.random.default_rng(0)
    sizes = [
        (1, 1),
        (1, 90),
        (90, 1),
        (7, 5),
        (37, 61),
        (61, 37),
        (64, 64),
        (97, 31),
        (100, 149),
        (149, 101),
        (160, 213),
    ]
    for before in sizes:
        masks = torch.from_numpy((generator.random((6, *before)) < 0.02).astype(np.uint8)) * 255
        masks[0], masks[1], masks[2] = 0, 1, 0
        masks[2, -1, -1] = masks[2, 0, 0] = 7
        for after in sizes:
            expected = v2.functional.resize(tv_tensors.Mask(masks), list(after)).as_subclass(torch.Tensor)
            assert torch.equal(resize_masks(masks, after), expected), (before, after)
    assert resize_masks(torch.zeros(0, 4, 6, dtype=torch.uint8), (8, 9)).shape == (0, 8, 9)


@pytest.mark.parametrize("vanishing", [False, True])
def test_training_transform_is_torchvisions(monkeypatch, vanishing):
    """With torchvision's own steps in place of ours, which only save copies: the same bits from the same seed."""
    boxes = [[8, 12, 40, 48], [50, 0, 80, 5], [3, 50, 79, 60]] + [[20, 20, 20.5, 21]] * vanishing
    ours = build_transform(True, 90, 110)
    monkeypatch.setattr(augment, "_ShortestSize", v2.RandomShortestSize)
    monkeypatch.setattr(augment, "_Sanitize", v2.SanitizeBoundingBoxes)
    theirs = build_transform(True, 90, 110)
    original = sample(boxes)
    original[1]["masks"][:, ::3, ::2] = 0
    for seed in range(12):
        results = []
        for transform in (ours, theirs):
            torch.manual_seed(seed)
            results.append(transform(*original))
        (image, target), (expected_image, expected) = results
        assert torch.equal(image, expected_image) and len(target["labels"]) == 3
        for key in ("boxes", "labels", "masks"):
            assert type(target[key]) is type(expected[key]) and torch.equal(target[key], expected[key])
        assert target["boxes"].canvas_size == expected["boxes"].canvas_size == tuple(image.shape[1:])


@needs_coco
def test_run_lengths_become_the_masks_that_cocos_decoder_gives():
    """Long runs and short ones, none, all; the first and last pixel; images of one row and one column; two parts."""
    generator = np.random.default_rng(0)
    for height, width in ((1, 1), (1, 40), (40, 1), (23, 57), (300, 200)):
        masks = [generator.random((height, width)) < share for share in (0, 0.001, 0.1, 0.5, 0.9, 0.999, 1)]
        masks += [np.zeros((height, width), bool) for _ in range(3)]
        masks[-1][-1, -1] = masks[-2][0, 0] = True
        masks[-3][[0, -1], [0, -1]] = True
        rles = [mask_api().encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]
        found = decode_masks([rle["counts"] for rle in rles], height, width)
        assert found.dtype == np.uint8 and np.array_equal(found, np.stack(masks))
    assert decode_masks([], 4, 5).shape == (0, 4, 5)
    with pytest.raises(ValueError, match="not of 300 x 201 pixels"):
        decode_masks([rles[0]["counts"]], 300, 201)


@pytest.mark.parametrize("string", [b"", b"a", b"1a", b"a" * 12 + b"1"], ids=["empty", "open", "breaks off", "endless"])
def test_malformed_run_lengths_are_refused(string):
    """Bit 5 of a byte promises another; 12 groups of 5 bits are more than any image's pixels need."""
    with pytest.raises(ValueError, match=r"breaks off|too long"):
        run_lengths(string)


@needs_coco
def test_any_string_that_is_taken_decodes_as_cocos_own():
    """Of random strings few are masks; those that are taken, signs and all, must be the same ones."""
    generator, taken = np.random.default_rng(1), 0
    for _ in range(20000):
        string = bytes(generator.integers(48, 96, generator.integers(2, 6)).astype(np.uint8))
        try:
            found = decode_masks([string], 3, 4)
        except ValueError:
            continue
        taken += 1
        assert np.array_equal(found[0], mask_api().decode({"size": [3, 4], "counts": string}))
    assert taken > 20


@pytest.mark.parametrize("train", [False, True])
def test_transform_of_an_image_without_objects(train):
    """Resizing zero masks is the classic crash of detection pipelines."""
    image, target = build_transform(train, 40, 100)(*sample([]))
    assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,)
    assert target["masks"].shape == (0, *image.shape[1:])


def test_impossible_sizes_are_refused():
    """A longer side that is shorter than the shorter side is a typing mistake, not a request."""
    with pytest.raises(ConfigError, match="image_size 800, max_size 600"):
        build_transform(True, 800, 600)
    with pytest.raises(ConfigError, match="image_size -1"):
        build_transform(True, -1, 600)


def test_collate_pads_and_the_mask_pool_gives_the_masks_back():
    """Images of different sizes, one without objects: dense -> pool -> dense must be exact."""
    dataset = ShapesDataset(3, image_size=50)
    samples = [dataset[0], sample([]), dataset[1], sample([[79, 59, 80, 60]])]
    batch = Collate(max_objects=9)(samples)
    assert batch.images.shape == (4, 3, 64, 96) and type(batch.images) is torch.Tensor
    assert batch.sizes.tolist() == [[50, 50], [60, 80], [50, 50], [60, 80]]
    assert batch.original_sizes == [(50, 50), (60, 80), (50, 50), (60, 80)]
    targets = batch.targets
    assert targets.boxes.shape == (4, 9, 4) and targets.boxes.dtype == torch.float32
    assert targets.count.dtype == torch.int32 and targets.masks.packed
    assert targets.masks.sizes.tolist() == batch.sizes.tolist() and targets.masks.padded_size == (64, 96)
    for b, (image, target) in enumerate(samples):
        n, (height, width) = len(target["labels"]), image.shape[1:]
        assert torch.equal(batch.images[b, :, :height, :width], image)
        assert batch.images[b, :, height:].sum() == 0 and batch.images[b, :, :, width:].sum() == 0
        assert targets.count[b] == n
        assert torch.equal(targets.boxes[b, :n], target["boxes"].as_subclass(torch.Tensor))
        assert targets.labels[b].tolist() == target["labels"].tolist() + [0] * (9 - n)
        assert not targets.boxes[b, n:].any() and not targets.masks.extent[b, n:].any()
        dense = targets.masks.dense(b)
        assert dense.sum() == dense[:n, :height, :width].sum()
        assert torch.equal(dense[:n, :height, :width], target["masks"].as_subclass(torch.Tensor).bool())


def test_masks_are_cropped_and_laid_out_as_documented():
    """Kernels read the pool with these offsets: rows of the extent, the lowest bit first, object after object."""
    masks = torch.zeros(2, 6, 8)
    masks[0, 1:3, 2:5] = torch.tensor([[1, 0, 1], [0, 1, 0]])
    masks[1, 5, 7] = 255  # any non-zero value is the object
    target = {"boxes": torch.tensor([[1.0, 0, 6, 4], [6, 4, 8, 6]]), "labels": torch.tensor([4, 2]), "masks": masks}
    targets = targets_from_lists([target])
    assert targets.masks.bitmaps.tolist() == [0b101, 0b010, 1]
    assert targets.masks.offset.tolist() == [[0, 2]]
    assert targets.masks.extent.tolist() == [[[2, 1, 5, 3], [7, 5, 8, 6]]]
    assert targets.valid.tolist() == [[True, True]]


def test_object_without_pixels_is_dropped():
    """Resizing can empty the mask of a thin object whose box survives; a mask loss on it would be wrong."""
    image, target = sample([[0, 0, 4, 4], [10, 10, 20, 20], [30, 30, 40, 40]])
    target["masks"][1] = 0
    targets = Collate(3)([(image, target)]).targets
    assert targets.count.tolist() == [2] and targets.labels.tolist() == [[1, 3, 0]]
    assert targets.boxes[0, 1].tolist() == [30, 30, 40, 40]
    assert targets.masks.dense(0).sum((1, 2)).tolist() == [16, 100, 0]


def test_too_many_objects_keep_the_first_and_warn_once():
    """The warning must say what to do and not fill the log of an epoch."""
    collate = Collate(max_objects=2)
    full = sample([[0, 0, 4, 4], [10, 10, 20, 20], [30, 30, 40, 40]])
    with pytest.warns(UserWarning, match="image 1 has 3 objects: only the first 2 .* raise max_objects"):
        targets = collate([full]).targets
    assert targets.labels.tolist() == [[1, 2]] and targets.count.tolist() == [2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collate([full])


def test_pad_to_fixes_the_shape_and_refuses_what_does_not_fit():
    """CUDA graphs and torch.compile need one shape for all batches."""
    assert Collate(2, pad_to=(96, 128))([sample([])]).images.shape == (1, 3, 96, 128)
    assert Collate(2, size_divisor=64)([sample([])]).images.shape == (1, 3, 64, 128)
    with pytest.raises(ConfigError, match="does not fit pad_to"):
        Collate(2, pad_to=(32, 128))([sample([])])
    with pytest.raises(ConfigError, match="divisible by 32"):
        Collate(2, pad_to=(100, 128))
    with pytest.raises(ConfigError, match="max_objects"):
        Collate(0)
    image, target = sample([])
    with pytest.raises(TypeError, match="uint8"):  # floats in 0..1 would all be stored as 0
        Collate(2)([(image / 255, target)])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_targets_from_lists_refuses_boxes_that_are_not_finite(bad):
    # torchvision would call every anchor of such an image positive; on the device it would silently be no object.
    target = {
        "boxes": torch.tensor([[0.0, 0, 4, 4], [1, 1, bad, 5]]), "labels": torch.ones(2).long(),
        "masks": torch.ones(2, 8, 8), "image_id": 17,
    }  # fmt: skip
    with pytest.raises(ValueError, match="boxes must be finite; image 17 has NaN or inf among them"):
        targets_from_lists([target])


def test_targets_from_lists_refuses_lists_that_do_not_fit():
    # With a mask too few, an object would be left out without a word.
    corners = torch.tensor([[0.0, 0, 4, 4], [1, 1, 5, 5]])
    target = {"boxes": corners, "labels": torch.ones(2).long(), "masks": torch.ones(1, 8, 8)}
    with pytest.raises(ValueError, match=r"image 0 must have as many boxes as labels and masks, got .*'masks': 1"):
        targets_from_lists([target])


def test_targets_from_lists_without_objects():
    """A batch of empty images still has one (empty) slot: shapes of size zero break kernels."""
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": torch.zeros(0, 5, 5)}
    targets = targets_from_lists([empty, empty])
    assert targets.boxes.shape == (2, 1, 4) and targets.count.tolist() == [0, 0]
    assert targets.masks.bitmaps.numel() == 0 and not targets.valid.any()
    assert targets.masks.dense(1).shape == (1, 5, 5) and not targets.masks.dense(1).any()


def digest(dataset):
    """Of every picture, label and mask."""
    found = hashlib.sha256()
    for image, target in (dataset[i] for i in range(len(dataset))):
        for part in (image, target["labels"], target["masks"]):
            found.update(part.numpy().tobytes())
    return found.hexdigest()


def test_default_shapes_are_what_they_have_always_been():
    """The demo's threshold and recorded runs rely on these very pictures: of before there were more kinds."""
    assert digest(ShapesDataset(6, 64, seed=3)) == "09a2f4df2831b9c23b7f27a8b0a328a2d6ce1febf32e894115122328738d654b"


def test_every_kind_of_shape_looks_like_itself():
    """Kinds must differ, or no detector could tell them apart: each is placed on the others at its best angle."""
    assert len(set(KINDS)) == len(KINDS) >= 8
    angles = 12
    masks = []
    for label in range(1, len(KINDS) + 1):
        rng = np.random.default_rng(label)
        drawn = [_shape_mask(rng, label, np.array([48.0, 48.0]), 30.0, 96) for _ in range(angles)]
        assert all(200 < mask.sum() <= np.pi * 31**2 for mask in drawn)
        masks.append(np.stack(drawn).reshape(angles, -1).astype(np.float32))
    for a in range(len(KINDS)):
        for b in range(a):
            inter = masks[a] @ masks[b].T
            union = masks[a].sum(1)[:, None] + masks[b].sum(1) - inter
            assert (inter / union).max() < 0.9, (KINDS[a], KINDS[b])


def test_kinds_are_chosen_and_bounded():
    """More kinds are more classes, all of which occur."""
    dataset = ShapesDataset(60, 64, kinds=10, crowded=True)
    assert dataset.class_names == ["__background__", *KINDS] and dataset.category_ids == list(range(11))
    seen = {label for i in range(len(dataset)) for label in dataset[i][1]["labels"].tolist()}
    assert seen == set(range(1, 11))
    for kinds in (0, len(KINDS) + 1):
        with pytest.raises(ConfigError, match="kinds"):
            ShapesDataset(1, kinds=kinds)


def test_crowds_put_neighbours_of_one_class_against_each_other():
    """What the count of merged instances needs: boxes that reach into one another, often within a class."""

    def neighbours(dataset):
        """Pairs of objects whose boxes overlap by a tenth: all, and those of one class."""
        pairs = same = 0
        for i in range(len(dataset)):
            target = dataset[i][1]
            assert len(target["labels"]) <= dataset.max_objects
            iou = box_iou(target["boxes"].as_subclass(torch.Tensor), target["boxes"].as_subclass(torch.Tensor))
            close = (iou > 0.1).triu(1)
            pairs += int(close.sum())
            same += int((close & (target["labels"][:, None] == target["labels"])).sum())
        return pairs / len(dataset), same / len(dataset)

    scattered = neighbours(ShapesDataset(60, 64, kinds=8))
    crowded = neighbours(ShapesDataset(60, 64, kinds=8, crowded=True))
    assert crowded[0] > 1.5 * scattered[0] and crowded[1] > 1 > 4 * scattered[1]
