"""A run that was stopped goes on as if it had not been; another run can start from its weights."""

import copy
import dataclasses
import json
import os

import pytest
import torch

from mrcnn import train as training
from mrcnn.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mrcnn.config import load_config
from mrcnn.data.coco import CocoDataset
from mrcnn.data.shapes import ShapesDataset
from mrcnn.errors import CheckpointError, ConfigError, DataError, TrainingStopped
from mrcnn.loader import training_batches
from mrcnn.modeling import MaskRCNN
from mrcnn.optim import Update
from mrcnn.resume import describe_data, initialise, restore, training_state
from mrcnn.train import train

CPU = torch.device("cpu")
TIMES = ("seconds", "images_per_second")


class Stopped(Exception):
    """What ends a run early."""


def stop_at(step):
    def on_step(done, metrics):
        if done == step:
            raise Stopped

    return on_step


def small(*overrides):
    """Six steps of two images from five, so that passes end within the run and within a batch."""
    few = ["model.roi_samples=16", "data.image_size=64", "data.max_size=64", "train.batch_size=2", "train.steps=6"]
    few += ["model.fpn_channels=32", "model.box_channels=32"]
    return load_config("tiny", [*few, "train.save_every=3", "train.log_every=1", "train.warmup_steps=2", *overrides])


def data():
    return ShapesDataset(5, 64)


def lines(folder):
    """metrics.jsonl without the times."""
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in read]


def stopped(folder, config, step, validation=None):
    with pytest.raises(Stopped):
        train(data(), config, folder, CPU, validation, stop_at(step))
    return load_checkpoint(folder / "checkpoint.pt", training=True)


def assert_same(a, b):
    """Two checkpoint files hold the same weights, optimizer state and random state."""
    a, b = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (a, b))
    torch.testing.assert_close(a["model"], b["model"], rtol=0, atol=0)
    torch.testing.assert_close(a["training"]["optimizer"]["state"], b["training"]["optimizer"]["state"], rtol=0, atol=0)
    assert a["training"]["optimizer"]["param_groups"] == b["training"]["optimizer"]["param_groups"]
    assert torch.equal(a["training"]["rng"]["cpu"], b["training"]["rng"]["cpu"]) and a["step"] == b["step"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.workers=0"],
        ["train.workers=2"],  # which sample a worker augments first depends on where it began
        ["train.optimizer=sgd", "train.schedule=multistep", "train.backbone_lr_factor=0.1", "model.norm=bn"],
    ],
    ids=["adamw", "workers", "sgd"],
)
def test_a_resumed_run_is_the_uninterrupted_one(overrides, tmp_path):
    # To the last bit, with augmentation, dropped lines (the run is stopped two steps after it saved) and evaluations.
    config = small("train.eval_every=3", *overrides)
    assert config.data.augment
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(data(), config, whole, CPU, ShapesDataset(2, 64))
    checkpoint = stopped(parts, config, 5, ShapesDataset(2, 64))
    assert checkpoint.step == 3 and [line["step"] for line in lines(parts)][-1] == 5
    train(data(), config, parts, CPU, ShapesDataset(2, 64), resume=checkpoint)
    assert lines(parts) == lines(whole)
    assert_same(parts, whole)


def test_resuming_twice_and_with_other_workers(tmp_path):
    # Stopped after every checkpoint, with another number of loading processes each time.
    train(data(), small(), tmp_path / "whole", CPU)
    parts = tmp_path / "parts"
    checkpoint = stopped(parts, small("train.save_every=2"), 2)
    with pytest.raises(Stopped):
        resumed = small("train.workers=1", "train.save_every=2")
        train(data(), resumed, parts, CPU, on_step=stop_at(4), resume=checkpoint)
    checkpoint = load_checkpoint(parts / "checkpoint.pt", training=True)
    train(data(), small("train.workers=2"), parts, CPU, resume=checkpoint)
    assert lines(parts) == lines(tmp_path / "whole")
    assert_same(parts, tmp_path / "whole")


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_depend_on_the_seed_and_the_step(workers):
    # The first pass over five images ends within the third batch.
    def batches(start, seed=0, workers=0):
        config = small(f"train.seed={seed}", f"train.workers={workers}")
        return list(training_batches(data(), config, start))

    whole = batches(0)
    assert len(whole) == 6 and sorted([i for b in whole for i in b.image_ids][:5]) == [1, 2, 3, 4, 5]
    for start in (1, 3, 6):
        for batch, expected in zip(batches(start, workers=workers), whole[start:], strict=True):
            assert batch.image_ids == expected.image_ids and torch.equal(batch.images, expected.images)
            assert torch.equal(batch.targets.boxes, expected.targets.boxes)
    other = batches(0, seed=1)
    assert [b.image_ids for b in other] != [b.image_ids for b in whole]
    # One image, twice: augmented in two ways.
    one = list(training_batches(ShapesDataset(1, 64), small()))
    assert not all(torch.equal(batch.images, one[0].images) for batch in one)


