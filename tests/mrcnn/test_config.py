"""Configurations: names, files, overrides, and an answer to every mistake."""

import dataclasses
import inspect
import json

import pytest
from torchvision.models.detection import FasterRCNN

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
        ("model.pre_nms_top_n=[1, 2, 3]", r"model.pre_nms_top_n must be tuple\[int, int\], got \[1, 2, 3\]"),
        ("model.norm=ln", "unknown model.norm 'ln'; choose one of bn, frozen_bn, sync_bn, gn"),
        ("model.norm=3", "unknown model.norm 3; choose one of"),
        ("model.backbone=vgg16", "unknown model.backbone 'vgg16'; choose one of resnet18, resnet34, resnet50"),
        ("model.mask_loss=dice", "unknown model.mask_loss 'dice'; choose one of bce, softmax, canvas"),
        ("model.rpn_class_normalizer=all", "unknown model.rpn_class_normalizer 'all'; choose one of sampled, slots"),
        ("train.schedule=x", "unknown train.schedule 'x'; choose one of multistep, cosine, constant"),
        ("train.optimizer=x", "unknown train.optimizer 'x'; choose one of sgd, adamw"),
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
        ("model.anchor_sizes=[8, 16, 32]", "model.anchor_sizes needs one size a level: four for P2..P5, five"),
        ("model.anchor_sizes=[8, 16, 32, 64, 128, 256]", "model.anchor_sizes needs one size a level"),
        ("model.anchor_scales=[]", "model.anchor_scales needs at least one number"),
        ("model.aspect_ratios=[0.5, 0.0]", "model.aspect_ratios needs .* all above 0"),
        ("model.roi_positive_fraction=0.0", r"model.roi_positive_fraction must be in \(0, 1\]"),
        ("model.rpn_positive_fraction=1.5", r"model.rpn_positive_fraction must be in \(0, 1\]"),
        ("model.rpn_low_threshold=0.8", "model.rpn_low_threshold must not exceed model.rpn_high_threshold"),
        ("model.frozen_stages=6", "model.frozen_stages counts the stem and four stages: at most 5"),
        ("model.weights=DEFAULT", "model.weights fit batch norm: set model.norm to bn"),  # tiny has gn
        ("train.milestones=[0.5, 1.5]", r"train.milestones are parts of the run, in \[0, 1\]"),
        ("train.milestones=[60000]", r"train.milestones are parts of the run, in \[0, 1\]"),  # steps, as elsewhere
        ("data.max_size=10", "data.max_size 10 must not be below data.image_size 128"),
        ("train.lr=-1.0", "train.lr must not be negative"),
        ("train.lr=nan", "train.lr must not be negative and must be finite, got nan"),
        ("train.lr=inf", "must be finite"),
        ("model.aspect_ratios=[1.0, -2.0]", "model.aspect_ratios must not be negative"),
        ("train.backbone_lr_factor=-0.1", "train.backbone_lr_factor must not be negative"),
    ],
)
def test_values_that_cannot_work(override, message):
    # Found before anything is built or written, not as a traceback or an untrained model later.
    with pytest.raises(ConfigError, match=message):
        validate(load_config("tiny", [override]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.fpn_norm=gn", "model.fpn_channels=48"], "model.fpn_channels must be a multiple of 32 .*, got 48"),
        (["model.head_norm=gn", "model.mask_channels=40"], "model.mask_channels must be a multiple of 32 .*, got 40"),
        (["model.head_norm=gn", "model.box_conv_layers=1", "model.fpn_channels=48"], "model.fpn_channels must be"),
        (["model.head_norm=gn", "model.fpn_channels=48"], None),  # nothing with 48 channels is normalised
        (["model.head_norm=bn", "model.mask_channels=40"], None),
    ],
)
def test_group_norm_needs_channels_that_32_divides(overrides, message):
    # GroupNorm would say so in a traceback of its own, when the model is built.
    config = load_config("tiny", overrides)
    if message is None:
        assert validate(config) is config
    else:
        with pytest.raises(ConfigError, match=message):
            validate(config)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_named_configurations_work(name):
    # They pass their own checks, are called what they are looked up by, and survive their journey through JSON.
    config = load_config(name)
    assert validate(config) is config and config.name == name
    assert config_from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("huge", None, "unknown configuration 'huge'; choose torchvision, .*tiny or a .toml or .json file"),
        ("absent.toml", None, "cannot read the configuration .*absent.toml: No such file"),
        ("broken.toml", "[model", "is not valid TOML"),
        ("broken.json", '{"model": ', "is not valid JSON"),
        ("list.json", "[1]", "must hold the sections"),
        ("base.toml", 'base = "huge"', "unknown base configuration 'huge'"),
        ("bases.toml", 'base = ["tiny"]', r"unknown base configuration \['tiny'\]"),
        ("flat.toml", "model = 3", "section 'model' must be a table"),
    ],
)
def test_bad_files(name, content, message, tmp_path):
    path = tmp_path / name if "." in name else name
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_config(str(path))


