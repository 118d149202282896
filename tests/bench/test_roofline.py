"""Predicted steps: single layers by hand, whole models by what must hold whatever the model is made of."""

import dataclasses
import json

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from typer.testing import CliRunner

from bench import roofline, roofline_ops
from bench.cli import app
from bench.predict import Prediction
from bench.roofline import STAGES, Rates, as_dict, kernel_seconds, predict, predict_step
from bench.roofline_fusion import ONE_PASS, SEPARATE, make_kernels
from bench.roofline_ops import OwnTime, own_times
from bench.roofline_report import headline, markdown, write_prediction
from bench.roofline_trace import (
    DATA,
    FORWARD,
    OWN,
    PRODUCT,
    WEIGHT,
    trace_ops,
)
from kernels import HAS_TRITON
from mrcnn.config import load_config
from mrcnn.summary import summarize

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="the model's ops are traced as Triton's")
SIZE, BATCH, OBJECTS = (64, 96), 2, 3
SMALL = [
    "model.roi_samples=8",
    "model.post_nms_top_n=[16, 8]",
    "model.pre_nms_top_n=[20, 20]",
    "model.max_detections=4",
]
HALF = 2  # bytes of a bf16


def traced(model, *inputs, backward=True, half=True):
    """What `model` does with `inputs`, functions of no argument that make tensors."""
    with FakeTensorMode():
        module = model()
        tensors = [make() for make in inputs]
        with trace_ops(module) as trace:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
                out = module(*tensors)
            if backward:
                out.backward(torch.empty_like(out))
    return trace


def products(trace):
    return {(op.layer, op.part): op for op in trace.ops if op.kind == PRODUCT}


@pytest.fixture(scope="module")
def config():
    return load_config("tiny", SMALL)


@pytest.fixture(scope="module")
def step(config):
    if not HAS_TRITON:
        pytest.skip("the model's ops are traced as Triton's")
    return predict_step(config, SIZE, BATCH, objects=OBJECTS)


# Times


def test_a_kernels_time_is_the_slower_of_both():
    trace = traced(lambda: nn.Sequential(nn.Conv2d(64, 64, 3, bias=False)), lambda: torch.empty(2, 64, 30, 30))
    (kernel,) = [k for k in make_kernels(trace, ONE_PASS) if k.flops and k.anchor.part == FORWARD]
    flops, size = kernel.flops, kernel.bytes
    bound = kernel_seconds(kernel, Rates(matrix=flops, dram=size / 3.0, kernel_s=0.5), 0.5)
    assert bound == (pytest.approx(3.5), "bytes")
    assert kernel_seconds(kernel, Rates(matrix=flops, dram=size, kernel_s=0.5), 0.25) == (4.5, "compute")
    assert kernel_seconds(kernel, Rates(matrix=flops, dram=size, kernel_s=9.0), 1.0) == (10.0, "overhead")


def test_fp32_products_do_not_get_the_rate_of_bf16():
    trace = traced(lambda: nn.Sequential(nn.Linear(8, 8)), lambda: torch.empty(4, 8), backward=False, half=False)
    (kernel,) = make_kernels(trace, ONE_PASS)
    rates = Rates(matrix=1e30, fp32_matrix=kernel.flops / 2, dram=1e30, kernel_s=0)
    assert kernel_seconds(kernel, rates, 0.5) == (2.0, "compute")


@needs_triton
def test_flops_are_those_of_the_summary():
    # Counted by another mode, without autocast and without splitting backward passes. With eight classes, and eight
    # anchors a cell: else the joined layers are padded in bf16, and the summary sees fp32.
    eight = ["model.num_classes=8", f"model.aspect_ratios={[0.25 * i for i in range(1, 9)]}"]
    config = load_config("tiny", [*SMALL, *eight])
    summary, step = (f(config, SIZE, BATCH, objects=OBJECTS) for f in (summarize, predict_step))
    for way in step.ours.ways.values():
        forward = sum(row.flops for row in way.rows if row.part == FORWARD)
        assert forward == summary.flops
        assert way.flops - forward == summary.backward_flops
    shown = {stage.name.partition(".")[0]: 0 for stage in summary.stages}
    for stage in summary.stages:
        shown[stage.name.partition(".")[0]] += stage.flops
    way = step.ours.ways[ONE_PASS]
    for name, stages in {"fpn": ["FPN"], "rpn": ["RPN"], "mask_head": ["mask head"], "box_head": ["box head"]}.items():
        of_stage = sum(row.flops for row in way.rows if row.stage in stages and row.part == FORWARD)
        assert of_stage == shown[name], name


