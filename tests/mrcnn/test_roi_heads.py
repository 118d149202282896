"""RoIs matched, drawn, padded, pooled; boxes selected."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
import torchvision
from model_inputs import TINY, random_boxes, shapes_batch

from kernels import use_backend
from mrcnn.data.collate import targets_from_lists
from mrcnn.modeling import detections
from mrcnn.modeling.detections import BoxSelection
from mrcnn.modeling.heads import MaskHead
from mrcnn.modeling.mask_losses import MaskLoss
from mrcnn.modeling.roi_heads import BoxLoss, RoIPool, RoISample, RoISampler


def test_rois_are_matched_and_positives_come_first():
    # Proposals that are objects moved a little, far ones, and empty slots: class where the IoU is 0.5 or more, with the
    # objects themselves among the candidates; at most a quarter positive.
    batch = shapes_batch()
    t = batch.targets
    proposals = torch.cat([t.boxes + 1, t.boxes + 500, torch.zeros(2, 5, 4)], dim=1)
    valid = torch.cat([t.valid, t.valid, torch.zeros(2, 5, dtype=torch.bool)], dim=1)
    rois = RoISampler(dataclasses.replace(TINY, roi_samples=12))(proposals, valid, t)
    assert rois.boxes.shape == (2, 12, 4) and rois.labels.shape == rois.matched.shape == (2, 12)
    for b in range(2):
        positive = int((rois.labels[b] > 0).sum())
        assert positive == 3 and (rois.labels[b, :positive] > 0).all()
        for s in range(positive):
            g = int(rois.matched[b, s])
            assert rois.labels[b, s] == t.labels[b, g] and g < t.count[b]
            assert torchvision.ops.box_iou(rois.boxes[b, s][None], t.boxes[b, g][None]) >= 0.5
        background = rois.boxes[b, rois.labels[b] == 0]
        assert len(background) == min(int(t.count[b]), 9) and (background[:, 0] >= 500).all()


def test_an_object_without_area_matches_itself():
    # 0/0 with itself, which torchvision's Matcher calls positive: the object, added as a proposal, keeps its class.
    masks, labels = torch.ones(2, 100, 100, dtype=torch.uint8), torch.tensor([3, 2])
    boxes = torch.tensor([[5.0, 5, 5, 20], [30, 30, 50, 60]])
    targets = targets_from_lists([{"boxes": boxes, "labels": labels, "masks": masks}])
    proposals, valid = torch.tensor([[[70.0, 70, 90, 90]]]), torch.ones(1, 1, dtype=torch.bool)
    rois = RoISampler(dataclasses.replace(TINY, roi_samples=8))(proposals, valid, targets)
    iou = torchvision.ops.box_iou(boxes, torch.cat([proposals[0], boxes]))
    wanted = torchvision.models.detection._utils.Matcher(0.5, 0.5)(iou)
    assert wanted.tolist() == [-1, 0, 1]
    assert sorted(rois.labels[0, :3].tolist()) == [0, 2, 3]


def test_empty_slots_repeat_the_other_rois():
    # Batch norm in a head takes its statistics over all rows: they must be of RoIs that are meant, positives alone for
    # masks. In the losses the repetitions do not count.
    boxes, matched = random_boxes(2, 6), torch.arange(12).view(2, 6)
    rois = RoISample(boxes, torch.tensor([[3, 1, 0, 0, -1, -1], [0, 0, 0, -1, -1, -1]]), matched)
    masks = rois.positives(5)
    assert masks.labels.tolist() == [[3, 1, -1, -1, -1], [-1] * 5]
    assert torch.equal(masks.boxes[0], boxes[0, [0, 1, 0, 1, 0]]) and masks.matched[0].tolist() == [0, 1, 0, 1, 0]
    assert torch.equal(masks.boxes[1], boxes[1, [0] * 5])  # none is positive: whatever is there
    again = rois.repeated()
    assert torch.equal(again.boxes[0], boxes[0, [0, 1, 2, 3, 0, 1]]) and torch.equal(again.labels, rois.labels)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [0, 2])
def test_pooling_follows_the_configuration(aligned, ratio):
    # torchvision's and the tutorial's 2 x 2 samples a bin, detectron2's adaptive grid shifted by half a cell; a RoI of
    # the canonical scale comes from P4.
    config = dataclasses.replace(TINY, roi_aligned=aligned, sampling_ratio=ratio, canonical_scale=96)
    features = [torch.randn(1, 3, 256 // stride, 256 // stride) for stride in (4, 8, 16, 32, 64)]
    boxes = torch.tensor([[[10.0, 20, 120, 118], [5, 5, 28, 30]]])
    (pooled,) = RoIPool(config)(features, [boxes], [7])
    for box, feature, scale, found in zip(boxes[0], (features[2], features[0]), (1 / 16, 1 / 4), pooled, strict=True):
        expected = torchvision.ops.roi_align(feature, [box[None]], 7, scale, ratio or -1, aligned)
        torch.testing.assert_close(found, expected[0])


@pytest.mark.parametrize("beta", [0.0, 1 / 9, 1.0])
def test_box_loss_and_its_weights(beta):
    # L1, torchvision's and the tutorial's smooth L1; sums over what the labels say, divided by the RoIs drawn.
    batch = shapes_batch(1)
    n = int(batch.targets.count[0])
    boxes = torch.cat([batch.targets.boxes[:, :n] + 2, random_boxes(1, 3)], dim=1)
    labels = torch.cat([batch.targets.labels[:, :n], torch.tensor([[0, 0, -1]])], dim=1)
    matched = torch.cat([torch.arange(n), torch.zeros(3, dtype=torch.int64)])[None]
    logits, deltas = torch.randn(n + 3, 4), torch.randn(n + 3, 4, 4)
    config = dataclasses.replace(TINY, box_beta=beta, class_weight=3.0, box_weight=5.0)
    losses = BoxLoss(config)(logits, deltas, RoISample(boxes, labels, matched), batch.targets)
    entropy = -logits.log_softmax(1)[torch.arange(n + 2), labels[0, :-1]].sum()
    coder = torchvision.models.detection._utils.BoxCoder((10.0, 10.0, 5.0, 5.0))
    (wanted,) = coder.encode([batch.targets.boxes[0, :n]], [boxes[0, :n]])
    error = (deltas[torch.arange(n), labels[0, :n]] - wanted).abs()
    smooth = torch.where(error < beta, 0.5 * error**2 / max(beta, 1e-9), error - 0.5 * beta).sum()
    torch.testing.assert_close(losses["loss_class"], 3 * entropy / (n + 2))
    torch.testing.assert_close(losses["loss_box"], 5 * smooth / (n + 2))


def test_boxes_are_selected_by_score_class_and_number():
    # Softmax, threshold, NMS within a class alone, the best few of an image: on logits made for it.
    config = dataclasses.replace(TINY, score_threshold=0.2, detection_nms_threshold=0.5, max_detections=3)
    score = lambda *p: [math.log(x) for x in p]
    logits = torch.tensor(
        [
            score(0.05, 0.9, 0.03, 0.02),  # class 1
            score(0.1, 0.8, 0.05, 0.05),  # class 1 on the same place: suppressed
            score(0.2, 0.1, 0.65, 0.05),  # class 2 on the same place: kept
            score(0.1, 0.15, 0.15, 0.6),  # class 3 elsewhere
            score(0.7, 0.1, 0.1, 0.1),  # background
            score(0.45, 0.55, 0.0 + 1e-9, 1e-9),  # class 1 elsewhere, fourth: beyond the number
            score(0.01, 0.97, 0.01, 0.01),  # an empty slot
        ]
    )[None]
    places = torch.tensor([[0, 0, 20, 20.0], [1, 0, 21, 20], [0, 1, 20, 21], [30, 30, 50, 50], [5, 30, 25, 50]])
    proposals = torch.cat([places, torch.tensor([[30.0, 0, 60, 20], [40, 0, 64, 20]])])[None]
    valid = torch.tensor([[True] * 6 + [False]])
    boxes, labels, scores, count = BoxSelection(config)(
        logits, torch.zeros(1, 7, 4, 4), proposals, valid, torch.tensor([[64, 64]])
    )
    assert labels.tolist() == [[1, 2, 3]] and count.tolist() == [3]
    torch.testing.assert_close(scores, torch.tensor([[0.9, 0.65, 0.6]]))
    torch.testing.assert_close(boxes, proposals[:, [0, 2, 3]])


def head_outputs(images, number, classes, grid=0.0):
    """Proposals, some of them invalid, in images of several sizes, logits and deltas; on a grid, full of ties."""
    logits, deltas = torch.randn(images, number, classes) * 3, torch.randn(images, number, classes, 4)
    if grid:
        logits, deltas = (logits / grid).round() * grid, torch.zeros_like(deltas)
    proposals, valid = random_boxes(images, number), torch.rand(images, number) < 0.9
    sizes = torch.randint(60, 140, (images, 2))
    return logits, deltas, proposals, valid, sizes


def torchvisions_detections(config, logits, deltas, proposals, valid, sizes):
    """RoIHeads.postprocess_detections, on what it takes of itself: (boxes, scores, labels) of each image."""
    itself = SimpleNamespace(
        box_coder=torchvision.models.detection._utils.BoxCoder((10.0, 10.0, 5.0, 5.0)),
        score_thresh=config.score_threshold,
        nms_thresh=config.detection_nms_threshold,
        detections_per_img=config.max_detections,
    )
    boxes = [p[v] for p, v in zip(proposals, valid, strict=True)]
    run = torchvision.models.detection.roi_heads.RoIHeads.postprocess_detections
    return list(zip(*run(itself, logits[valid], deltas[valid].flatten(1), boxes, sizes.tolist()), strict=True))


SELECTIONS = {
    "usual": ({"score_threshold": 0.05}, {}),
    "ties": ({"score_threshold": 0.01}, {"grid": 2.0}),  # fewer than 1,000: torchvision's order of ties is stable
    "every pair a candidate": ({"score_threshold": 0.0, "max_detections": 500}, {}),
    "fewer pairs than detections": ({"score_threshold": 0.0, "max_detections": 5000}, {}),
    "little suppressed": ({"score_threshold": 0.02, "detection_nms_threshold": 0.9}, {}),
    "one class": ({"score_threshold": 0.3, "detection_nms_threshold": 0.3}, {"classes": 2}),
    "more pairs than candidates": ({"score_threshold": 0.0, "max_detections": 100}, {"number": 300, "classes": 21}),
}


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("backend", ["torch", "torchvision", "triton"])
def test_boxes_are_selected_as_torchvision_does(name, backend, device):
    changes, options = SELECTIONS[name]
    if backend != "torchvision" and device.type == "cpu" and name == "more pairs than candidates":
        pytest.skip("4096 x 4096 pairs: a matrix of the reference's, five hundred programs of the interpreter")
    config = dataclasses.replace(TINY, **changes)
    inputs = head_outputs(3, **{"number": 60, "classes": 6} | options)
    logits, deltas, proposals, *_ = inputs
    logits[1, :, 0] = 999.0  # an image without a candidate
    logits[0, 3], deltas[0, 5] = math.nan, math.nan  # nothing of a row; its boxes
    proposals[2, 7:9] += 500  # beyond the image: clipped to nothing
    inputs = [t.to(device) for t in inputs]
    wanted = [[out.cpu() for out in of_image] for of_image in torchvisions_detections(config, *inputs)]
    with use_backend(backend):
        boxes, labels, scores, count = (out.cpu() for out in BoxSelection(config)(*inputs))
    slots = min(config.max_detections, logits.shape[1] * (logits.shape[2] - 1))
    assert boxes.shape == (3, slots, 4) and labels.shape == scores.shape == (3, slots) and count.dtype == torch.int32
    assert count.tolist() == [len(b) for b, _, _ in wanted]
    assert count[0] > 10 and count[1] == 0 and count[2] > 10
    for i, (their_boxes, their_scores, their_labels) in enumerate(wanted):
        n = int(count[i])
        assert torch.equal(labels[i, :n], their_labels)
        torch.testing.assert_close(scores[i, :n], their_scores)
        torch.testing.assert_close(boxes[i, :n], their_boxes)
        assert not boxes[i, n:].any() and not labels[i, n:].any() and not scores[i, n:].any()


@pytest.mark.parametrize("at_once", [20, 60, 150])
def test_candidates_beyond_the_best_change_nothing_but_the_end(at_once, monkeypatch):
    # Those that survive among the best are torchvision's first ones, all of them where they are enough.
    monkeypatch.setattr(detections, "CANDIDATES", at_once)
    config = dataclasses.replace(TINY, score_threshold=0.01, max_detections=15, detection_nms_threshold=0.4)
    inputs = head_outputs(4, 60, 6)
    inputs[2][:2] = inputs[2][:2, :1] + torch.rand(2, 60, 4)  # in two images everything lies in one place
    wanted = torchvisions_detections(config, *inputs)
    boxes, labels, scores, count = BoxSelection(config)(*inputs)
    candidates = ((inputs[0].softmax(-1)[..., 1:] > 0.01) & inputs[3][..., None]).sum(dim=(1, 2))
    assert (candidates > at_once).any()
    for i, (their_boxes, their_scores, their_labels) in enumerate(wanted):
        n = int(count[i])
        assert n == len(their_labels) or (n < len(their_labels) and candidates[i] > at_once)
        assert torch.equal(labels[i, :n], their_labels[:n]) and torch.equal(scores[i, :n], their_scores[:n])
        torch.testing.assert_close(boxes[i, :n], their_boxes[:n])
    fewer = [n < len(labels) for n, (_, _, labels) in zip(count.tolist(), wanted, strict=True)]
    assert count.max() == 15 and any(fewer) == (at_once < 150)


def test_more_detections_than_candidates(monkeypatch):
    # Who asks for more detections than usually are candidates gets them.
    monkeypatch.setattr(detections, "CANDIDATES", 5)
    inputs = head_outputs(2, 60, 6)
    config = dataclasses.replace(TINY, score_threshold=0.0, max_detections=40)
    assert BoxSelection(config)(*inputs)[1].shape == (2, 40)


def test_softmax_masks_ignore_what_bce_ignores():
    # A RoI with no object of its own adds nothing, whichever form the loss has.
    batch = shapes_batch(1)
    rois = RoISample(batch.targets.boxes[:, :2], torch.full((1, 2), -1), torch.zeros(1, 2, dtype=torch.int64))
    for form in ("bce", "softmax", "canvas"):
        loss = MaskLoss(dataclasses.replace(TINY, mask_loss=form))
        head, features = MaskHead(TINY), torch.randn(2, TINY.mask_channels, 28, 28, requires_grad=True)
        found = loss(features, head, rois, batch.targets)
        assert found["loss_mask"] == 0 and found["loss_mask"].requires_grad
