"""Mask targets and the three forms of the mask loss."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from model_inputs import TINY, random_boxes, shapes_batch
from torchvision.models.detection.roi_heads import project_masks_on_boxes
from torchvision.ops import roi_align

from kernels import boxes, mask_targets
from mrcnn.data.collate import targets_from_lists
from mrcnn.modeling import MaskRCNN
from mrcnn.modeling.canvas import canvas_targets
from mrcnn.modeling.heads import MaskHead
from mrcnn.modeling.mask_losses import MaskLoss, canvas_loss, class_channel_loss, mask_probabilities
from mrcnn.modeling.roi_heads import RoISample


def test_mask_targets_are_torchvisions():
    # Boxes that reach the image's border, cross other objects, are thin, or equal the object; images padded.
    sizes, padded = [(40, 64), (50, 33)], (64, 64)
    lists, expected, rows = [], [], []
    for height, width in sizes:
        masks = torch.zeros(3, height, width, dtype=torch.uint8)
        masks[0, 5:30, 3:20] = 1
        masks[1] = torch.rand(height, width) > 0.5
        masks[2, height - 4 :, width - 9 :] = 1
        proposals = random_boxes(12, side=60)
        proposals[0] = torch.tensor([3.0, 5, 20, 30])
        proposals[1] = torch.tensor([0.0, 0, width, height])
        proposals[2] = torch.tensor([width - 6.5, height - 3.2, width, height])
        proposals[3] = torch.tensor([4.0, 4.0, 4.2, 30.0])
        proposals = boxes.clip(proposals[None], torch.tensor([[height, width]]))[0]
        matched = torch.arange(12) % 3
        lists.append({"boxes": random_boxes(3), "labels": torch.ones(3, dtype=torch.int64), "masks": masks})
        expected.append(project_masks_on_boxes(masks, proposals, matched, 28))
        rows.append((proposals, matched))
    proposals, matched = (torch.stack(part) for part in zip(*rows, strict=True))
    with torch.autocast("cpu", torch.bfloat16):  # as in training on a GPU: the targets must stay fp32
        found = mask_targets(targets_from_lists(lists, padded_size=padded).masks, proposals, matched, 28)
    assert (found - torch.stack(expected)).abs().max() <= 2e-7 * 3  # sums of up to 9 samples, in another order
    assert 0.1 < found.mean() < 0.9


def test_binary_targets_are_detectron2s():
    # Its BitMasks.crop_and_resize: RoIAlign with aligned=True, adaptive sampling, then >= 0.5.
    masks = torch.zeros(2, 40, 64, dtype=torch.uint8)
    masks[0, 5:30, 3:20] = 1
    masks[1] = torch.rand(40, 64) > 0.5
    proposals = boxes.clip(random_boxes(1, 12, side=50), torch.tensor([[40, 64]]))
    proposals[0, 0] = torch.tensor([3.0, 5, 20, 30])
    proposals[0, 1] = torch.tensor([10.0, 10, 10, 10])  # empty, as a box that was clipped away
    matched = (torch.arange(12) % 2)[None]
    found = {"boxes": random_boxes(2), "labels": torch.ones(2, dtype=torch.int64), "masks": masks}
    binary = mask_targets(targets_from_lists([found], padded_size=(64, 64)).masks, proposals, matched, 28, "detectron2")
    rois = torch.cat([matched[0, :, None].float(), proposals[0]], dim=1)
    expected = roi_align(masks[:, None].float(), rois, (28, 28), 1.0, -1, aligned=True)[:, 0]
    assert torch.equal(binary[0], expected >= 0.5)


def test_the_softmax_form_is_categorical_cross_entropy_on_the_class_channel():
    # Written out, a pixel at a time: -target * log softmax over the classes, background not among them.
    logits = torch.randn(3, 5, 4, 4, requires_grad=True)
    labels, targets = torch.tensor([2, -1, 4]), torch.rand(3, 4, 4)
    loss = class_channel_loss(logits, labels, targets)
    total = 0.0
    for roi in (0, 2):
        for y in range(4):
            for x in range(4):
                column = logits[roi, 1:, y, x].tolist()
                share = math.exp(column[labels[roi] - 1]) / sum(map(math.exp, column))
                total -= targets[roi, y, x].item() * math.log(share)
    assert loss.item() == pytest.approx(total / (2 * 16), rel=1e-5)
    loss.backward()
    assert (logits.grad[1] == 0).all() and (logits.grad[:, 0] == 0).all()  # neither the empty slot nor the background
    assert (logits.grad[0, 1:] != 0).all()  # the classes compete: every channel moves


def test_with_one_class_the_softmax_form_is_identically_zero():
    # A softmax over one channel is 1 whatever the logits: nothing can be learnt, so a study needs more classes.
    logits = (torch.randn(6, 2, 8, 8) * 5).requires_grad_()
    loss = class_channel_loss(logits, torch.ones(6, dtype=torch.int64), torch.rand(6, 8, 8))
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()


def few_rois(labels):
    """A mask head of four classes, features of as many RoIs as there are labels, and RoIs in one image."""
    torch.manual_seed(0)
    head = MaskHead(dataclasses.replace(TINY, num_classes=4))
    features = torch.randn(len(labels), TINY.mask_channels, 28, 28)
    return head, features


@pytest.mark.parametrize("backend", ["torch", "torchvision"])
def test_bce_supervises_the_class_channel_and_no_other(backend):
    # The paper's form, through the stage: K channels, of which each RoI has one to do with, on the ordinary path too.
    batch = shapes_batch(1)
    n = int(batch.targets.count[0])
    rois = RoISample(batch.targets.boxes[:, :n], batch.targets.labels[:, :n], torch.arange(n)[None])
    head, features = few_rois(rois.labels[0])
    stage = MaskLoss(TINY)
    stage.backend = backend
    loss = stage(features, head, rois, batch.targets)["loss_mask"]
    wanted = mask_targets(batch.targets.masks, rois.boxes, rois.matched, 28)[0]
    own = head.all_logits(features)[torch.arange(n), rois.labels[0]]
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(own, wanted))
    torch.testing.assert_close(head.class_logits(features, rois.labels[0]), own)
    loss.backward()
    touched = head.logits.weight.grad.flatten(1).abs().sum(1) > 0
    assert touched.nonzero().flatten().tolist() == sorted(set(rois.labels[0].tolist()))


def overlapping():
    """A large object of class 3 with a smaller one of class 1 on it, and another of class 3 beside it."""
    masks = torch.zeros(3, 32, 32, dtype=torch.uint8)
    masks[0, 4:8, 4:8] = 1
    masks[1, 0:16, 0:16] = 1
    masks[2, 0:16, 16:32] = 1
    labels = torch.tensor([1, 3, 3])
    corners = torch.tensor([[4.0, 4, 8, 8], [0, 0, 16, 16], [16, 0, 32, 16]])
    return targets_from_lists([{"boxes": corners, "labels": labels, "masks": masks}])


def test_the_canvas_holds_every_object_of_the_image():
    # A RoI over both large objects and some background: a class a pixel, the smaller object on top, two neighbours of
    # one class indistinguishable.
    canvas = canvas_targets(overlapping(), torch.tensor([[[0.0, 0, 32, 32], [4, 4, 8, 8]]]), 32)
    expected = torch.zeros(32, 32, dtype=torch.int64)
    expected[:16] = 3
    expected[4:8, 4:8] = 1
    assert torch.equal(canvas[0, 0], expected)
    assert (canvas[0, 1] == 1).all()  # a RoI sees the canvas in its own frame


def test_canvas_loss_is_cross_entropy_of_every_pixel():
    logits, canvas = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randint(0, 4, (2, 8, 8))
    loss = canvas_loss(logits, torch.tensor([3, -1]), canvas)
    torch.testing.assert_close(loss, F.cross_entropy(logits[:1], canvas[:1]))
    loss.backward()
    assert (logits.grad[1] == 0).all() and (logits.grad[0] != 0).all()


@pytest.mark.parametrize("form", ["bce", "softmax", "canvas"])
def test_probabilities_belong_to_the_loss(form):
    # The class's own, the softmax over the classes, the softmax with the background.
    labels = torch.tensor([1, 3, 2])
    head, features = few_rois(labels)
    logits, rows = head.all_logits(features), torch.arange(3)
    found = mask_probabilities(head, features, labels, form)
    expected = {
        "bce": logits.sigmoid()[rows, labels],
        "softmax": logits[:, 1:].softmax(1)[rows, labels - 1],
        "canvas": logits.softmax(1)[rows, labels],
    }[form]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("form", ["bce", "softmax", "canvas"])
@pytest.mark.parametrize("target", ["soft", "binary"])
def test_every_form_trains(form, target):
    # The whole model, with NaN in what the empty slots predict; the loss falls, and the weight multiplies it.
    torch.manual_seed(0)
    batch = shapes_batch()
    model = MaskRCNN(dataclasses.replace(TINY, mask_loss=form, mask_target=target)).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    seen = []
    for _ in range(8):
        losses = model(batch.images, batch.sizes, batch.targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        seen.append(losses["loss_mask"].item())
    assert seen[-1] < 0.8 * seen[0]
    rois = RoISample(batch.targets.boxes[:, :2], torch.tensor([[1, -1], [2, -1]]), torch.zeros(2, 2, dtype=torch.int64))
    features = torch.randn(4, TINY.mask_channels, 28, 28)
    features[[1, 3]] = float("nan")
    once, twice = (
        MaskLoss(dataclasses.replace(model.config, mask_weight=weight))(features, model.mask_head, rois, batch.targets)[
            "loss_mask"
        ]
        for weight in (1.0, 2.0)
    )
    assert once.isfinite() and twice == 2 * once
