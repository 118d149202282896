"""What a run reports, in metrics.jsonl and TensorBoard, and what a resumed run has to know of it."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

from .errors import ConfigError
from .files import write_text

NO_BEST = (0, -1.0)  # step and mask AP; COCO's number where there is nothing to measure


class RunLog:
    """The run's lines: metrics of training steps and evaluations, flushed as they are written.

    A run that is taken up after `step` drops the lines of later steps (the last ones before it was stopped, written
    after its last checkpoint) and goes on with the counts of the lines it keeps. It is a context manager.
    """

    def __init__(
        self, output: Path, step: int = 0, tensorboard: bool = False, best: tuple[int, float] = NO_BEST
    ) -> None:
        """Open the files in the folder `output`, which must exist; a new run (step 0) replaces metrics.jsonl.

        `best` is the step and the mask AP of the best evaluation that the checkpoint knows of: lines can be lost.
        """
        path = output / "metrics.jsonl"
        lines = _lines(path, step) if step else []
        evaluations = [line for line in lines if "evaluation" in line]
        self.best_step, self.best_ap = best
        for line in evaluations:
            self.note_best(line["step"], line["evaluation"])
        self.evaluated_step = max((line["step"] for line in lines if line.keys() & EVALUATIONS), default=0)
        last = next((line for line in reversed(lines) if "seconds" in line), {"seconds": 0.0, "damaged_images": 0})
        self.damaged_images = last["damaged_images"]
        self._start = time.perf_counter() - last["seconds"]
        self._images, self._since = 0, time.perf_counter()

        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
        self._file = path.open("a")
        # Events of the dropped steps stay in their files; from purge_step on TensorBoard does not show them.
        folder = output / "tensorboard"
        self._board = summary_writer()(str(folder), purge_step=step + 1) if tensorboard else None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def count(self, images: int, damaged: int) -> None:
        """Add a step's images, of which others stood for `damaged`."""
        self._images += images
        self.damaged_images += damaged

    def training(self, step: int, losses: dict[str, float], lr: float, skipped: int = 0) -> dict[str, float]:
        """Write and return the metrics of a training step; `losses` have names as the model's, loss_mask and so on.

        `skipped` are the run's steps without a finite gradient. A loss that is not finite is null in the file.
        """
        now = time.perf_counter()
        rate = self._images / (now - self._since)
        self._images, self._since = 0, now
        metrics = {"step": step, "loss": sum(losses.values()), **losses, "lr": lr, "images_per_second": rate}
        metrics |= {"seconds": now - self._start, "damaged_images": self.damaged_images}
        metrics |= {"skipped_steps": skipped}
        self._write({k: v if math.isfinite(v) else None for k, v in metrics.items()})
        self._show(step, {f"loss/{name.removeprefix('loss_')}": value for name, value in losses.items()})
        self._show(step, {"loss/total": metrics["loss"], "train/lr": lr, "train/images_per_second": rate})
        return metrics

    def note_best(self, step: int, results: dict[str, dict[str, float]]) -> bool:
        """Whether an evaluation has the highest mask AP so far, which is then remembered as the best."""
        if results["segm"]["AP"] <= self.best_ap:
            return False
        self.best_step, self.best_ap = step, results["segm"]["AP"]
        return True

    def evaluation(self, step: int, results: dict[str, dict[str, float]]) -> dict[str, float]:
        """Write the AP of an evaluation, with the step of the best so far; returns them flat: segm_AP and so on."""
        self.note_best(step, results)
        best = {"best_step": self.best_step, "best_segm_AP": self.best_ap} if self.best_step else {}
        self._write({"step": step, "evaluation": results, **best})
        self._since = time.perf_counter()  # evaluating is no time of training
        flat = {(kind, name): value for kind, values in results.items() for name, value in values.items()}
        self._show(step, {f"{kind}/{name}": value for (kind, name), value in flat.items()})
        return {f"{kind}_{name}": value for (kind, name), value in flat.items()} | best

    def evaluation_error(self, step: int, error: Exception) -> dict[str, str]:
        """Write why there is no AP at `step`."""
        self._write({"step": step, "evaluation_error": str(error)})
        self._since = time.perf_counter()
        return {"evaluation_error": str(error)}

    def _write(self, values: dict) -> None:
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def _show(self, step: int, scalars: dict[str, float]) -> None:
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)


EVALUATIONS = {"evaluation", "evaluation_error"}


def summary_writer() -> type:
    """TensorBoard's writer; raises ConfigError where the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        extra = "pip install 'triton-mask-rcnn[tensorboard]'"
        raise ConfigError(f"--tensorboard needs the package tensorboard: {extra}") from None
    return SummaryWriter


def _lines(path: Path, last_step: int) -> list[dict]:
    """The lines of steps up to `last_step`; none where there is no file, and none of what is no line of a run."""
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:  # cut off where the run was
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int) and line["step"] <= last_step:
            lines.append(line)
    return lines