def test_loading_leaves_the_models_random_numbers_alone():
    # They are drawn in this process where there are no workers, from the generator that augmentation draws from.
    before = torch.get_rng_state()
    next(training_batches(data(), small()))
    assert torch.equal(torch.get_rng_state(), before)


def mask_aps(*values):
    found = iter(values)
    return lambda *_: {kind: {"AP": ap, "AP50": ap} for ap in [next(found)] for kind in ("bbox", "segm")}


def test_the_best_so_far_is_remembered(tmp_path, monkeypatch):
    # Step 2 is the best; what comes after resuming is worse and must not replace it.
    config = small("train.eval_every=2")
    monkeypatch.setattr(training, "evaluate", mask_aps(0.4, 0.2, 0.3))
    checkpoint = stopped(tmp_path, config, 3, ShapesDataset(2, 64))
    train(data(), config, tmp_path, CPU, ShapesDataset(2, 64), resume=checkpoint)
    assert load_checkpoint(tmp_path / "best.pt").step == 2
    assert [line["best_step"] for line in lines(tmp_path) if "evaluation" in line] == [2, 2, 2]


@pytest.mark.parametrize("left", [None, "", "3\n[]\nnull\n{}\n"])
def test_the_best_survives_lost_lines(left, tmp_path, monkeypatch):
    # metrics.jsonl removed, emptied or overwritten: the checkpoint knows the best by itself, also where nothing was
    # saved since, and a worse model does not take its place. With eval_every changed, step 2 is not evaluated again.
    monkeypatch.setattr(training, "evaluate", mask_aps(0.4, 0.3))
    checkpoint = stopped(tmp_path, small("train.eval_every=2", "train.save_every=6"), 3, ShapesDataset(2, 64))
    metrics = tmp_path / "metrics.jsonl"
    metrics.unlink() if left is None else metrics.write_text(left)
    train(data(), small(), tmp_path, CPU, ShapesDataset(2, 64), resume=checkpoint)
    assert load_checkpoint(tmp_path / "best.pt").step == 2
    assert [(line["best_step"], line["best_segm_AP"]) for line in lines(tmp_path) if "evaluation" in line] == [(2, 0.4)]


def test_config_json_is_rewritten_where_it_differs(tmp_path):
    checkpoint = stopped(tmp_path, small(), 3)
    path = tmp_path / "config.json"
    text = path.read_text()
    os.utime(path, (1, 1))
    with pytest.raises(Stopped):
        train(data(), small(), tmp_path, CPU, on_step=stop_at(4), resume=checkpoint)
    assert path.stat().st_mtime == 1
    checkpoint = load_checkpoint(tmp_path / "checkpoint.pt", training=True)
    train(data(), small("train.workers=1"), tmp_path, CPU, resume=checkpoint)
    assert path.read_text() != text and json.loads(path.read_text())["train"]["workers"] == 1


def test_an_evaluation_that_was_cut_off_is_made_up_for(tmp_path, monkeypatch):
    # Killed while evaluating the last step: nothing is left to train, and the AP is still missing.
    def killed(*_):
        raise Stopped

    monkeypatch.setattr(training, "evaluate", killed)
    with pytest.raises(Stopped):
        train(data(), small(), tmp_path, CPU, ShapesDataset(2, 64))
    monkeypatch.setattr(training, "evaluate", mask_aps(0.4))
    seen = []
    for _ in range(2):  # the second time there is nothing to do at all
        checkpoint = load_checkpoint(tmp_path / "checkpoint.pt", training=True)
        on_step = lambda step, metrics: seen.append((step, metrics["segm_AP"]))
        train(data(), small(), tmp_path, CPU, ShapesDataset(2, 64), on_step, resume=checkpoint)
    assert seen == [(6, 0.4)] and load_checkpoint(tmp_path / "best.pt").step == 6


