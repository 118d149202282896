"""The loader's own benchmark on a few small files, and the files it makes up."""

import json
import math

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed")

from bench import loader_rate
from bench.cli import app
from bench.jpeg_set import write_jpeg_set
from bench.loader_rate import CPU_ALONE, STAGES, LoaderRates, Rate, measure_loader, need_table, worker_counts
from mrcnn.config import Config, DataConfig, TrainConfig
from mrcnn.data.coco import CocoDataset

TINY = ["--made-up", "4", "--batch", "2", "--image-size", "64", "--max-size", "96", "--rounds", "1"]


def cells(table):
    return [list(column.cells) for column in table.columns]


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    return write_jpeg_set(tmp_path_factory.mktemp("jpegs"), 6)


def test_the_made_up_set_is_what_it_says(jpegs, tmp_path):
    # JPEG files of two sizes, polygons and run lengths, all usable; a photograph's bytes, or decoding is too cheap.
    folder, path = jpegs
    dataset, content = CocoDataset(folder, path), json.loads(path.read_text())
    assert dataset.sizes == [(480, 640), (480, 640), (640, 480)] * 2 and not dataset.skipped
    assert {type(a["segmentation"]) for a in content["annotations"]} == {list, dict}
    for index, record in enumerate(dataset._records):
        with Image.open(folder / record.file_name) as opened:
            assert opened.format == "JPEG"
        assert 0.2 < (folder / record.file_name).stat().st_size / (640 * 480) < 0.7
        masks = dataset[index][1]["masks"]
        assert 4 <= len(masks) <= 12 and (masks.sum((1, 2)) > 100).all()
    again = write_jpeg_set(tmp_path / "again", 6)
    assert again[1].read_bytes() == path.read_bytes()
    assert (again[0] / "000002.jpg").read_bytes() == (folder / "000002.jpg").read_bytes()
    assert write_jpeg_set(tmp_path / "other", 6, seed=1)[1].read_bytes() != path.read_bytes()
    with pytest.raises(ValueError, match="at least 1 image"):
        write_jpeg_set(tmp_path, 0)


def test_rates_and_stages_are_of_what_was_loaded(jpegs, monkeypatch):
    # The clock starts when every worker has given a batch: one more batch a worker than is counted.
    asked = []
    real = loader_rate.training_batches

    def watched(dataset, config, *arguments):
        asked.append((config.train.workers, config.train.steps))
        return real(dataset, config, *arguments)

    monkeypatch.setattr(loader_rate, "training_batches", watched)
    threads = torch.get_num_threads()
    data = DataConfig(image_size=64, max_size=96, group_by_aspect=True)
    config = Config(data=data, train=TrainConfig(batch_size=2))
    found = measure_loader(CocoDataset(*jpegs), config, [0, 2], rounds=3)
    assert asked == [(0, 4), (2, 8)] and torch.get_num_threads() == threads
    assert [(rate.workers, rate.images) for rate in found.rates] == [(0, 6), (2, 12)]
    assert all(0 < rate.images_per_second < math.inf for rate in found.rates)
    assert tuple(found.stages) == STAGES and all(0 < stage < 1e4 for stage in found.stages.values())


def test_what_a_step_needs_is_arithmetic():
    # 16 images in 100 ms are 160 a second; at 20 ms an image a core gives 50, so that four are wanted.
    found = LoaderRates({"decode": 12.0, "masks": 8.0}, [Rate(0, 50.0, 8)], batch=16)
    steps, rates, workers = cells(need_table(found))
    at = steps.index("100 ms")
    assert (rates[at], workers[at]) == ("160", "4")
    assert cells(loader_rate.rate_table(found))[3] == ["320 ms"]


@pytest.mark.parametrize(("cores", "counts"), [(1, [0, 1]), (2, [0, 1, 2]), (6, [0, 1, 2, 4, 6]), (8, [0, 1, 2, 4, 8])])
def test_worker_counts_end_at_the_cores(cores, counts):
    assert worker_counts(cores) == counts


def test_the_command_says_that_it_is_the_cpu(tmp_path):
    # A rate without its machine would be taken for the GPU's, or for another's.
    out = tmp_path / "rates.json"
    done = CliRunner().invoke(app, ["loader", *TINY, "--workers", "0", "--workers", "3", "--out", str(out)])
    assert done.exit_code == 0, done.output
    text = " ".join(done.output.split())
    assert CPU_ALONE in text and "4 made-up JPEG files" in text and "0 (main process)" in text
    assert "not measured" in text and all(stage in text for stage in STAGES)
    content = json.loads(out.read_text())
    assert [rate["workers"] for rate in content["rates"]] == [0, 3]
    assert content["settings"]["note"] == CPU_ALONE and content["settings"]["data"]["group_by_aspect"]
    assert content["environment"]["cpu_name"] and content["settings"]["pinned"] is torch.cuda.is_available()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--images", "."], "needs both --images and --annotations"),
        (["--images", ".", "--annotations", "nowhere.json"], "cannot read annotation file nowhere.json"),
        (["--image-size", "100", "--max-size", "50"], "data.max_size 50 must not be below data.image_size 100"),
    ],
)
def test_mistakes_are_one_sentence(arguments, sentence):
    done = CliRunner().invoke(app, ["loader", *arguments])
    assert done.exit_code == 2 and sentence in done.output and "Traceback" not in done.output


def test_the_users_own_set_is_measured(jpegs):
    folder, path = jpegs
    options = ["--images", str(folder), "--annotations", str(path), "--workers", "0", *TINY[2:]]
    done = CliRunner().invoke(app, ["loader", *options])
    assert done.exit_code == 0 and f"{path}: 6 images" in done.output.replace("\n", "")
