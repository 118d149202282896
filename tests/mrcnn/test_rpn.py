"""The RPN's options: objectness, labels, normalisers, weights, proposals."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from model_inputs import TINY, random_boxes

from kernels import AnchorGrid, use_backend
from kernels.boxes import encode
from mrcnn.data.collate import targets_from_lists
from mrcnn.modeling.rpn import Proposals, RPNHead, RPNLoss


def one_object(*boxes, images=1):
    """Targets of images with these boxes in each."""
    masks = torch.ones(len(boxes), 100, 100, dtype=torch.uint8)
    labels = torch.ones(len(boxes), dtype=torch.int64)
    return targets_from_lists([{"boxes": torch.tensor(boxes), "labels": labels, "masks": masks}] * images)


def configured(**changes):
    return dataclasses.replace(TINY, **changes)


def test_two_logits_are_the_softmax_of_background_and_object():
    # What the head returns is the logit whose sigmoid is the object's probability, and whose binary cross-entropy is
    # the cross-entropy of the two.
    config = configured(objectness="softmax", fpn_channels=32)
    head = RPNHead(config, anchors_per_cell=9)
    features = [torch.randn(2, 32, 3, 4), torch.randn(2, 32, 2, 2)]
    logits, deltas = head(features)
    assert logits.shape == (2, (12 + 4) * 9) and deltas.shape == (2, (12 + 4) * 9, 4)
    pairs = torch.cat([head.objectness(head.convs(f)).permute(0, 2, 3, 1).reshape(2, -1, 2) for f in features], dim=1)
    torch.testing.assert_close(logits.sigmoid(), pairs.softmax(-1)[..., 1])
    labels = torch.randint(0, 2, logits.shape)
    expected = F.cross_entropy(pairs.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(F.binary_cross_entropy_with_logits(logits, labels.float()), expected)


def test_one_logit_is_itself():
    # In double, as objectness and deltas come from one product, which may sum in another order.
    head = RPNHead(configured(fpn_channels=32), anchors_per_cell=3).double()
    feature = torch.randn(2, 32, 3, 4, dtype=torch.float64)
    expected = head.objectness(head.convs(feature)).permute(0, 2, 3, 1).reshape(2, -1)
    torch.testing.assert_close(head([feature])[0], expected, rtol=1e-12, atol=1e-14)


# Anchors whose IoU with the object (0, 0, 10, 10) is 1, exactly 0.3 (as fp32), 0.1 and 0.
ANCHORS = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 3], [0, 0, 10, 1], [50, 50, 60, 60]])


# The same as four levels of one cell.
FOUR_CELLS = AnchorGrid(ANCHORS[:, None], ((1, 1),) * 4, ((0, 0),) * 4)


@pytest.mark.parametrize(("inclusive", "background"), [(False, 2), (True, 3)])
def test_the_low_bound_is_open_or_closed(inclusive, background):
    # At an IoU of exactly 0.3 an anchor is ignored (torchvision) or background (the tutorial).
    config = configured(rpn_low_inclusive=inclusive)
    labels = []
    loss = RPNLoss(config)
    loss.sample = lambda found, logits: labels.append(found) or RPNLoss.sample(loss, found, logits)
    loss(torch.zeros(1, 4), torch.zeros(1, 4, 4), AnchorGrid.of(ANCHORS), one_object([0.0, 0, 10, 10]))
    assert (labels[0] == 0).sum() == background and (labels[0] == 1).sum() == 1


@pytest.mark.parametrize(("overlap", "positive"), [(False, 3), (True, 1)])
def test_an_object_that_no_anchor_overlaps(overlap, positive):
    # torchvision: its best IoU is 0, and every anchor that has it is positive; the option asks for an overlap.
    anchors = AnchorGrid.of(ANCHORS[[0, 3, 3]])
    targets = one_object([0.0, 0, 10, 10], [80.0, 80, 90, 90])
    labels = []
    loss = RPNLoss(configured(rpn_require_overlap=overlap))
    loss.sample = lambda found, logits: labels.append(found) or RPNLoss.sample(loss, found, logits)
    loss(torch.zeros(1, 3), torch.zeros(1, 3, 4), anchors, targets)
    assert (labels[0] == 1).sum() == positive


@pytest.mark.parametrize(("normalizer", "number"), [("sampled", 6), ("slots", 256), ("positives", 2), ("cells", 8)])
def test_normalisers_and_weights(normalizer, number):
    # One positive and two negatives an image are drawn, of 128 slots; N_cls and N_reg divide the sums over both images,
    # lambda multiplies them.
    config = configured(
        rpn_class_normalizer=normalizer, rpn_box_normalizer=normalizer, objectness_weight=2.0, rpn_box_weight=10.0,
        rpn_box_beta=0.0, rpn_samples=128,
    )  # fmt: skip
    logits, deltas = torch.randn(2, 4), torch.randn(2, 4, 4)
    # The second anchor is ignored: a diverged model's output there must not reach the losses.
    logits[:, 1], deltas[:, 1] = float("inf"), float("nan")
    losses = RPNLoss(config)(logits, deltas, FOUR_CELLS, one_object([0.0, 0, 10, 9], images=2))
    labels = torch.tensor([[1.0, 0, 0]] * 2)
    entropy = F.binary_cross_entropy_with_logits(logits[:, [0, 2, 3]], labels, reduction="sum")
    error = (deltas[:, 0] - encode(torch.tensor([0.0, 0, 10, 9]), ANCHORS[0])).abs().sum()  # beta 0 is L1
    torch.testing.assert_close(losses["loss_objectness"], 2 * entropy / number)
    torch.testing.assert_close(losses["loss_rpn_box"], 10 * error / number)


def test_hard_negatives_reach_the_loss():
    # One positive: three negatives of 200 are drawn, the ones that look most like objects.
    anchors = torch.cat([ANCHORS[:1], random_boxes(200) + 100])
    logits = torch.randn(1, 201)
    config = configured(rpn_sampling="hard", rpn_negative_ratio=3.0, rpn_class_normalizer="slots", rpn_samples=64)
    losses = RPNLoss(config)(logits, torch.zeros(1, 201, 4), AnchorGrid.of(anchors), one_object([0.0, 0, 10, 10]))
    expected = F.softplus(-logits[0, 0]) + F.softplus(logits[0, 1:]).topk(3).values.sum()
    torch.testing.assert_close(losses["loss_objectness"], expected / 64)


@pytest.mark.parametrize(("training", "number"), [(True, 1000), (False, 300)])
def test_proposals_in_training_and_in_test(training, number):
    # The tutorial's 1000 and 300, of boxes that do not overlap.
    config = configured(pre_nms_top_n=(2000, 1000), post_nms_top_n=(1000, 300))
    anchors = AnchorGrid(torch.tensor([[[0.0, 0, 9, 9]]]), ((40, 40),), ((10, 10),))
    logits, deltas, sizes = torch.randn(1, 1600), torch.zeros(1, 1600, 4), torch.tensor([[400, 400]])
    boxes, valid = Proposals(config)(logits, deltas, anchors, sizes, training)
    assert boxes.shape == (1, number, 4) and valid.all()
    best = anchors.anchors()[logits[0].argsort(descending=True)[:number]]
    torch.testing.assert_close(boxes[0], best)


def test_proposals_have_one_shape_whatever_they_are():
    # Fewer candidates than slots, and all of them overlapping: padded, marked, best first.
    anchors = AnchorGrid(torch.tensor([[[0.0, 0, 10, 10]]] * 2), ((4, 5), (2, 5)), ((0, 0),) * 2)
    logits = torch.linspace(1, -1, 30)[None].repeat(2, 1)
    logits[1, 20:] = 3.0
    proposals, valid = Proposals(TINY)(
        logits, torch.zeros(2, 30, 4), anchors, torch.tensor([[50, 50], [50, 5]]), training=True
    )
    assert proposals.shape == (2, 40, 4) and valid.shape == (
        2,
        40,
    )  # as many slots a level as the larger one has anchors
    assert valid.sum(1).tolist() == [2, 2]  # one a level survives: NMS is within levels
    assert proposals[1, 0].tolist() == [0, 0, 5, 10]


def test_half_outputs_order_as_they_are(device):
    # Under autocast the head's outputs are bf16, where hundreds of scores are equal: the first of them come first, on
    # every backend; and the losses read them as they are.
    grid = AnchorGrid(torch.tensor([[[0.0, 0, 9, 9]]]), ((20, 20),), ((10, 10),))
    logits, deltas = (torch.randint(-30, 30, (2, 400)) / 16).bfloat16(), torch.zeros(2, 400, 4).bfloat16()
    sizes = torch.tensor([[200, 200], [100, 200]])
    config = configured(pre_nms_top_n=(90, 90), post_nms_top_n=(40, 40))
    results = []
    for backend, to in (("triton", device), ("torch", torch.device("cpu"))):
        with use_backend(backend):
            moved = AnchorGrid(grid.cells.to(to), grid.extents, grid.strides)
            boxes, valid = Proposals(config)(logits.to(to), deltas.to(to), moved, sizes.to(to), training=True)
        results.append((boxes.cpu(), valid.cpu()))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    order = logits[0].float().sort(descending=True, stable=True).indices[:40]
    assert torch.equal(results[0][0][0], grid.anchors()[order])
