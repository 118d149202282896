"""The training loop's parts: each would be missed silently if it did nothing."""

import dataclasses
import errno
import json
import tempfile
from contextlib import nullcontext

import pytest
import torch

from mrcnn import train as training
from mrcnn.checkpoint import load_checkpoint
from mrcnn.config import CONFIGS, load_config
from mrcnn.data.augment import build_transform
from mrcnn.data.collate import Collate
from mrcnn.data.shapes import ShapesDataset
from mrcnn.errors import ConfigError, DataError, TrainingStopped
from mrcnn.inference import evaluate
from mrcnn.modeling import MaskRCNN
from mrcnn.optim import build_optimizer, learning_rate_factor
from mrcnn.train import check_output, train

CPU = torch.device("cpu")


def small(*overrides):
    """A configuration that takes a second."""
    few = ["model.roi_samples=16", "data.image_size=64", "data.max_size=64", "train.batch_size=2", "train.steps=3"]
    return load_config("tiny", [*few, *overrides])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("multistep", [1, 1, 0.1, 0.01]), ("cosine", [1, 0.75, 0.25, 0.067]), ("constant", [1, 1, 1, 1])],
)
def test_schedules(schedule, expected):
    # Warm-up rises in a line; then the factor at the start, at 1/3, 2/3 and near the end.
    config = dataclasses.replace(CONFIGS["tiny"].train, schedule=schedule, steps=90000, warmup_steps=0)
    steps = [0, 30000, 60000, 75000 if schedule == "cosine" else 80001]
    assert [round(learning_rate_factor(s, config), 3) for s in steps] == expected
    warm = dataclasses.replace(config, warmup_steps=99)
    assert [learning_rate_factor(s, warm) for s in (0, 49, 98)] == [0.01, 0.5, 0.99]


def test_milestones_and_gamma_are_the_configurations():
    # The step that a milestone names is the first one with the smaller rate; none is the constant schedule.
    config = dataclasses.replace(CONFIGS["tiny"].train, schedule="multistep", steps=10, warmup_steps=0)
    halved = dataclasses.replace(config, milestones=(0.3, 0.5, 0.9), lr_gamma=0.5)
    assert [learning_rate_factor(s, halved) for s in (2, 3, 4, 5, 8, 9)] == [1, 0.5, 0.5, 0.25, 0.25, 0.125]
    assert learning_rate_factor(9, dataclasses.replace(config, milestones=())) == 1


# Every kind of normalisation, and none; frozen layers, which no optimizer may move.
MODELS = {
    "gn": ["model.norm=gn", "model.fpn_norm=gn", "model.head_norm=gn"],
    "bn": ["model.norm=bn", "model.fpn_norm=bn", "model.head_norm=sync_bn"],
    "frozen": ["model.norm=frozen_bn", "model.frozen_stages=2"],
    "all frozen": ["model.frozen_stages=5"],
}