@needs_triton
def test_detection(config):
    result = predict_step(config, SIZE, BATCH, training=False)
    way = result.ours.ways[ONE_PASS]
    flops = summarize(config, SIZE, BATCH, training=False).flops
    assert flops <= way.flops < 1.001 * flops  # a few channels of padding more
    assert {row.part for row in way.rows} == {FORWARD} and result.ours.saved_bytes == 0 and result.theirs is None
    assert "optimizer" not in {
        row.stage for row in way.rows
    } and "a detection of this project's configuration tiny" in headline(result)


@needs_triton
def test_stages_sum_to_the_step(step):
    for way in step.ours.ways.values():
        assert {row.stage for row in way.rows} == set(STAGES)  # every stage is found, by the names that they have
        for place in range(3):
            assert sum(way.seconds(place, stage) for stage in STAGES) == pytest.approx(way.seconds(place))
            assert sum(way.bounds(place).values()) == pytest.approx(way.seconds(place))
    assert sum(step.ours.saved.values()) == step.ours.saved_bytes > 0


@needs_triton
def test_a_lower_efficiency_takes_longer_and_a_launch_costs_what_it_costs(config, step):
    for way in step.ours.ways.values():
        assert way.seconds(0) < way.seconds(1) < way.seconds(2)
    free = predict_step(config, SIZE, BATCH, objects=OBJECTS, rates=Rates(kernel_s=0.0))
    for fusion, way in step.ours.ways.items():
        added = way.seconds(0) - free.ours.ways[fusion].seconds(0)
        assert added == pytest.approx(way.kernels * Rates().kernel_s)
    slow = predict_step(config, SIZE, BATCH, objects=OBJECTS, rates=Rates(dram=1e12))
    assert all(slow.ours.ways[f].seconds(0) > way.seconds(0) for f, way in step.ours.ways.items())


@needs_triton
def test_break_even_meets_the_target(config):
    rates = Rates(matrix=2e12, target=150.0)  # slow enough for the efficiency to decide
    result = predict_step(config, SIZE, BATCH, objects=OBJECTS, rates=rates)
    for fusion, least in result.ours.break_even.items():
        at = dataclasses.replace(rates, efficiencies=(least, least - 1e-3))
        way = predict_step(config, SIZE, BATCH, objects=OBJECTS, rates=at).ours.ways[fusion]
        assert way.seconds(0) <= BATCH / rates.target < way.seconds(1)
    never = dataclasses.replace(rates, target=1e9)
    assert set(predict_step(config, SIZE, BATCH, rates=never).ours.break_even.values()) == {None}


@needs_triton
def test_frozen_stages_of_the_model():
    config = load_config("tiny", [*SMALL, "model.norm=frozen_bn", "model.frozen_stages=2"])
    rows = predict_step(config, SIZE, BATCH, objects=OBJECTS).ours.ways[SEPARATE].rows
    parts = {stage: {row.part for row in rows if row.stage == stage and row.kind == PRODUCT} for stage in STAGES}
    assert parts["stem"] == parts["C2"] == {FORWARD}
    assert parts["C3"] == parts["C4"] == {FORWARD, DATA, WEIGHT}
    first = [row for row in rows if row.layer == "backbone.stages.1.0.conv1" and row.kind == PRODUCT]
    assert {row.part for row in first} == {FORWARD, WEIGHT}  # nothing before it is trained


@needs_triton
@pytest.mark.parametrize(
    "changes, touched",
    [
        (["train.optimizer=sgd", "train.clip_norm=0.0"], 1 + 5),  # norm: g; p, g, m read, p, m written
        (["train.optimizer=sgd", "train.clip_norm=1.0"], 1 + 6),  # and g written
        (["train.optimizer=adamw", "train.clip_norm=0.0"], 1 + 7),  # a second moment
    ],
)
def test_the_optimizers_bytes(changes, touched):
    config = load_config("tiny", [*SMALL, *changes])
    rows = predict_step(config, SIZE, BATCH).ours.ways[ONE_PASS].rows
    trainable = summarize(config, SIZE, BATCH).trainable
    assert sum(row.bytes for row in rows if row.stage == "optimizer") == 4 * touched * trainable


