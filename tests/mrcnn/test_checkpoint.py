"""Checkpoints: whole or not at all, readable by anybody, never code."""

import dataclasses
import pickle

import pytest
import torch

from mrcnn.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mrcnn.config import CONFIGS
from mrcnn.errors import CheckpointError
from mrcnn.modeling import MaskRCNN


@pytest.fixture
def checkpoint():
    config = CONFIGS["tiny"]
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=3, fpn_channels=32))
    return Checkpoint(MaskRCNN(config.model), config, ["__background__", "cat", "dog"], [0, 17, 18], 42)


def test_round_trip(checkpoint, tmp_path):
    # Everything that evaluation and prediction need comes back, and no temporary file stays.
    path = tmp_path / "model.pt"
    save_checkpoint(path, checkpoint)
    loaded = load_checkpoint(path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]
    assert (loaded.config, loaded.class_names, loaded.category_ids, loaded.step) == (
        checkpoint.config, checkpoint.class_names, checkpoint.category_ids, 42,
    )  # fmt: skip
    assert not loaded.model.training
    for name, value in checkpoint.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name


def test_a_failed_write_keeps_the_previous_one(checkpoint, tmp_path, monkeypatch):
    # A disk that fills up half-way through must not cost the last good checkpoint.
    path = tmp_path / "model.pt"
    save_checkpoint(path, checkpoint)
    before = path.read_bytes()

    def full_disk(content, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*model\.pt: .*No space left"):
        save_checkpoint(path, checkpoint)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def test_files_that_are_no_checkpoint(checkpoint, tmp_path):
    # Each kind of wrong file gets one sentence; code in a pickle is refused, not run.
    good = tmp_path / "good.pt"
    save_checkpoint(good, checkpoint)
    cases = {
        "text.pt": (b"hello", "cannot be read as a checkpoint"),
        "notes.pt": (b"annotations for the run", "cannot be read as a checkpoint"),
        "empty.pt": (b"", "cannot be read as a checkpoint"),
        "truncated.pt": (good.read_bytes()[:-5000], "cannot be read as a checkpoint"),
        "bomb.pt": (pickle.dumps(Bomb()), "cannot be read as a checkpoint"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path / name)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "absent.pt")
    torch.save({"format": "another"}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="is not a checkpoint of this project"):
        load_checkpoint(tmp_path / "other.pt")


@pytest.mark.parametrize("missing", ["model", "config", "class_names"])
def test_damaged_content(missing, checkpoint, tmp_path):
    path = tmp_path / "model.pt"
    save_checkpoint(path, checkpoint)
    content = torch.load(path, weights_only=True)
    del content[missing]
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=f"damaged checkpoint or one of another version: '{missing}'"):
        load_checkpoint(path)


def test_weights_that_do_not_fit(checkpoint, tmp_path):
    path = tmp_path / "model.pt"
    save_checkpoint(path, checkpoint)
    content = torch.load(path, weights_only=True)
    content["config"]["model"]["fpn_channels"] = 48
    torch.save(content, path)
    with pytest.raises(
        CheckpointError, match=r"damaged checkpoint or one of another version: Error.* loading state_dict"
    ):
        load_checkpoint(path)
