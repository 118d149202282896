"""The commands, run as a user runs them, on data of a few images."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from mrcnn import cli
from mrcnn.checkpoint import load_checkpoint
from mrcnn.cli.interrupt import stop_signals
from mrcnn.config import CONFIGS, load_config
from mrcnn.data.shapes import ShapesDataset

train_command = importlib.import_module("mrcnn.cli.train")  # mrcnn.cli.train is the command itself

SMALL = ["--config", "tiny", "--image-size", "64", "--batch-size", "2"]
FEW_ROIS = ["--set", "model.roi_samples=16", "--set", "model.score_threshold=0.0", "--set", "model.max_detections=5"]


def run(*arguments) -> int:
    """Exit status of `mrcnn` with these arguments."""
    sys.argv = ["mrcnn", *map(str, arguments)]
    with pytest.raises(SystemExit) as exit_:
        cli.main()
        raise SystemExit(0)
    return exit_.value.code or 0


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """Four images in COCO format with category ids 3, 7, 20, and one without objects."""
    folder = tmp_path_factory.mktemp("coco")
    (folder / "images").mkdir()
    dataset = ShapesDataset(4, 64, seed=3)
    truth = dataset.ground_truth()
    ids = {1: 3, 2: 7, 3: 20}
    for category in truth["categories"]:
        category["id"] = ids[category["id"]]
    for annotation in truth["annotations"]:
        annotation["category_id"] = ids[annotation["category_id"]]
    for i, image in enumerate(truth["images"]):
        image["file_name"] = f"{image['id']}.png"
        to_pil_image(dataset[i][0]).save(folder / "images" / image["file_name"])
    truth["images"].append({"id": 99, "file_name": "99.png", "height": 48, "width": 80})
    Image.new("RGB", (80, 48)).save(folder / "images" / "99.png")
    (folder / "annotations.json").write_text(json.dumps(truth))
    return folder


@pytest.fixture(scope="module")
def trained(coco, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "new"
    data = ["--images", coco / "images", "--annotations", coco / "annotations.json"]
    validation = ["--val-images", coco / "images", "--val-annotations", coco / "annotations.json"]
    options = ["--steps", 3, "--eval-every", 2, "--set", "train.log_every=1", "--seed", 5, *FEW_ROIS]
    assert run("train", *SMALL, *data, *validation, *options, "--output", output) == 0
    return output


def test_train_writes_what_it_says(trained):
    # Configuration, class names, one line of metrics a step, one an evaluation, a checkpoint that knows its data.
    # The configuration can be used again: it is the checkpoint's.
    written = ["best.pt", "checkpoint.pt", "config.json", "metrics.jsonl"]
    assert sorted(p.name for p in trained.iterdir()) == written
    config = json.loads((trained / "config.json").read_text())
    assert config["class_names"] == ["__background__", "circle", "square", "triangle"]
    assert (config["train"]["steps"], config["train"]["seed"], config["data"]["image_size"]) == (3, 5, 64)
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 2, 3, 3]
    assert {"loss", "loss_mask", "lr", "seconds"} <= lines[0].keys()
    assert lines[2]["evaluation"]["segm"].keys() >= {"AP", "AP50"}
    checkpoint = load_checkpoint(trained / "checkpoint.pt")
    assert checkpoint.category_ids == [0, 3, 7, 20] and checkpoint.step == 3
    assert load_config(str(trained / "config.json")) == checkpoint.config


def test_training_is_reproducible(coco, tmp_path):
    # The same seed on a CPU: the same losses to the last bit; another seed: others.
    def losses(seed):
        output = tmp_path / str(seed)
        data = ["--images", coco / "images", "--annotations", coco / "annotations.json", "--device", "cpu"]
        run("train", *SMALL, *data, "--steps", 2, "--set", "train.log_every=1", "--seed", seed, "--output", output)
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines]

    first = losses(1)
    assert losses(1) == first and losses(2) != first


def test_evaluate_prints_and_writes(trained, coco, tmp_path, capsys):
    data = ["--images", coco / "images", "--annotations", coco / "annotations.json", "--max-dets", 3]
    output = tmp_path / "sub" / "ap.json"
    assert run("evaluate", "--checkpoint", trained / "checkpoint.pt", *data, "--output", output) == 0
    results = json.loads(output.read_text())
    assert results["max_dets"] == 3 and results["segm"].keys() >= {"AP", "AP50", "AR3"}
    assert "AP50" in capsys.readouterr().err  # the table; stdout is for the JSON
    gate = ["--min-mask-ap50", 0.99, "--output", output]
    assert run("evaluate", "--checkpoint", trained / "checkpoint.pt", *data, *gate) == 1
    assert "is below 0.99" in capsys.readouterr().err


def test_max_dets_are_taken_from_the_model(trained, coco, monkeypatch):
    # The configuration's are 5; more than the model selects cannot be counted.
    module, seen = importlib.import_module("mrcnn.cli.evaluate"), []
    evaluate = module.evaluate_model

    def watched(model, *rest):
        model.box_selection.register_forward_hook(lambda module, args, out: seen.append(out[0].shape[1]))
        return evaluate(model, *rest)

    monkeypatch.setattr(module, "evaluate_model", watched)
    data = ["--images", coco / "images", "--annotations", coco / "annotations.json", "--max-dets", 120]
    assert run("evaluate", "--checkpoint", trained / "checkpoint.pt", *data, "--batch-size", 1) == 0
    assert set(seen) == {120}


def test_evaluate_refuses_other_categories(trained, coco, tmp_path, capsys):
    # The same number of classes with other ids would silently score zero.
    other = json.loads((coco / "annotations.json").read_text())
    other["categories"][0]["id"] = 4
    for annotation in other["annotations"]:
        annotation["category_id"] = 4 if annotation["category_id"] == 3 else annotation["category_id"]
    (tmp_path / "other.json").write_text(json.dumps(other))
    data = ["--images", coco / "images", "--annotations", tmp_path / "other.json"]
    assert run("evaluate", "--checkpoint", trained / "checkpoint.pt", *data) == 2
    assert "the checkpoint knows the categories" in capsys.readouterr().err


def test_predict_writes_pictures_and_json(trained, coco, tmp_path):
    # Two images of different sizes, one grey; detections refer to files and to the data set's own categories.
    Image.new("L", (50, 90), 128).save(tmp_path / "grey.png")
    files = [coco / "images" / "1.png", tmp_path / "grey.png"]
    output = tmp_path / "out"
    options = ["--output", output, "--score-threshold", 0.0]
    assert run("predict", "--checkpoint", trained / "checkpoint.pt", *files, *options) == 0
    assert sorted(p.name for p in output.iterdir()) == ["0000_1.png", "0001_grey.png", "predictions.json"]
    found = json.loads((output / "predictions.json").read_text())
    assert {f["file_name"] for f in found} <= {str(f) for f in files} and len(found) > 0
    names = {3: "circle", 7: "square", 20: "triangle"}
    for entry in found:
        assert entry["category"] == names[entry["category_id"]]
        assert entry["segmentation"]["size"] == ([64, 64] if entry["image_id"] == 0 else [90, 50])


def test_predict_goes_on_after_a_bad_file(trained, coco, tmp_path, capsys):
    # A truncated photo among others: named, the others done, exit status 1.
    bad = tmp_path / "bad.png"
    bad.write_bytes((coco / "images" / "1.png").read_bytes()[:200])
    files = [bad, coco / "images" / "2.png"]
    assert run("predict", "--checkpoint", trained / "checkpoint.pt", *files, "--output", tmp_path / "out") == 1
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0001_2.png", "predictions.json"]
    assert "bad.png cannot be decoded" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_in_evaluation_is_one_line(workers, trained, coco, tmp_path, capsys):
    # Also out of a worker process, where the error arrives wrapped in a traceback.
    shutil.copytree(coco, tmp_path / "coco")
    (tmp_path / "coco" / "images" / "3.png").write_bytes(b"not a picture")
    data = ["--images", tmp_path / "coco" / "images", "--annotations", tmp_path / "coco" / "annotations.json"]
    assert run("evaluate", "--checkpoint", trained / "checkpoint.pt", *data, "--workers", workers) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and error[0].startswith("error: image ") and "3.png cannot be decoded" in error[0]


def test_damaged_images_are_counted(coco, tmp_path, capsys):
    # Training goes on, says how often, and the bad validation image does not end it either.
    shutil.copytree(coco, tmp_path / "coco")
    (tmp_path / "coco" / "images" / "3.png").write_bytes(b"not a picture")
    data = [tmp_path / "coco" / "images", tmp_path / "coco" / "annotations.json"]
    options = ["--images", data[0], "--annotations", data[1], "--val-images", data[0], "--val-annotations", data[1]]
    with pytest.warns(UserWarning, match="3.png cannot be decoded"):
        status = run("train", *SMALL, *options, "--steps", 4, *FEW_ROIS, "--output", tmp_path / "run")
    errors = " ".join(capsys.readouterr().err.split())
    assert status == 0 and "times a damaged image was replaced" in errors and "step 4: not evaluated: image" in errors
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["damaged_images"] >= 1 and "3.png" in lines[1]["evaluation_error"]


def test_shapes_need_no_data(tmp_path):
    output = tmp_path / "shapes"
    small = ["--data", "shapes", *SMALL, "--steps", 1, *FEW_ROIS]
    assert run("train", *small, "--output", output) == 0
    assert load_checkpoint(output / "checkpoint.pt").class_names[1:] == ["circle", "square", "triangle"]


@pytest.fixture(scope="module")
def stopped(coco, tmp_path_factory):
    """Of a run that was killed in its third step of four, a step after a checkpoint: its arguments without --output,
    those that name its data, its folder, and the checkpoint that it writes where nothing stops it."""
    folder = tmp_path_factory.mktemp("stopped")
    data = ["--images", coco / "images", "--annotations", coco / "annotations.json"]
    options = ["--steps", 4, "--set", "train.save_every=2", "--set", "train.log_every=1", *FEW_ROIS]
    arguments = ["train", *SMALL, *data, *options]
    assert run(*arguments, "--output", folder / "whole") == 0

    def killed(step, *_):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_command._Report, "on_step", lambda self, step, metrics: killed(step))
        assert run(*arguments, "--output", folder / "run") != 0
    return arguments, data, folder / "run", folder / "whole" / "checkpoint.pt"


def assert_same_weights(path, other):
    path, other = (torch.load(p, weights_only=True)["model"] for p in (path, other))
    torch.testing.assert_close(path, other, rtol=0, atol=0)


def test_resume_goes_on(stopped, tmp_path, capsys):
    # With the whole command line again, or with no more than the data: the configuration is the checkpoint's.
    arguments, data, folder, whole = stopped
    for copy in ("one", "two"):
        shutil.copytree(folder, tmp_path / copy)
    again = [*arguments, "--output", tmp_path / "one"]
    assert run(*again) == 2
    assert "already holds a checkpoint.pt: --resume goes on" in capsys.readouterr().err
    assert run(*again, "--resume") == 0
    assert_same_weights(tmp_path / "one" / "checkpoint.pt", whole)
    assert run("train", *data, "--resume", "--workers", 1, "--output", tmp_path / "two") == 0
    assert_same_weights(tmp_path / "two" / "checkpoint.pt", whole)
    assert run(*again, "--resume") == 0  # in a loop that restarts what was stopped, an end is no error
    assert "the run was complete" in capsys.readouterr().err


START = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from mrcnn.cli import main; main()"


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_process_is_resumed_to_the_last_bit(sent, coco, tmp_path):
    # A real process, with workers, which get a terminal's Ctrl-C too. It says where its checkpoint is; the run that
    # goes on from there ends as one that was left alone.
    few = ["--images", coco / "images", "--annotations", coco / "annotations.json", *SMALL, *FEW_ROIS]
    few += ["--steps", 12, "--workers", 1, "--device", "cpu"]
    few += ["--set", "train.log_every=1", "--set", "train.save_every=1000"]
    command = [sys.executable, "-c", START, *map(str, ["train", *few, "--output", tmp_path / "parts"])]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    metrics = tmp_path / "parts" / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.05)
    if sent == signal.SIGINT:
        os.killpg(process.pid, sent)
    else:
        process.send_signal(sent)
    errors = " ".join(process.communicate(timeout=120)[1].split())
    stopped = load_checkpoint(tmp_path / "parts" / "checkpoint.pt").step
    assert process.returncode == 130 and 0 < stopped < 12 and "Traceback" not in errors
    assert "stopping after this step" in errors
    assert f"stopped after step {stopped} of 12: --resume goes on from {tmp_path / 'parts' / 'checkpoint.pt'}" in errors
    assert run("train", *few, "--output", tmp_path / "parts", "--resume") == 0
    assert run("train", *few, "--output", tmp_path / "whole") == 0
    assert_same_weights(tmp_path / "parts" / "checkpoint.pt", tmp_path / "whole" / "checkpoint.pt")


@pytest.fixture
def python_takes_ctrl_c():
    """Also where the tests run in the background of a shell, which then ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_second_signal_stops_at_once(python_takes_ctrl_c):
    # In the main thread alone, and only within the block.
    with stop_signals() as asked:
        assert not asked()
        signal.raise_signal(signal.SIGINT)
        assert asked()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    before = signal.getsignal(signal.SIGTERM)

    def elsewhere():
        with stop_signals() as asked:
            assert not asked() and signal.getsignal(signal.SIGTERM) is before

    with ThreadPoolExecutor(1) as pool:
        pool.submit(elsewhere).result()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr", 0.5], "train.lr is 0.001 in the run to resume and cannot become 0.5"),
        (["--steps", 9], "train.steps is 4 in the run to resume and cannot become 9: the cosine schedule"),
        (["--set", "model.norm=bn"], "model.norm is gn in the run to resume"),
        (["--image-size", 96], "data.image_size is 64 in the run to resume"),
        (["--config", "torchvision_v2"], "model.backbone is resnet18 in the run to resume"),
    ],
)
def test_resume_refuses_another_configuration(options, message, stopped, capsys):
    # One line that names the key; the folder stays as it was.
    _, data, folder, _ = stopped
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert run("train", *data, "--resume", "--output", folder, *options) == 2
    assert message in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_training_starts_from_a_checkpoint_and_names_the_best(trained, coco, tmp_path, capsys):
    # What was taken is said, and the best AP at the end, with the file that has it. Frozen layers are no mistake here.
    data = ["--images", coco / "images", "--annotations", coco / "annotations.json"]
    validation = ["--val-images", coco / "images", "--val-annotations", coco / "annotations.json"]
    options = [*SMALL, *data, *validation, "--steps", 1, *FEW_ROIS, "--set", "model.frozen_stages=2"]
    assert run("train", *options, "--init-from", trained / "best.pt", "--output", tmp_path / "run") == 0
    errors = capsys.readouterr().err
    assert "tensors from the checkpoint of step" in errors and "fresh" not in errors and "warning" not in errors
    assert "best mask AP 0." in errors and str(tmp_path / "run" / "best.pt") in errors
    paths = (trained / "best.pt", tmp_path / "run" / "checkpoint.pt")
    before, after = (torch.load(path, weights_only=True)["model"] for path in paths)
    assert torch.equal(before["backbone.stem.0.weight"], after["backbone.stem.0.weight"])