@needs_triton
def test_the_batch_by_hand(config, step):
    # uint8 images and sizes, objects' boxes, labels, offset and extent, and their number.
    assert step.batch_bytes == BATCH * (3 * 64 * 96 + 16 + OBJECTS * (16 + 8 + 8 + 16) + 4)
    assert step.copy_s == step.batch_bytes / Rates().pcie


# Our ops


@needs_triton
def test_our_ops_take_the_times_they_are_given(config, step):
    own = {"nms_mask": [OwnTime(1.0, 3, 1.0, 0.5)], "roi_align_forward": []}
    given = predict_step(config, SIZE, BATCH, objects=OBJECTS, own=(own, "why"))
    (row,) = [row for row in given.ours.ways[ONE_PASS].rows if row.layer == "nms_mask"]
    assert row.kernels == 3 and row.seconds == [pytest.approx(1 + 3 * Rates().kernel_s)] * 3
    before, after = ({r.layer: r.seconds for r in result.ours.ways[ONE_PASS].rows} for result in (step, given))
    assert before.pop("nms_mask") < after.pop("nms_mask") and before == after
    assert "why" in markdown(given, "command")


def fake_predictions(workloads):
    """As `bench.predict` would, of a kernel in each direction; instructions tell the workloads apart."""
    for workload in workloads:
        number = workload.sizes.rois or 1
        names = {"mask_predictor_loss": ["mask_predictor_features_kernel", "mask_predictor_weight_kernel"]}
        yield Prediction(workload.name, "bf16", "forward", "f", 1000 * number, 0)
        for name in names.get(workload.op, ["b"]):
            yield Prediction(workload.name, "bf16", "backward", name, 2000 * number, 0)


@needs_triton
@pytest.mark.parametrize("training", [True, False])
def test_times_go_to_ops_that_run(training, monkeypatch):
    # By the names and the number of the calls in the trace: an op with another name would get its bytes, unseen.
    monkeypatch.setattr(roofline_ops, "predict", fake_predictions)
    monkeypatch.setattr(roofline_ops, "INTERPRETED", False)
    config = load_config("torchvision", SMALL)
    times, note = own_times(config.model, SIZE, BATCH, OBJECTS, training)
    trace, _, _ = roofline._trace_ours(config, SIZE, BATCH, training, OBJECTS)
    calls = [op.name for op in trace.ops if op.kind == OWN]
    found = {name: calls.count(name) for name in times}
    if not training:
        assert found["nms_mask"] == 2  # the detections' comes second, and has no model
        found["nms_mask"] -= 1
    assert times and {name: len(of) for name, of in times.items()} == found
    assert all(of.kernels >= 1 and of.seconds > 0 for each in times.values() for of in each)
    assert "for want of a model" not in note
    if training:  # one call for both sets of RoIs: 8 and 2 an image
        forward, backward = times["roi_align_forward"][0].issue_s, times["roi_align_backward"][0].issue_s
        assert backward == pytest.approx(2 * forward)


def test_without_machine_code_there_are_bytes(monkeypatch):
    config = load_config("tiny").model
    monkeypatch.setattr(roofline_ops, "INTERPRETED", True)
    assert own_times(config, SIZE, BATCH, OBJECTS, True)[0] == {}
    # What the workloads do not have is said, and the rest is counted all the same.
    monkeypatch.setattr(roofline_ops, "INTERPRETED", False)
    monkeypatch.setattr(roofline_ops, "predict", fake_predictions)
    four = load_config("tiny", ["model.anchor_sizes=[16, 32, 64, 128]"]).model
    times, note = own_times(four, SIZE, BATCH, OBJECTS, True)
    assert "roi_align_forward" in times and "label_grid_anchors" not in times and "five levels" in note


# torchvision's