def test_one_class_has_nothing_to_compete_with():
    # Softmax over one channel is 1: the mask loss would be 0 in every step, and nobody would know why.
    config = load_config("tiny", ["model.mask_loss=softmax", "model.num_classes=2"])
    with pytest.raises(ConfigError, match="softmax is identically 0 with one class: take bce or canvas"):
        validate(config)


# What detectron2's configs/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml and the defaults under it say, and what
# the tutorial does (reports/tutorial/README.md), written out once more.
SAID = {
    "detectron2": {
        "backbone": "resnet50", "norm": "frozen_bn", "frozen_stages": 2, "fpn_channels": 256, "fpn_norm": "none",
        "anchor_sizes": (32, 64, 128, 256, 512), "anchor_scales": (1.0,), "aspect_ratios": (0.5, 1.0, 2.0),
        "round_anchors": False, "rpn_layers": 1, "objectness": "sigmoid", "rpn_high_threshold": 0.7,
        "rpn_low_threshold": 0.3, "rpn_low_inclusive": False, "rpn_require_overlap": False, "rpn_samples": 256,
        "rpn_positive_fraction": 0.5, "rpn_class_normalizer": "slots", "rpn_box_normalizer": "slots",
        "rpn_box_beta": 0.0, "rpn_nms_threshold": 0.7, "pre_nms_top_n": (2000, 1000), "post_nms_top_n": (1000, 1000),
        "roi_samples": 512, "roi_positive_fraction": 0.25, "roi_threshold": 0.5, "canonical_scale": 224,
        "roi_aligned": True, "sampling_ratio": 0, "box_pool_size": 7, "box_conv_layers": 0, "box_fc_layers": 2,
        "box_channels": 1024, "box_beta": 0.0, "mask_pool_size": 14, "mask_layers": 4, "mask_channels": 256,
        "mask_loss": "bce", "mask_target": "binary", "head_norm": "none", "score_threshold": 0.05,
        "detection_nms_threshold": 0.5, "max_detections": 100,
    },
    "tutorial": {
        "num_classes": 81, "backbone": "resnet50", "norm": "bn", "frozen_stages": 0, "fpn_channels": 256,
        "anchor_sizes": (32, 64, 128, 256), "anchor_scales": (0.5, 1.0, 2.0), "aspect_ratios": (0.5, 1.0, 2.0),
        "objectness": "softmax", "rpn_high_threshold": 0.7, "rpn_low_threshold": 0.3, "rpn_low_inclusive": True,
        "rpn_samples": 256, "rpn_positive_fraction": 0.5, "rpn_class_normalizer": "slots",
        "rpn_box_normalizer": "slots", "rpn_box_beta": 1.0, "rpn_nms_threshold": 0.7, "post_nms_top_n": (1000, 300),
        "canonical_scale": 224, "sampling_ratio": 2, "roi_aligned": False, "box_pool_size": 7, "box_fc_layers": 2,
        "box_channels": 1024, "mask_pool_size": 14, "mask_layers": 4, "mask_loss": "bce", "mask_target": "soft",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_named_configurations_are_what_they_are_named_after(name):
    # Nothing else would notice a number that changed.
    model = vars(CONFIGS[name].model)
    assert {key: model[key] for key in SAID[name]} == SAID[name]


@pytest.mark.parametrize("name", ["torchvision", "torchvision_v2"])
def test_torchvisions_numbers_are_its_own(name):
    # Read from the defaults of the installed torchvision's MaskRCNN.
    theirs = {k: p.default for k, p in inspect.signature(FasterRCNN.__init__).parameters.items()}
    model = CONFIGS[name].model
    assert (model.rpn_high_threshold, model.rpn_low_threshold) == (
        theirs["rpn_fg_iou_thresh"],
        theirs["rpn_bg_iou_thresh"],
    )
    assert model.pre_nms_top_n == (theirs["rpn_pre_nms_top_n_train"], theirs["rpn_pre_nms_top_n_test"])
    assert model.post_nms_top_n == (theirs["rpn_post_nms_top_n_train"], theirs["rpn_post_nms_top_n_test"])
    assert model.rpn_samples == theirs["rpn_batch_size_per_image"]
    assert model.rpn_positive_fraction == theirs["rpn_positive_fraction"]
    assert model.rpn_nms_threshold == theirs["rpn_nms_thresh"]
    assert (model.roi_samples, model.roi_positive_fraction) == (
        theirs["box_batch_size_per_image"],
        theirs["box_positive_fraction"],
    )
    assert model.roi_threshold == theirs["box_fg_iou_thresh"] == theirs["box_bg_iou_thresh"]
    assert (model.score_threshold, model.detection_nms_threshold) == (
        theirs["box_score_thresh"],
        theirs["box_nms_thresh"],
    )
    assert model.max_detections == theirs["box_detections_per_img"]
    assert (CONFIGS[name].data.image_size, CONFIGS[name].data.max_size) == (theirs["min_size"], theirs["max_size"])
