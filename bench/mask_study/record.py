"""study.json: the settings and every finished run, so that a study that is cut off goes on where it stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..report import write_whole
from ..sources import ROOT, code_of
from .arms import ARMS, CLAIMS, KINDS, arm_config, held_out_set

STUDY_FILE = "study.json"
# What a result depends on. The device is among them: on a GPU the model computes in bf16.
COMPARED = ("steps", "images", "device", "kinds", "config", "pictures", "claims")

# What a run's numbers come from.
SOURCES = (
    *("kernels", "mrcnn/config", "mrcnn/data", "mrcnn/modeling", "mrcnn/structures.py"),
    *("mrcnn/loader.py", "mrcnn/optim.py", "mrcnn/train.py", "mrcnn/inference.py", "mrcnn/evaluation.py"),
    *("bench/mask_study/arms.py", "bench/mask_study/measure.py", "bench/mask_study/merging.py"),
)


class MaskStudyError(Exception):
    """Something that the user can mend; the message is a sentence for them."""


@dataclass
class Record:
    """What study.json holds."""

    settings: dict[str, Any]
    runs: list[dict[str, Any]] = field(default_factory=list)

    def run(self, arm: str, seed: int) -> dict[str, Any] | None:
        """The finished run of a pair."""
        return next((run for run in self.runs if (run["arm"], run["seed"]) == (arm, seed)), None)

    def save(self, folder: Path) -> None:
        """Write study.json whole or not at all, a line a run."""
        head = json.dumps({"settings": self.settings}, indent=1)
        lines = ",\n".join(json.dumps(run) for run in self.runs)
        write_whole(folder / STUDY_FILE, f'{head[:-2]},\n "runs": [\n{lines}\n ]\n}}\n'.encode())


def study_settings(steps: int, images: int, device: str) -> dict[str, Any]:
    """Everything that must be the same for runs to stand in one study; seeds may be added later."""
    config = dataclasses.asdict(arm_config("bce", 0, steps))
    del config["model"]["mask_loss"], config["train"]["seed"]  # what an arm and a seed are
    settings = {
        "arms": ARMS,
        "steps": steps,
        "images": images,
        "device": device,
        "kinds": KINDS,
        "claims": [dataclasses.asdict(claim) for claim in CLAIMS],
        "config": config,
        "pictures": _pictures(),
    }
    return json.loads(json.dumps(settings))  # as it comes back from the file: tuples are lists


def load_record(folder: Path, settings: dict[str, Any] | None = None) -> Record:
    """The record in `folder`, or a new one.

    Raises:
        MaskStudyError: it cannot be read, is missing where no settings are given, or was made with others.
    """
    file = folder / STUDY_FILE
    if not file.exists():
        if settings is None:
            raise MaskStudyError(f"{folder} holds no {STUDY_FILE}")
        return Record(settings)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        record = Record(values["settings"], values["runs"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MaskStudyError(f"{file} cannot be read ({error}): mend it or choose another folder") from None
    if settings is not None:
        different = [key for key in COMPARED if record.settings.get(key) != settings[key]]
        if different:
            raise MaskStudyError(
                f"{file} was made with other settings ({', '.join(different)}): use the same, or another folder"
            )
    return record


def _pictures() -> str:
    """Of a few held-out pictures and their masks: the data is drawn, and may one day be drawn otherwise."""
    digest = hashlib.sha256()
    dataset = held_out_set(arm_config("bce", 0, 1), 4)
    for image, target in (dataset[i] for i in range(len(dataset))):
        digest.update(image.numpy().tobytes() + target["masks"].numpy().tobytes() + target["labels"].numpy().tobytes())
    return digest.hexdigest()[:12]


def source_hash() -> str:
    """Of the code that a run's numbers come from: comments and docstrings do not count."""
    digest = hashlib.sha256()
    files = [file for place in SOURCES for file in sorted((ROOT / place).rglob("*.py")) or [ROOT / place]]
    for file in files:
        code = code_of(file.read_text(encoding="utf-8"))
        digest.update(f"{file.relative_to(ROOT).as_posix()}\n{code}\n".encode())
    return digest.hexdigest()[:12]