@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS)
def test_every_trainable_parameter_is_in_one_group(overrides):
    model = MaskRCNN(small(*overrides).model)
    grouped = [id(p) for group in build_optimizer(model, small().train).param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_groups_have_their_decay_and_learning_rate(optimizer):
    # Values that are all different, so that none can stand for another; no group is empty.
    keys = {"weight_decay": 0.1, "norm_weight_decay": 0.2, "bias_weight_decay": 0.3, "backbone_lr_factor": 0.5}
    config = small(f"train.optimizer={optimizer}", "train.lr=2", *(f"train.{k}={v}" for k, v in keys.items()))
    model = MaskRCNN(config.model)
    groups = {group["name"]: group for group in build_optimizer(model, config.train).param_groups}
    expected = {
        "weights": (2.0, 0.1), "biases": (2.0, 0.3),  # tiny's pyramid and heads are not normalised
        "backbone weights": (1.0, 0.1), "backbone norms": (1.0, 0.2),  # a ResNet's convolutions have no biases
    }  # fmt: skip
    assert {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()} == expected
    assert {p.ndim for p in groups["backbone norms"]["params"]} == {p.ndim for p in groups["biases"]["params"]} == {1}
    backbone = [p for name, group in groups.items() if "backbone" in name for p in group["params"]]
    assert {id(p) for p in backbone} == {id(p) for p in model.backbone.parameters()}


def test_checkpoints_and_evaluations_come_when_asked_for(tmp_path, monkeypatch):
    # Every second step an evaluation, every third a checkpoint; both at the end. A new best is written into it.
    saved = []

    def save(path, checkpoint):
        if path.name == "checkpoint.pt":
            saved.append(checkpoint.step)

    monkeypatch.setattr(training, "save_checkpoint", save)
    monkeypatch.setattr(training, "evaluate", evaluations(0.1, 0.0, 0.2, 0.0))
    config = small("train.steps=7", "train.eval_every=2", "train.save_every=3", "train.log_every=5")
    train(ShapesDataset(4, 64), config, tmp_path / "run", CPU, ShapesDataset(2, 64))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert saved == [2, 2, 3, 4, 6, 6, 7]
    assert [line["step"] for line in lines if "evaluation" in line] == [2, 4, 6, 7]
    assert [line["step"] for line in lines if "loss" in line] == [2, 3, 4, 5, 6, 7]


def evaluations(*mask_aps):
    """A stand-in for `evaluate` that finds these mask APs, one after another; the box AP falls, and must not count."""
    found = iter(enumerate(mask_aps))

    def evaluate(*_):
        number, ap = next(found)
        return {"bbox": {"AP": 0.9 - number / 10, "AP50": 0.9}, "segm": {"AP": ap, "AP50": ap}}

    return evaluate


@pytest.mark.parametrize(
    ("aps", "best"),
    [
        ((0.1, 0.3, 0.2, 0.3), [1, 2, 2, 2]),  # the later of two equals does not replace the earlier
        ((0.0, 0.0, 0.1, 0.0), [1, 1, 3, 3]),  # zero is a result
        ((-1.0, -1.0, -1.0, -1.0), [None] * 4),  # COCO's word for no ground truth is none
    ],
)
def test_the_best_checkpoint_is_kept(aps, best, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "evaluate", evaluations(*aps))
    seen = []
    config = small("train.steps=4", "train.eval_every=1")
    on_step = lambda step, metrics: seen.append(metrics.get("best_step"))
    train(ShapesDataset(4, 64), config, tmp_path, CPU, ShapesDataset(2, 64), on_step)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert seen == best and [line.get("best_step") for line in lines if "evaluation" in line] == best
    path = tmp_path / "best.pt"
    assert load_checkpoint(path).step == best[-1] if best[-1] else not path.exists()


def test_checkpoints_hold_what_they_are_for(tmp_path):
    # checkpoint.pt can go on; best.pt is for using, without the optimizer's two numbers a weight.
    config = small("train.steps=1", "model.norm=bn")
    train(ShapesDataset(2, 64), config, tmp_path, CPU, ShapesDataset(2, 64))
    assert load_checkpoint(tmp_path / "checkpoint.pt", training=True).training.keys() >= {"optimizer", "rng"}
    assert load_checkpoint(tmp_path / "checkpoint.pt").training is None  # an evaluation does not carry it
    assert load_checkpoint(tmp_path / "best.pt", training=True).training is None
    assert (tmp_path / "best.pt").stat().st_size < 0.4 * (tmp_path / "checkpoint.pt").stat().st_size


def test_weights_are_fetched_before_anything_is_written(tmp_path, monkeypatch):
    # Into the backbone; a machine without a network gets the error at once, and an empty disk. Loading a checkpoint
    # of such a run fetches nothing.
    asked = []

    def fetch(backbone, weights):
        asked.append((type(backbone).__name__, weights, (tmp_path / "run").exists()))
        if len(asked) > 1:
            raise ConfigError("no network")

    monkeypatch.setattr(training, "load_pretrained", fetch)
    config = small("model.weights=DEFAULT", "model.norm=frozen_bn", "train.steps=1")
    train(ShapesDataset(2, 64), config, tmp_path / "run", CPU)
    assert asked == [("ResNet", "DEFAULT", False)]
    loaded = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert loaded.config.model.weights == "DEFAULT" and len(asked) == 1
    with pytest.raises(ConfigError, match="no network"):
        train(ShapesDataset(2, 64), config, tmp_path / "other", CPU)
    assert not (tmp_path / "other").exists()


def test_evaluation_leaves_training_as_it_was(tmp_path):
    # The same losses with and without it: mode, transform and random numbers are untouched. One data set serves both.
    def losses(eval_every):
        output = tmp_path / str(eval_every)
        dataset = ShapesDataset(4, 64)
        train(dataset, small(f"train.eval_every={eval_every}", "train.log_every=1"), output, CPU, dataset)
        return [json.loads(line).get("loss") for line in (output / "metrics.jsonl").read_text().splitlines()]

    assert [x for x in losses(1) if x] == [x for x in losses(0) if x]


def test_evaluation_runs_in_evaluation_mode(monkeypatch):
    # BatchNorm's running statistics must be used, and not moved.
    modes = []
    config = small("model.norm=bn")
    model = MaskRCNN(dataclasses.replace(config.model, num_classes=4)).train()
    model.register_forward_pre_hook(lambda module, inputs: modes.append(module.training))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, ShapesDataset(2, 64), config)
    assert modes == [False] and model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("every", ["train.log_every=1", "train.eval_every=1"])
