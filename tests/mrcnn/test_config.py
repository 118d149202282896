"""Configurations: names, files, overrides, and an answer to every mistake."""

import dataclasses
import json

import pytest

from mrcnn.config import CONFIGS, config_from_dict, load_config, validate
from mrcnn.errors import ConfigError


def test_overrides_have_the_fields_types():
    # TOML values: numbers, booleans, arrays (tuples here) and bare words; an int is a fine float.
    config = load_config(
        "tiny",
        ["model.backbone=resnet50", "train.lr=1", "data.augment=false", "model.anchor_sizes=[8, 16, 32, 64, 128]"],
    )
    assert config.model.backbone == "resnet50" and config.data.augment is False
    assert config.train.lr == 1.0 and type(config.train.lr) is float
    assert config.model.anchor_sizes == (8, 16, 32, 64, 128)
    assert config.model.box_channels == CONFIGS["tiny"].model.box_channels  # the rest stays


def test_a_file_changes_its_base(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('base = "tiny"\nname = "mine"\n[train]\nsteps = 7\n')
    config = load_config(str(file))
    assert (config.name, config.train.steps, config.model) == ("mine", 7, CONFIGS["tiny"].model)


def test_the_stored_configuration_can_be_used_again(tmp_path):
    # What a run writes as config.json describes that run.
    config = load_config("tiny", ["train.steps=9"])
    file = tmp_path / "config.json"
    file.write_text(json.dumps(dataclasses.asdict(config) | {"class_names": ["__background__", "cat"]}))
    assert load_config(str(file)) == config
    assert config_from_dict(dataclasses.asdict(config)) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.backbone", "wants section.key=value"),
        ("backbone=resnet18", "wants section.key=value"),
        ("modle.backbone=resnet18", "unknown section 'modle'; the sections are model, data and train"),
        ("model.bakbone=resnet18", "unknown key model.bakbone; the keys are num_classes, backbone"),
        ("train.steps=many", "train.steps must be int, got 'many'"),
        ("train.steps=1.5", "train.steps must be int, got 1.5"),
        ("train.steps=true", "train.steps must be int, got True"),
        ("model.pre_nms_top_n=[1, 2, 3]", "model.pre_nms_top_n must be"),
    ],
)
def test_bad_overrides(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config("tiny", [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batch_size=0", "train.batch_size must be at least 1, got 0"),
        ("train.log_every=0", "train.log_every must be at least 1"),
        ("train.seed=-1", "train.seed must be at least 0"),
        ("model.mask_pool_size=0", "model.mask_pool_size must be at least 1"),
        ("model.post_nms_top_n=[100, 0]", "model.post_nms_top_n must be at least 1"),
        ("model.anchor_sizes=[8, 16, 32]", "model.anchor_sizes needs five sizes"),
        ("model.roi_positive_fraction=0.0", r"model.roi_positive_fraction must be in \(0, 1\]"),
        ("model.norm=ln", "unknown norm 'ln'; choose one of bn, frozen_bn, gn"),
        ("train.schedule=x", "unknown schedule 'x'"),
        ("train.optimizer=x", "unknown optimizer 'x'"),
        ("data.max_size=10", "data.max_size 10 must not be below data.image_size 128"),
        ("train.lr=-1.0", "must not be negative"),
    ],
)
def test_values_that_cannot_work(override, message):
    # Found before anything is built or written, not as a traceback or an untrained model later.
    with pytest.raises(ConfigError, match=message):
        validate(load_config("tiny", [override]))


def test_the_named_configurations_work():
    for config in CONFIGS.values():
        assert validate(config) is config


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("huge", None, "unknown configuration 'huge'; choose torchvision, tiny or a .toml or .json file"),
        ("absent.toml", None, "cannot read the configuration .*absent.toml: No such file"),
        ("broken.toml", "[model", "is not valid TOML"),
        ("broken.json", '{"model": ', "is not valid JSON"),
        ("list.json", "[1]", "must hold the sections"),
        ("base.toml", 'base = "huge"', "unknown base configuration 'huge'"),
        ("flat.toml", "model = 3", "section 'model' must be a table"),
    ],
)
def test_bad_files(name, content, message, tmp_path):
    path = tmp_path / name if "." in name else name
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_config(str(path))