@pytest.fixture(scope="module")
def both():
    if not HAS_TRITON:
        pytest.skip("the model's ops are traced as Triton's")
    return predict_step(load_config("torchvision", SMALL), SIZE, BATCH, objects=OBJECTS)


def test_torchvisions_layers_are_ours(both):
    # The same products where nothing is joined or padded: another stage of either would show.
    ours, theirs = both.ours.ways[SEPARATE], both.theirs.ways[SEPARATE]
    for stage in ("stem", "C2", "C3", "C4", "C5", "FPN"):
        for part in (FORWARD, DATA, WEIGHT):
            flops = [sum(r.flops for r in way.rows if (r.stage, r.part) == (stage, part)) for way in (ours, theirs)]
            assert flops[0] == flops[1], (stage, part)


def test_torchvisions_norm_is_fp32_and_its_masks_are_all(both):
    ours, theirs = both.ours.ways[SEPARATE], both.theirs.ways[SEPARATE]
    of = [sum(r.bytes for r in way.rows if r.stage == "C2") for way in (ours, theirs)]
    assert of[1] > 1.5 * of[0]
    assert both.theirs.saved_bytes > both.ours.saved_bytes
    logits = [row for row in theirs.rows if "mask_predictor.mask_fcn_logits" in row.layer and row.part == FORWARD]
    # 2 images of 2 slots, 28 x 28 pixels, 256 features, 91 classes
    assert sum(row.flops for row in logits) == 2 * 4 * 28 * 28 * 256 * 91
    assert 91 in {c for row in logits for c in row.odd_channels}


@needs_triton
def test_other_architectures_have_no_torchvision_beside_them(step):
    assert step.theirs is None


# Reports


@needs_triton
def test_the_page_says_what_it_is(both, tmp_path):
    paths = write_prediction(both, tmp_path / "new", "mrcnn-bench step-roofline")
    assert [path.name for path in paths] == ["prediction.json", "README.md"]
    page = paths[1].read_text()
    first, _, second = page.splitlines()[:3]
    assert first.startswith("# PREDICTION, not a measurement") and "nothing here was measured" in second
    assert (
        "torchvision, in part" in page and "backbone.stages.1.0.conv1" in page and "mrcnn-bench step-roofline" in page
    )
    assert all(assumption in page for assumption in both.rates.assumptions) and "790 TFLOP/s" in page
    kept = json.loads(paths[0].read_text())
    assert kept["kind"].startswith("PREDICTION") and kept == json.loads(json.dumps(as_dict(both)))
    way = kept["ours"]["ways"][ONE_PASS]
    assert way["images_per_s"][0] == pytest.approx(BATCH / way["seconds"][0])
    tables = [block.splitlines() for block in page.split("\n\n") if block.startswith("|")]
    assert len(tables) >= 8 and all(len({row.count("|") for row in table}) == 1 for table in tables)


@needs_triton
def test_command(tmp_path):
    small = [word for setting in SMALL for word in ("--set", setting)]
    arguments = ["step-roofline", "--config", "tiny", "--image-size", "64x96", "--batch", "2", "--bytes-only", *small]
    result = CliRunner().invoke(app, [*arguments, "--efficiency", "0.5", "--layers", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "PREDICTION, not a measurement" in result.output and "0.5 = 395 TFLOP/s" in result.output
    assert "mask_head.deconv" in result.output and (tmp_path / "out" / "README.md").is_file()
    (tmp_path / "file").touch()
    for wrong, said in [
        (["--config", "nothing"], "unknown configuration"),
        (["--image-size", "big"], "image-size"),
        (["--out", str(tmp_path / "file")], "cannot be written"),
    ]:
        result = CliRunner().invoke(app, [*arguments, *wrong])
        assert result.exit_code == 2 and said in result.output, wrong


def test_kernels_of_no_model_are_predicted_alone():
    # `predict` takes any trace: what it is used on twice, ours and torchvision's.
    trace = traced(lambda: nn.Sequential(nn.Conv2d(8, 8, 1)), lambda: torch.empty(1, 8, 4, 4))
    found = predict(trace, lambda layer: "C2", Rates(), {}, [], 1)
    assert {row.stage for row in found.ways[SEPARATE].rows} == {"C2"} and set(found.saved) == {"C2"}
