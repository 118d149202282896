"""The training loop's parts: each would be missed silently if it did nothing."""

import dataclasses
import json

import pytest
import torch

from mrcnn import train as training
from mrcnn.config import CONFIGS, load_config
from mrcnn.data.augment import build_transform
from mrcnn.data.collate import Collate
from mrcnn.data.shapes import ShapesDataset
from mrcnn.errors import ConfigError, DataError
from mrcnn.inference import evaluate
from mrcnn.modeling import MaskRCNN
from mrcnn.train import build_optimizer, learning_rate_factor, train, training_step

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


def test_adamw_decays_weights_only():
    model = MaskRCNN(CONFIGS["tiny"].model)
    decayed, rest = build_optimizer(model, CONFIGS["tiny"].train).param_groups
    assert decayed["weight_decay"] == 1e-2 and rest["weight_decay"] == 0
    assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim == 1 for p in rest["params"])
    assert len(decayed["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_clipping_limits_the_step():
    # Plain SGD with lr 1: the weights move by the gradient, whose norm is the limit.
    dataset = ShapesDataset(2, 64)
    batch = Collate(dataset.max_objects)([dataset[0], dataset[1]])
    model = MaskRCNN(dataclasses.replace(small().model, num_classes=4)).train()
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    training_step(model, batch, torch.optim.SGD(model.parameters(), 1.0), clip_norm=0.5)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close((after - before).norm().item(), 0.5, rtol=1e-3, atol=0)


def test_checkpoints_and_evaluations_come_when_asked_for(tmp_path, monkeypatch):
    # Every second step an evaluation, every third a checkpoint; both at the end.
    saved = []
    monkeypatch.setattr(training, "save_checkpoint", lambda path, checkpoint: saved.append(checkpoint.step))
    config = small("train.steps=7", "train.eval_every=2", "train.save_every=3", "train.log_every=5")
    train(ShapesDataset(4, 64), config, tmp_path / "run", CPU, ShapesDataset(2, 64))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert saved == [2, 3, 4, 6, 7]
    assert [line["step"] for line in lines if "evaluation" in line] == [2, 4, 6, 7]
    assert [line["step"] for line in lines if "loss" in line] == [2, 3, 4, 5, 6, 7]


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
    config = small(every, "train.optimizer=sgd", "train.lr=1e30", "train.warmup_steps=0", "train.clip_norm=0.0")
    with pytest.raises(FloatingPointError, match="not finite"):
        train(ShapesDataset(4, 64), config, tmp_path / "run", CPU)
    path = tmp_path / "run" / "checkpoint.pt"
    assert not path.exists() or all(v.isfinite().all() for v in torch.load(path, weights_only=True)["model"].values())


def test_a_model_of_nan_detects_nothing():
    # Its boxes must not reach an index or a native op that cannot take them.
    model = MaskRCNN(small().model).eval()
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    with torch.no_grad():
        (found,) = model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.tensor([[64, 64]]))
    assert len(found.boxes) == 0


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


def test_a_folder_with_a_checkpoint_is_not_overwritten(tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"hours of work")
    with pytest.raises(ConfigError, match="already holds a checkpoint"):
        train(ShapesDataset(2, 64), small(), tmp_path, CPU)
    assert (tmp_path / "checkpoint.pt").read_bytes() == b"hours of work"


def test_no_images():
    with pytest.raises(DataError, match="the training set has no images"):
        train([], small(), None, CPU)
