"""The printed summary against published numbers and against torchvision's modules."""

import dataclasses
import json
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import ResNet50_Weights
from torchvision.models.detection import (
    MaskRCNN_ResNet50_FPN_V2_Weights,
    MaskRCNN_ResNet50_FPN_Weights,
    maskrcnn_resnet50_fpn_v2,
)

from kernels import launch_counts
from mrcnn import cli
from mrcnn.config import CONFIGS
from mrcnn.errors import ConfigError
from mrcnn.modeling import MaskRCNN
from mrcnn.summary import parse_image_size, summarize


def with_model(name, **changes):
    config = CONFIGS[name]
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


def shapes(summary):
    return {(stage.name, t.name): t.shape for stage in summary.stages for t in stage.tensors}


def flops(summary, *names):
    return sum(stage.flops for stage in summary.stages if stage.name.partition(".")[0] in names)


@pytest.fixture(scope="module")
def tutorial():
    return summarize(CONFIGS["tutorial"], (800, 800))


def test_tutorial_shapes(tutorial):
    found = shapes(tutorial)
    for level, (channels, side) in enumerate(((256, 200), (512, 100), (1024, 50), (2048, 25)), 2):
        assert found[f"backbone.stages.{level - 2}", f"C{level}"] == (1, channels, side, side)
        assert found["fpn", f"P{level}"] == (1, 256, side, side)
        assert found["rpn", f"objectness P{level}"] == (1, 9 * 2, side, side)
        assert found["rpn", f"deltas P{level}"] == (1, 9 * 4, side, side)
        assert found["anchors", f"P{level}"] == (side * side * 9, 4)
    assert found["rpn", "logits"] == (1, 478125) and found["anchors", "anchors"] == (478125, 4)
    assert found["box_head", "logits"] == (512, 81) and found["box_head", "deltas"] == (512, 81, 4)
    assert found["mask_head", "features"] == (128, 256, 28, 28) and found["mask_loss", "targets"] == (128, 28, 28)


def test_who_uses_anchors(tutorial):
    users = {stage.name for stage in tutorial.stages if stage.anchors}
    assert users == {"rpn", "anchors", "proposals", "rpn_loss"}


@pytest.mark.parametrize(
    ("name", "weights", "detections"),
    [
        ("torchvision", MaskRCNN_ResNet50_FPN_Weights.COCO_V1, False),
        ("torchvision_v2", MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1, True),
    ],
)
def test_parameters_and_flops_are_the_published_ones(name, weights, detections):
    # Published in 1e9 multiply-adds of one random image, resized to 800 x 800, in which the first model found nothing
    # and the second as much as it may.
    summary = summarize(CONFIGS[name], (800, 800), training=False)
    assert summary.trainable + summary.frozen == weights.meta["num_params"]
    counted = summary.flops - (0 if detections else flops(summary, "mask_head", "detections"))
    # Of the mask's channels all are published, and only the detected class's computed.
    others = 100 * 28 * 28 * 256 * (91 - 1) if detections else 0
    assert counted / 2e9 + others / 1e9 == pytest.approx(weights.meta["_ops"], abs=5e-4)


def test_frozen_parameters_are_the_stem_and_c2():
    # torchvision's trainable_backbone_layers=3, without batch norms: 9,408 of conv1 and 212,992 of layer1.
    summary = summarize(CONFIGS["torchvision"], (64, 64), training=False)
    assert {s.name: s.frozen for s in summary.stages if s.frozen} == {
        "backbone.stem": 9408,
        "backbone.stages.0": 212992,
    }


def test_backbone_flops_are_the_published_ones():
    # Published with the classifier, in multiply-adds, rounded to a thousandth.
    summary = summarize(CONFIGS["torchvision"], (224, 224), training=False)
    published = ResNet50_Weights.IMAGENET1K_V1.meta["_ops"] * 1e9 - 2048 * 1000
    assert flops(summary, "backbone") == pytest.approx(2 * published, rel=2e-4)


def test_flops_are_those_of_torchvisions_modules():
    # The second version, whose heads have the more layers. 5 RoIs an image make as many in detection.
    config = with_model("torchvision_v2", post_nms_top_n=(5, 5), max_detections=5)
    summary = summarize(config, (64, 96), batch=2, training=False)
    with torch.device("meta"):
        theirs = maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None).eval()
        images, pooled, pooled_masks = (torch.zeros(s) for s in ((2, 3, 64, 96), (10, 256, 7, 7), (10, 256, 14, 14)))

    def count(call):
        with FlopCounterMode(display=False) as counter:
            result = call()
        return counter.get_total_flops(), result

    wanted, pyramid = count(lambda: theirs.backbone(images))
    assert flops(summary, "backbone", "fpn") == wanted
    assert flops(summary, "rpn") == count(lambda: theirs.rpn.head(list(pyramid.values())))[0]
    heads = theirs.roi_heads
    assert flops(summary, "box_head") == count(lambda: heads.box_predictor(heads.box_head(pooled)))[0]
    deconv = lambda: heads.mask_predictor.conv5_mask(heads.mask_head(pooled_masks))
    assert flops(summary, "mask_head") == count(deconv)[0]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("training", [True, False])