def test_a_line_cut_off_is_dropped(tmp_path):
    # A power cut in the middle of a write.
    checkpoint = stopped(tmp_path, small(), 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    train(data(), small(), tmp_path, CPU, resume=checkpoint)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_other_steps_go_with_a_constant_schedule_alone(tmp_path):
    # There, three steps and three more are six; elsewhere the learning rates would have been others from the start.
    constant = ["train.schedule=constant"]
    train(data(), small(*constant), tmp_path / "whole", CPU)
    train(data(), small(*constant, "train.steps=3"), tmp_path / "parts", CPU)
    checkpoint = load_checkpoint(tmp_path / "parts" / "checkpoint.pt", training=True)
    with pytest.raises(ConfigError, match=r"train\.steps 2 is below the 3 steps that the run has done"):
        train(data(), small(*constant, "train.steps=2"), tmp_path / "parts", CPU, resume=checkpoint)
    train(data(), small(*constant), tmp_path / "parts", CPU, resume=checkpoint)
    assert_same(tmp_path / "parts", tmp_path / "whole")


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    """The folder of a run stopped half-way."""
    folder = tmp_path_factory.mktemp("run")
    stopped(folder, small(), 3)
    return folder


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr=0.5", r"train\.lr is 0.001 in the run to resume and cannot become 0.5: only train.workers, "),
        ("train.steps=9", r"train\.steps is 6 .* cannot become 9: the cosine schedule depends on it"),
        ("train.seed=1", r"train\.seed is 0"),  # the order of the data, and how it is augmented
        ("train.batch_size=3", r"train\.batch_size is 2"),
        ("train.weight_decay=0.5", r"train\.weight_decay is 0.01"),
        ("model.roi_samples=32", r"model\.roi_samples is 16"),
        ("model.frozen_stages=1", r"model\.frozen_stages is 0"),
        ("data.augment=false", r"data\.augment is True .* cannot become False"),
    ],
)
def test_a_resumed_run_keeps_its_configuration(override, message, three_steps):
    checkpoint = load_checkpoint(three_steps / "checkpoint.pt", training=True)
    before = {path.name: path.read_bytes() for path in three_steps.iterdir()}
    with pytest.raises(ConfigError, match=message):
        train(data(), small(override), three_steps, CPU, resume=checkpoint)
    assert {path.name: path.read_bytes() for path in three_steps.iterdir()} == before


def test_a_resumed_run_keeps_its_data(three_steps):
    # As many images, or the order is another one; the same classes, or the labels are.
    checkpoint = load_checkpoint(three_steps / "checkpoint.pt", training=True)
    with pytest.raises(DataError, match="has 5 training images, the data has 6"):
        train(ShapesDataset(6, 64), small(), three_steps, CPU, resume=checkpoint)
    other = data()
    other.class_names = ["__background__", "circle", "square", "star"]
    with pytest.raises(DataError, match=r"has the categories .*triangle.*, the data has .*star"):
        train(other, small(), three_steps, CPU, resume=checkpoint)


@pytest.mark.parametrize("other", [{"seed": 1}, {"crowded": True}, {"image_size": 96}])
def test_as_many_other_pictures_are_refused(other, three_steps):
    checkpoint = load_checkpoint(three_steps / "checkpoint.pt", training=True)
    before = {path.name: path.read_bytes() for path in three_steps.iterdir()}
    with pytest.raises(DataError, match="as many images as that of the run to resume, but others"):
        train(ShapesDataset(5, **{"image_size": 64} | other), small(), three_steps, CPU, resume=checkpoint)
    assert {path.name: path.read_bytes() for path in three_steps.iterdir()} == before