def test_frozen_random_layers_are_warned_of(tmp_path, capsys, monkeypatch):
    # It works, and is hardly what anybody wants: random layers that stay so, and batch norm without statistics.
    monkeypatch.setattr(train_command, "train_model", lambda *_, **__: None)
    options = ["--data", "shapes", *SMALL, "--set", "model.frozen_stages=2", "--set", "model.norm=frozen_bn"]
    assert run("train", *options, "--output", tmp_path / "run") == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "model.frozen_stages=2 freezes layers with random weights" in said
    assert "model.norm=frozen_bn with random weights normalises nothing" in said


@pytest.mark.parametrize(("backbone", "slow"), [("resnet18", False), ("resnet50", True), ("resnet101", True)])
def test_large_backbones_on_a_cpu_are_warned_of(backbone, slow, tmp_path, capsys, monkeypatch):
    # They would look stuck.
    monkeypatch.setattr(train_command, "train_model", lambda *_, **__: None)
    options = ["--data", "shapes", *SMALL, "--set", f"model.backbone={backbone}", "--device", "cpu"]
    assert run("train", *options, "--output", tmp_path / "run") == 0
    assert ("takes minutes a step on a CPU" in " ".join(capsys.readouterr().err.split())) == slow


def test_a_batch_that_no_machine_takes_is_refused(capsys):
    # Instead of an overflow somewhere in the trace.
    assert run("summary", "--config", "tiny", "--batch", 100_000_000_000) == 2
    assert "--batch" in capsys.readouterr().err


