"""TensorBoard shows what metrics.jsonl holds, also of a run that was resumed, and is not needed."""

import json
import sys

import pytest
import torch

from mrcnn.checkpoint import load_checkpoint
from mrcnn.config import load_config
from mrcnn.data.shapes import ShapesDataset
from mrcnn.errors import ConfigError
from mrcnn.run_log import RunLog
from mrcnn.train import train

CPU = torch.device("cpu")


def small(*overrides):
    few = ["model.roi_samples=16", "data.image_size=64", "data.max_size=64", "train.batch_size=2", "train.steps=4"]
    return load_config("tiny", [*few, "train.log_every=1", "train.save_every=2", *overrides])


def scalars(folder):
    """Tag -> [(step, value)] of what TensorBoard shows of `folder`."""
    reason = "needs the package tensorboard, an optional one"
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason=reason)
    events = module.EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_the_metrics_across_a_resume(tmp_path):
    # Stopped a step after its checkpoint: that step is trained again, and must be there once.
    pytest.importorskip("tensorboard", reason="needs the package tensorboard, an optional one")

    def on_step(step, metrics):
        if step == 3:
            raise InterruptedError

    validation = ShapesDataset(2, 64)
    with pytest.raises(InterruptedError):
        train(ShapesDataset(4, 64), small(), tmp_path, CPU, validation, on_step, tensorboard=True)
    checkpoint = load_checkpoint(tmp_path / "checkpoint.pt", training=True)
    train(ShapesDataset(4, 64), small(), tmp_path, CPU, validation, resume=checkpoint, tensorboard=True)

    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps, shown = [line for line in lines if "loss" in line], scalars(tmp_path / "tensorboard")
    names = {"loss/total": "loss", "loss/mask": "loss_mask", "loss/objectness": "loss_objectness", "train/lr": "lr"}
    for tag, name in (names | {"train/images_per_second": "images_per_second"}).items():
        assert [step for step, _ in shown[tag]] == [1, 2, 3, 4], tag
        expected = torch.tensor([line[name] for line in steps])  # TensorBoard keeps single precision
        assert torch.equal(torch.tensor([value for _, value in shown[tag]]), expected), tag
    for kind in ("bbox", "segm"):
        assert shown[f"{kind}/AP"] == [(4, pytest.approx(lines[-1]["evaluation"][kind]["AP"]))]


def test_without_the_package_there_is_one_sentence(tmp_path, monkeypatch):
    # Before anything is trained or written.
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'triton-mask-rcnn\[tensorboard\]'"):
        train(ShapesDataset(2, 64), small(), tmp_path / "run", CPU, tensorboard=True)
    assert not (tmp_path / "run").exists()


def test_counts_go_on_where_the_run_was(tmp_path):
    # Time spent and damaged images are those of the whole run; images a second those since the last line.
    with RunLog(tmp_path) as log:
        log._start -= 1000
        log.count(8, 2)
        first = log.training(5, {"loss_mask": 1.0, "loss_box": 2.0}, 0.1)
        log.count(8, 1)
        log.training(6, {"loss_mask": 1.0, "loss_box": 2.0}, 0.1)
    assert first["loss"] == 3 and first["images_per_second"] > 0
    with RunLog(tmp_path, step=5) as log:
        log.count(8, 1)
        second = log.training(6, {"loss_mask": 1.0, "loss_box": 2.0}, 0.1)
    assert first["seconds"] >= 1000 and second["seconds"] >= first["seconds"]
    assert (first["damaged_images"], second["damaged_images"]) == (2, 3)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [5, 6]
