"""The configuration `tutorial` is the tutorial's five classes, and what does not work in them is shown not to."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
import torchvision
from tutorial import FPN, MaskHead, Tutorial, copy_weights

from kernels import mask_predictor_loss
from kernels.roi_align.reference import assign_levels, level_thresholds
from mrcnn import modeling
from mrcnn.config import CONFIGS, DataConfig, ModelConfig, TrainConfig

CONFIG = CONFIGS["tutorial"].model
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def models():
    """The tutorial's modules and this project's, with the same weights, in evaluation mode."""
    torch.manual_seed(0)
    tutorial, ours = Tutorial().eval(), modeling.MaskRCNN(CONFIG).eval()
    copy_weights(tutorial, ours)
    return tutorial, ours


@torch.no_grad()
def test_same_weights_same_outputs_at_800(models):
    # Every parameter of ours is one of the tutorial's (or an identity), so equal outputs mean equal architectures. The
    # shapes are those that the tutorial prints.
    tutorial, ours = models
    image = torch.randn(1, 3, 800, 800)
    theirs = tutorial.backbone(image)
    features = ours.backbone(image)
    assert [tuple(c.shape) for c in features] == [
        (1, 256, 200, 200), (1, 512, 100, 100), (1, 1024, 50, 50), (1, 2048, 25, 25)
    ]  # fmt: skip
    for a, b in zip(features, theirs, strict=True):
        torch.testing.assert_close(a, b)

    theirs, pyramid = tutorial.fpn(*theirs), ours.fpn(features)
    assert [tuple(p.shape) for p in pyramid] == [(1, 256, side, side) for side in (200, 100, 50, 25)]
    for a, b in zip(pyramid, theirs, strict=True):
        assert a.std() > 0.01
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    logits, deltas = ours.rpn(pyramid)
    scores, regression = (torch.cat(parts, dim=1) for parts in zip(*map(tutorial.rpn, theirs), strict=True))
    assert logits.shape == (1, 478_125) and scores.shape == (1, 478_125, 2) and deltas.shape == (1, 478_125, 4)
    torch.testing.assert_close(logits.sigmoid(), scores[..., 1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(deltas, regression, rtol=1e-4, atol=1e-5)
    assert len(ours.anchors(pyramid, (800, 800))) == 478_125

    pooled = torch.randn(3, 256, 7, 7)
    classes, boxes = ours.box_head(pooled)
    assert classes.shape == (3, 81) and boxes.shape == (3, 81, 4)
    torch.testing.assert_close(classes, tutorial.box(pooled)[0])
    torch.testing.assert_close(boxes.flatten(1), tutorial.box(pooled)[1])
    pooled = torch.randn(3, 256, 14, 14)
    features, labels = ours.mask_head(pooled), torch.tensor([1, 80, 7])
    assert ours.mask_head.all_logits(features).shape == (3, 81, 28, 28)
    torch.testing.assert_close(ours.mask_head.all_logits(features), tutorial.mask(pooled))
    own = tutorial.mask(pooled)[torch.arange(3), labels]
    torch.testing.assert_close(ours.mask_head.class_logits(features, labels), own)


def test_every_weight_is_the_tutorials(models):
    # Nothing of ours is left at its own initialisation: the tutorial's parameters, less the convolution that it does
    # not use, plus two identities.
    tutorial, ours = models
    count = lambda module: sum(p.numel() for p in module.parameters())
    smooth = count(tutorial.fpn.smooth3)
    assert count(ours) == count(tutorial) - smooth + 2 * smooth


def test_erratum_one_smoothing_convolution_is_unused_and_two_levels_are_not_smoothed():
    # The paper puts a 3x3 convolution on every level (arXiv:1612.03144, section 3); so do we.
    theirs = FPN(channels=4)
    features = [torch.randn(1, c, side, side) for c, side in ((256, 8), (512, 4), (1024, 2), (2048, 1))]
    p2, _, _, p5 = theirs(*features)
    sum(p.sum() for p in theirs(*features)).backward()
    assert theirs.smooth3.weight.grad is None and theirs.smooth1.weight.grad is not None
    assert torch.equal(p5, theirs.lateral5(features[3]))  # as it left the lateral convolution
    assert p2.shape == (1, 4, 8, 8)
    ours = modeling.fpn.FPN((256, 512, 1024, 2048), 4, levels=4)
    sum(p.sum() for p in ours(features)).backward()
    assert all(conv[0].weight.grad.abs().sum() > 0 for conv in ours.output)


def test_erratum_doubling_fails_where_32_does_not_divide():
    # An image of 80 x 100: C4 is 5 x 7 and C5 3 x 4, whose double is 6 x 8.
    features = [
        torch.randn(1, c, *size) for c, size in ((256, (20, 25)), (512, (10, 13)), (1024, (5, 7)), (2048, (3, 4)))
    ]
    with pytest.raises(RuntimeError, match="must match"):
        FPN(channels=4)(*features)
    pyramid = modeling.fpn.FPN((256, 512, 1024, 2048), 4)(features)
    assert [tuple(p.shape[-2:]) for p in pyramid] == [(20, 25), (10, 13), (5, 7), (3, 4), (2, 2)]


def test_erratum_a_7x7_roi_gives_a_14x14_mask():
    # The mask head doubles its input: 28 x 28 needs RoIs of 14 x 14, as in the paper.
    assert MaskHead(channels=8, classes=3)(torch.randn(1, 8, 7, 7)).shape == (1, 3, 14, 14)
    assert CONFIG.mask_pool_size == 14


def test_erratum_the_level_formula_needs_clamping():
    # floor(4 + log2(sqrt(w h) / 224)) leaves P2..P5 for small and large boxes; in between ours is the same.
    sides = [10.0, 60.0, 111.0, 113.0, 225.0, 500.0, 2000.0]
    formula = [math.floor(4 + math.log2(side / 224)) for side in sides]
    assert formula == [-1, 2, 2, 3, 4, 5, 7]
    rois = torch.tensor([[0.0, 0, 0, side, side] for side in sides])
    ours = 2 + assign_levels(rois, level_thresholds([1 / 4, 1 / 8, 1 / 16, 1 / 32], CONFIG.canonical_scale, 4))
    assert ours.tolist() == [min(max(level, 2), 5) for level in formula]


def test_erratum_81_classes_include_background():
    # COCO has 80; the 81st mask channel is the background's, and no gradient ever reaches it.
    config = dataclasses.replace(CONFIG, fpn_channels=8, mask_channels=8)
    model = modeling.heads.MaskHead(config)
    features, layer = model(torch.randn(4, 8, 14, 14)), model.logits
    labels, targets = torch.tensor([1, 5, 80, -1]), torch.rand(4, 28, 28)
    mask_predictor_loss(features, layer.weight, layer.bias, labels, targets, relu=True).backward()
    grad = layer.weight.grad.flatten(1).abs().sum(1)
    assert len(layer.weight) == 81 and grad.nonzero().flatten().tolist() == [1, 5, 80]


def test_erratum_pretrained_is_deprecated():
    # torchvision still takes it, with a warning, and has no name in it for which weights are meant.
    with pytest.warns(UserWarning, match="'pretrained' is deprecated"):
        torchvision.models.resnet18(pretrained=False)


def test_the_table_of_the_tutorial_names_what_there_is():
    # reports/tutorial/README.md maps sections to options and tests: every key of the model is in it, and every key and
    # test in it exists.
    text = (ROOT / "reports" / "tutorial" / "README.md").read_text()
    keys = set(re.findall(r"`(model|data|train)\.(\w+)", text))
    sections = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}
    unexplained = {f.name for f in dataclasses.fields(ModelConfig)} - {
        key for section, key in keys if section == "model"
    }
    assert unexplained == {"num_classes"}
    for section, key in keys:
        assert key in {f.name for f in dataclasses.fields(sections[section])}, f"{section}.{key}"
    files = re.findall(r"\[`?(test_\w+)`?\]\(\.\./\.\./(tests/[\w/]+\.py)\)", text)
    assert len(files) > 25
    for name, path in files:
        assert f"def {name}(" in (ROOT / path).read_text(), f"{path}::{name}"