def test_coco_data_is_known_by_its_annotations(tmp_path):
    # Wherever the files lie; another name, size, id or box of any one entry makes it other data.
    def digest(folder, change=lambda truth: None):
        truth = ShapesDataset(3, 64).ground_truth()
        change(truth)
        (tmp_path / "truth.json").write_text(json.dumps(truth))
        return describe_data(CocoDataset(folder, tmp_path / "truth.json", require_files=False))["data"]

    changes = [
        lambda truth: truth["images"][2].update(file_name="other.png"),
        lambda truth: truth["annotations"].pop(),
        lambda truth: truth["annotations"][0]["bbox"].__setitem__(0, truth["annotations"][0]["bbox"][0] + 1),
        lambda truth: truth["annotations"][0].update(category_id=truth["annotations"][0]["category_id"] % 3 + 1),
    ]
    assert digest("here") == digest("there") and len({digest("here", change) for change in changes}) == len(changes)
    assert digest("here") not in {digest("here", change) for change in changes}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("layouts", [(0, 1), (1, 0)], ids=["to channels_last", "from channels_last"])
def test_optimizer_state_follows_the_layout_of_its_parameters(layouts, optimizer):
    # A GPU trains in channels_last, a CPU does not: momenta of one beside weights of the other would be walked in
    # another order by a fused step. The steps after are those of a run that never changed.
    config = small(f"train.optimizer={optimizer}").train
    memory = (torch.contiguous_format, torch.channels_last)
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3), torch.nn.Conv2d(6, 5, 1))
    saved = copy.deepcopy(model).to(memory_format=memory[layouts[0]])

    def steps(model, update, seed):
        torch.manual_seed(seed)
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape))
            update()

    before = Update(saved, config)
    steps(saved, before, 0)
    state = copy.deepcopy(training_state(before, CPU))
    resumed = copy.deepcopy(saved).to(memory_format=memory[layouts[1]])
    after = Update(resumed, config, start=3)
    restore(state, after, CPU)
    for parameter in resumed.parameters():
        tensors = [v for v in after.optimizer.state[parameter].values() if v.shape == parameter.shape]
        assert tensors and all(v.stride() == parameter.stride() for v in tensors)
    steps(saved, before, 1)
    steps(resumed, after, 1)
    for name, value in saved.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=1e-6, atol=1e-7, msg=name)


def test_a_run_that_is_asked_to_stop_saves_itself(tmp_path, monkeypatch):
    # Between checkpoints, and in a step of an evaluation: that one is made up for, not waited for.
    monkeypatch.setattr(training, "evaluate", mask_aps(0.1, 0.2, 0.3))
    config, whole, parts = small("train.eval_every=2"), tmp_path / "whole", tmp_path / "parts"
    validation = ShapesDataset(2, 64)
    train(data(), config, whole, CPU, validation)
    monkeypatch.setattr(training, "evaluate", mask_aps(0.1, 0.2, 0.3))
    checkpoint = None
    for step in (1, 2):
        with pytest.raises(TrainingStopped, match=rf"stopped after step {step} of 6: --resume goes on from .*parts/ch"):
            train(data(), config, parts, CPU, validation, resume=checkpoint, should_stop=lambda: True)
        checkpoint = load_checkpoint(parts / "checkpoint.pt", training=True)
        assert checkpoint.step == step and not (parts / "best.pt").exists()
    train(data(), config, parts, CPU, validation, resume=checkpoint)
    assert lines(parts) == lines(whole)
    assert_same(parts, whole)


def test_a_checkpoint_of_weights_alone_cannot_be_resumed(three_steps):
    # As best.pt is, and checkpoints that were written before they held more.
    checkpoint = load_checkpoint(three_steps / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"holds weights alone .* --init-from starts a new run from it"):
        train(data(), small(), three_steps, CPU, resume=checkpoint)


def test_a_damaged_training_state_is_one_sentence(three_steps):
    checkpoint = load_checkpoint(three_steps / "checkpoint.pt", training=True)
    del checkpoint.training["optimizer"]["param_groups"][0]
    with pytest.raises(CheckpointError, match="training state is damaged or of another version"):
        train(data(), small(), three_steps, CPU, resume=checkpoint)