def test_a_run_that_diverges_says_so_and_keeps_the_checkpoint(every, tmp_path):
    # lr 1e30: NaN after a step or two, through every stage of the model; the checkpoint there is stays finite.
    config = small(
        every,
        "train.skip_limit=1",
        "train.optimizer=sgd",
        "train.lr=1e30",
        "train.warmup_steps=0",
        "train.clip_norm=0.0",
    )
    with pytest.raises(FloatingPointError, match="not finite"):
        train(ShapesDataset(4, 64), config, tmp_path / "run", CPU)
    path = tmp_path / "run" / "checkpoint.pt"
    assert not path.exists() or all(v.isfinite().all() for v in torch.load(path, weights_only=True)["model"].values())


@pytest.fixture
def bad_steps(monkeypatch):
    """Numbers of the steps, from 1, whose gradient is not finite."""
    numbers: set[int] = set()
    plain, count = MaskRCNN.forward, 0

    def forward(self, images, sizes, targets=None):
        nonlocal count
        losses = plain(self, images, sizes, targets)
        count += 1
        return {name: loss * float("nan") for name, loss in losses.items()} if count in numbers else losses

    monkeypatch.setattr(MaskRCNN, "forward", forward)
    return numbers


def metrics_of(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_a_step_that_is_not_finite_is_left_out(bad_steps, tmp_path):
    # Counted; its losses are null, which JSON has, where it has no NaN; no checkpoint is written after it.
    bad_steps |= {2, 4}
    config = small("train.steps=5", "train.log_every=1", "train.save_every=2")
    trained = train(ShapesDataset(4, 64), config, tmp_path / "run", CPU)
    lines = metrics_of(tmp_path / "run")
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1, 2, 2]
    assert [line["loss"] is None for line in lines] == [False, True, False, True, False]
    assert all(p.isfinite().all() for p in trained.model.parameters())


@pytest.mark.parametrize("log_every", [1, 20])
@pytest.mark.parametrize(("bad", "saved"), [({3, 4, 5}, 2), ({4, 5, 6}, 2), ({5, 6, 7}, 4), ({3, 4, 5, 7, 8}, 2)])
def test_too_many_in_a_row_end_the_run(bad, saved, log_every, bad_steps, tmp_path):
    # At the limit, which is looked at where losses are read, also where a good step came in between; the checkpoint is
    # the last one of a good step.
    bad_steps |= bad
    every = [f"train.log_every={log_every}", "train.save_every=2" if log_every == 1 else "train.save_every=100"]
    config = small("train.steps=20", "train.skip_limit=3", *every)
    with pytest.raises(FloatingPointError, match=r"not finite in 3 steps in a row, up to step .*a lower --lr"):
        train(ShapesDataset(4, 64), config, tmp_path / "run", CPU)
    path = tmp_path / "run" / "checkpoint.pt"
    assert load_checkpoint(path).step == saved if log_every == 1 else not path.exists()


def test_a_checkpoint_waits_for_a_good_step(bad_steps, tmp_path, monkeypatch):
    # Due in step 2, whose gradient is not finite, as in step 3: written after step 4, and then again as usual.
    saved = []
    monkeypatch.setattr(training, "save_checkpoint", lambda path, checkpoint: saved.append(checkpoint.step))
    bad_steps |= {2, 3}
    train(ShapesDataset(4, 64), small("train.steps=9", "train.save_every=2"), tmp_path / "run", CPU)
    assert saved == [4, 6, 8, 9]


@pytest.mark.parametrize("stop", [False, True])
def test_a_run_may_end_in_a_step_that_was_left_out(stop, bad_steps, tmp_path):
    # Its weights are those of the step before: saved.
    bad_steps |= {3}
    steps = iter([False, False, True])
    stopped = pytest.raises(TrainingStopped, match="after step 3") if stop else nullcontext()
    options = {"should_stop": lambda: next(steps)} if stop else {}
    with stopped:
        train(ShapesDataset(4, 64), small(f"train.steps={4 if stop else 3}"), tmp_path / "run", CPU, **options)
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt").step == 3
    assert metrics_of(tmp_path / "run")[-1]["skipped_steps"] == 1


