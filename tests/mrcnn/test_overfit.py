"""The whole training loop on real photographs: eight images must be learnt by heart, masks and classes included."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from mrcnn.config import load_config
from mrcnn.data.coco import CocoDataset
from mrcnn.inference import evaluate
from mrcnn.train import train

DATA = Path(__file__).parents[3] / "shared" / "data"

# Nuclei: one class, small objects (anchors from 8 pixels). Fruits: three classes, so that a mask trained in the wrong
# class's channel cannot hide. Fixed image ids.
CASES = {
    "nuclei": ("nuclei/train", "nuclei/annotations/instances_train.json", [6, 9, 14, 16, 28, 29, 36, 42]),
    "fruits": ("fruits_nuts/images", "fruits_nuts/trainval.json", [0, 1, 2, 3, 4, 5, 6, 7]),
}
ANCHORS = {"nuclei": ["model.anchor_sizes=[8, 16, 32, 64, 128]"], "fruits": []}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_overfits_eight_images(name, tmp_path):
    images, annotations, ids = CASES[name]
    if not (DATA / annotations).is_file():
        pytest.skip(f"needs ../shared/data/{annotations}, which is not part of the repository")
    content = json.loads((DATA / annotations).read_text())
    content["images"] = [i for i in content["images"] if i["id"] in ids]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
    assert len(content["images"]) == 8
    (tmp_path / "eight.json").write_text(json.dumps(content))

    config = load_config("tiny", ["data.augment=false", "train.steps=300", *ANCHORS[name]])
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, image_size=256, max_size=512))
    dataset = lambda: CocoDataset(DATA / images, tmp_path / "eight.json")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = train(dataset(), config, tmp_path / "run", device)
    results = evaluate(checkpoint.model, dataset(), checkpoint.config)
    assert results["segm"]["AP50"] >= 0.8