def checkpoint_of(classes=("circle", "square", "triangle"), *overrides):
    """An untrained checkpoint whose every tensor differs from a fresh model's."""
    config = small(*overrides)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=len(classes) + 1))
    model = MaskRCNN(config.model)
    for parameter in model.parameters():
        parameter.data.add_(1e-3)
    return Checkpoint(model, config, ["__background__", *classes], list(range(len(classes) + 1)), 7)


def same_tensors(model, other):
    """The names of the tensors that are the same in both."""
    other = other.state_dict()
    return {k for k, v in model.state_dict().items() if k in other and torch.equal(v, other[k])}


def test_initialising_from_the_same_classes_takes_all():
    # Heads included: a run that goes on with other data or another schedule.
    checkpoint = checkpoint_of()
    model = MaskRCNN(checkpoint.config.model)
    notes = initialise(model, checkpoint)
    assert same_tensors(model, checkpoint.model) == model.state_dict().keys()
    count = len(model.state_dict())
    assert notes == [f"took {count} of the model's {count} tensors from the checkpoint of step 7"]


def test_initialising_from_other_classes_leaves_what_depends_on_them():
    # Class logits, deltas and mask logits, weight and bias; they stay as they were drawn.
    checkpoint = checkpoint_of(["cat", "dog"])
    model = MaskRCNN(checkpoint_of().config.model)
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    notes = initialise(model, checkpoint)
    left = fresh.keys() - same_tensors(model, checkpoint.model)
    assert len(left) == 6 and {name.split(".")[0] for name in left} == {"box_head", "mask_head"}
    assert all(torch.equal(model.state_dict()[name], fresh[name]) for name in left)
    assert len(notes) == 7 and all(sum(f" {name} " in note for note in notes) == 1 for name in left)
    assert any("(4,), (3,) in the checkpoint" in note for note in notes)


def test_initialising_from_another_architecture_takes_what_fits():
    # A pyramid of another width, another head: the backbone is taken, the rest reported, on either side.
    checkpoint = checkpoint_of((), "model.fpn_channels=64", "model.mask_layers=5")
    checkpoint_channels = checkpoint.model.state_dict()
    model = MaskRCNN(small("model.mask_layers=3").model)
    notes = initialise(model, checkpoint)
    backbone = {name for name in model.state_dict() if name.startswith("backbone.")}
    assert backbone <= same_tensors(model, checkpoint.model)
    assert any(note.startswith("  fresh: fpn.") and "in the checkpoint" in note for note in notes)
    unused = checkpoint_channels.keys() - model.state_dict().keys()
    assert unused and sum(note.startswith("  unused: mask_head.") for note in notes) == len(unused)


def test_initialising_from_nothing_that_fits_is_an_error():
    # A model of one parameter that the checkpoint has in another shape.
    model = torch.nn.Module()
    model.fpn = torch.nn.Linear(3, 3)
    with pytest.raises(ConfigError, match="nothing in the checkpoint to start from fits"):
        initialise(model, checkpoint_of())


def test_a_run_starts_from_a_checkpoint(tmp_path, monkeypatch):
    # Instead of the backbone's weights, which are not fetched; a learning rate of 0 keeps them.
    def fetch(backbone, weights):
        raise AssertionError("fetched")

    monkeypatch.setattr(training, "load_pretrained", fetch)
    overrides = ["model.weights=DEFAULT", "model.norm=frozen_bn", "train.lr=0"]
    checkpoint = checkpoint_of(["cat", "dog", "bird"], *overrides)
    notes = []
    config = small(*overrides, "train.steps=1")
    trained = train(data(), config, tmp_path / "run", CPU, init_from=checkpoint, on_note=notes.append)
    assert trained.step == 1 and trained.class_names[1:] == ["circle", "square", "triangle"]
    assert same_tensors(trained.model, checkpoint.model) == trained.model.state_dict().keys()
    assert "they were trained on cat, dog, bird" in notes[-1]  # as many classes, but not the same
    save_checkpoint(tmp_path / "weights.pt", checkpoint)
    with pytest.raises(CheckpointError, match="holds weights alone"):
        resumed = load_checkpoint(tmp_path / "weights.pt", training=True)
        train(data(), config, tmp_path / "run", CPU, resume=resumed)