@pytest.mark.parametrize("norm", ["bn", "sync_bn"])
def test_a_step_that_is_left_out_leaves_statistics_alone(norm, tmp_path, monkeypatch):
    # The forward pass has moved the running statistics, to NaN: they are put back, or no image would ever be found
    # anything in again, though the weights are fine.
    plain, count = MaskRCNN.forward, 0

    def forward(self, images, sizes, targets=None):
        nonlocal count
        count += targets is not None
        if count == 2 and targets is not None:
            images = torch.full(images.shape, float("inf"))
        return plain(self, images, sizes, targets)

    monkeypatch.setattr(MaskRCNN, "forward", forward)
    config = small(f"model.norm={norm}", "train.log_every=1")
    trained = train(ShapesDataset(4, 64), config, tmp_path / "run", CPU)
    assert [line["skipped_steps"] for line in metrics_of(tmp_path / "run")] == [0, 1, 1]
    state = trained.model.state_dict()
    assert all(value.isfinite().all() for value in state.values())
    assert not torch.equal(state["backbone.stem.1.running_mean"], torch.zeros(64))


def test_what_a_cpu_cannot_do_is_said_and_left_out(tmp_path):
    # The run is the same one, to the last bit.
    notes, weights = [], []
    for number, changes in enumerate(([], ["train.fused_convs=true", "train.cuda_graphs=true"])):
        config = small("data.group_by_aspect=true", *changes)
        trained = train(ShapesDataset(4, 64), config, tmp_path / str(number), CPU, on_note=notes.append)
        weights.append(list(trained.model.parameters()))
    assert notes == [
        "not fused: cuDNN's fused convolutions need a GPU",
        "no CUDA graphs: CUDA graphs need a GPU",
    ]
    assert all(map(torch.equal, *weights))


def test_a_model_of_nan_detects_nothing():
    # Its boxes must not reach an index or a native op that cannot take them.
    model = MaskRCNN(small().model).eval()
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    with torch.no_grad():
        found = model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.tensor([[64, 64]]))
    assert found.count.tolist() == [0] and not found.boxes.any() and not found.masks.any()


def test_padding_is_zero_after_normalisation():
    # As in torchvision, which normalises before it pads; the mean colour is not black.
    images = torch.full((2, 3, 32, 64), 200, dtype=torch.uint8)
    out = MaskRCNN(small().model).normalize(images, torch.tensor([[32, 40], [20, 64]]))
    assert (out[0, :, :, 40:] == 0).all() and (out[1, :, 20:] == 0).all()
    expected = (200 / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(out[0, :, 5, 5], expected)
    torch.testing.assert_close(out[1, :, 19, 63], expected)


@pytest.mark.parametrize("size", [(600, 1), (1, 600), (1, 1)])
def test_images_of_any_shape_train(size):
    # A side that resizing would round to 0 pixels.
    height, width = size
    target = {
        "boxes": torch.tensor([[0.0, 0.0, width, height]]), "labels": torch.tensor([1]),
        "masks": torch.ones(1, height, width, dtype=torch.uint8), "image_id": 0, "original_size": size,
    }  # fmt: skip
    from torchvision import tv_tensors

    target["boxes"] = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)
    target["masks"] = tv_tensors.Mask(target["masks"])
    image = tv_tensors.Image(torch.full((3, height, width), 90, dtype=torch.uint8))
    batch = Collate(2)([build_transform(True, 64, 128)(image, target)])
    assert min(batch.sizes[0]) >= 1 and all(side % 32 == 0 for side in batch.images.shape[-2:])
    losses = MaskRCNN(small().model).train()(batch.images, batch.sizes, batch.targets)
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("name", ["checkpoint.pt", "best.pt"])
def test_a_folder_with_a_checkpoint_is_not_overwritten(name, tmp_path):
    (tmp_path / name).write_bytes(b"hours of work")
    with pytest.raises(ConfigError, match=f"already holds a {name}: --resume goes on with that run"):
        train(ShapesDataset(2, 64), small(), tmp_path, CPU)
    assert (tmp_path / name).read_bytes() == b"hours of work"


@pytest.mark.parametrize("folder", ["there", "there/new/run"])
def test_a_folder_that_cannot_be_written_is_found_at_once(folder, tmp_path, monkeypatch):
    # A read-only disk, below which the folder may have to be made; nothing is left there by looking.
    (tmp_path / "there").mkdir()
    check_output(tmp_path / folder)
    assert not list((tmp_path / "there").iterdir())
    asked = []

    def refuse(dir):
        asked.append(dir)
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(ConfigError, match=r"--output .* cannot be written: Read-only file system"):
        check_output(tmp_path / folder)
    assert asked == [tmp_path / "there"]


def test_a_file_in_the_way_of_the_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written: Not a directory"):
        check_output(tmp_path / "file" / "run")


def test_no_images():
    with pytest.raises(DataError, match="the training set has no images"):
        train([], small(), None, CPU)