def test_help_names_the_configurations(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    assert run("train", "--help") == 0
    assert f"{', '.join(CONFIGS)}, or a .toml or .json file." in capsys.readouterr().out


def test_tensorboard_from_the_command_line(coco, tmp_path):
    pytest.importorskip("tensorboard", reason="needs the package tensorboard, an optional one")
    data = ["--images", coco / "images", "--annotations", coco / "annotations.json"]
    options = [*SMALL, *data, "--steps", 1, *FEW_ROIS, "--tensorboard"]
    assert run("train", *options, "--output", tmp_path / "run") == 0
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--output", "OUT"], "COCO data needs both --images and --annotations"),
        (["train", "--output", "OUT", "--images", "none", "--annotations", "none.json"], "none.json"),
        (["train", "--output", "OUT", "--data", "shapes", "--config", "huge"], "unknown configuration 'huge'"),
        (["train", "--output", "OUT", "--data", "shapes", *SMALL, "--set", "model.norm=ln"], "unknown model.norm 'ln'"),
        (
            ["train", "--output", "OUT", "--data", "shapes", *SMALL, "--set", "train.optimizer=x"],
            "unknown train.optimizer",
        ),
        (
            ["train", "--output", "OUT", "--data", "shapes", *SMALL, "--set", "train.schedule=x"],
            "unknown train.schedule",
        ),
        (["train", "--output", "OUT", "--data", "shapes", *SMALL, "--set", "train.log_every=0"], "at least 1"),
        (["train", "--output", __file__, "--data", "shapes", *SMALL], "is a file; a folder is wanted"),
        (
            ["train", "--output", f"{__file__}/run", "--data", "shapes", *SMALL],
            "run cannot be written: Not a directory",
        ),
        (["train", "--output", "OUT", "--data", "shapes", "--images", "x"], "--data shapes takes no images"),
        (["train", "--output", "OUT", "--data", "shapes", "--resume"], "nothing to resume: there is no "),
        (["train", "--output", "OUT", "--data", "shapes", "--resume", "--init-from", "x.pt"], "takes no --init-from"),
        (["train", "--output", "OUT", "--data", "shapes", *SMALL, "--init-from", "none.pt"], "no checkpoint none.pt"),
        (["evaluate", "--checkpoint", "none.pt", "--data", "shapes"], "there is no checkpoint none.pt"),
        (["predict", "--checkpoint", "none.pt", "none.png", "--output", "OUT"], "no such image file: none.png"),
        (["predict", "--checkpoint", "none.pt", __file__, "--output", "OUT"], "there is no checkpoint none.pt"),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(arguments, message, tmp_path, capsys):
    output = tmp_path / "out"
    assert run(*[output if a == "OUT" else a for a in arguments]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and message in errors and errors.count("\n") == 1
    assert not output.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_asking_for_a_gpu_that_is_not_there(tmp_path, capsys):
    assert run("train", "--output", tmp_path / "o", "--data", "shapes", *SMALL, "--device", "cuda") == 2
    assert "PyTorch sees no GPU" in capsys.readouterr().err


def test_asking_for_triton_without_a_gpu_says_how(tmp_path, capsys, monkeypatch):
    # The tests' own process interprets the kernels; a user's does not.
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    from kernels import backend

    monkeypatch.setattr(backend, "INTERPRETED", False)
    arguments = ["--output", tmp_path / "o", "--data", "shapes", *SMALL, "--steps", 1, "--ops", "triton"]
    assert run("train", *arguments) == 2
    assert "set TRITON_INTERPRET=1" in capsys.readouterr().err