def test_every_configuration_is_traced_whole(name, training):
    # Every parameter belongs to a stage, at any size; nothing is launched.
    launch_counts.clear()
    summary = summarize(CONFIGS[name], (200, 333), batch=2, training=training)
    assert summary.size == (224, 352) and not launch_counts
    with torch.device("meta"):
        model = MaskRCNN(CONFIGS[name].model)
    assert summary.trainable + summary.frozen == sum(p.numel() for p in model.parameters())
    assert (summary.backward_flops > summary.flops) == training
    children = {n for n, _ in model.named_children()}
    stages = {stage.name.partition(".")[0] for stage in summary.stages}
    losses = {"rpn_loss", "roi_sampler", "box_loss", "mask_loss"}
    detection = {"box_selection"}
    assert stages == ({"input", *children} - detection if training else {"input", "detections", *children} - losses)


@pytest.mark.parametrize(
    ("mask_loss", "said"), [("bce", "alone."), ("softmax", "inside its object"), ("canvas", "all of them")]
)
def test_notes_say_how_the_mask_head_is_supervised(mask_loss, said):
    notes = summarize(with_model("tiny", mask_loss=mask_loss), (64, 64)).notes
    assert [note for note in notes if said in note and mask_loss in note and "91 channels" in note]


def test_shapes_are_those_of_a_real_step():
    # The traced model against one that computes, stage by stage.
    config = with_model("tiny", post_nms_top_n=(20, 20), roi_samples=8)
    model, seen = MaskRCNN(config.model), {}
    for name in ("rpn", "proposals", "box_head", "mask_head"):
        getattr(model, name).register_forward_hook(lambda module, args, out, name=name: seen.update({name: out}))
    from mrcnn.data.collate import Collate
    from mrcnn.data.shapes import ShapesDataset

    dataset = ShapesDataset(2, 64)
    batch = Collate(dataset.max_objects)([dataset[0], dataset[1]])
    model(batch.images, batch.sizes, batch.targets)
    found = shapes(summarize(config, (64, 64), batch=2))
    for stage, names in {
        "rpn": ("logits", "deltas"),
        "proposals": ("boxes", "valid"),
        "box_head": ("logits", "deltas"),
    }.items():
        assert [found[stage, name] for name in names] == [tuple(tensor.shape) for tensor in seen[stage]]
    assert found["mask_head", "features"] == seen["mask_head"].shape


@pytest.mark.parametrize("text", ["", "800x", "0", "1x2x3", "-5", "8e2"])
def test_bad_sizes(text):
    with pytest.raises(ConfigError, match="image-size"):
        parse_image_size(text)


def test_sizes():
    assert parse_image_size("800x1344") == (800, 1344) and parse_image_size("96") == (96, 96)


def run(capsys, *arguments):
    sys.argv = ["mrcnn", "summary", *arguments]
    with pytest.raises(SystemExit) as exit_:
        cli.main()
        raise SystemExit(0)
    return exit_.value.code or 0, capsys.readouterr()


def test_command(capsys):
    status, shown = run(capsys, "--config", "tutorial", "--image-size", "800")
    assert status == 0
    for text in ("[1, 2048, 25, 25]", "[478125, 4]", "[512, 81, 4]", "[128, 256, 28, 28]", "200x200x9", "44.41 M"):
        assert text in shown.out
    status, shown = run(capsys, "--config", "tiny", "--json", "--inference")
    stages = json.loads(shown.out)["stages"]
    assert status == 0 and stages[-1]["name"] == "detections"
    tensors = {tensor["name"]: tensor["shape"] for tensor in stages[-1]["tensors"]}
    assert tensors["masks"] == [1, 100, 28, 28] and tensors["count"] == [1]


def test_command_errors_are_sentences(capsys):
    for arguments in (["--config", "nothing"], ["--image-size", "big"], ["--set", "model.fpn_channels=0"]):
        status, shown = run(capsys, *arguments)
        assert status == 2 and shown.err.startswith("error: ") and shown.err.count("\n") == 1
