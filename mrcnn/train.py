"""Training: the run, its metrics and checkpoints."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import Checkpoint, save_checkpoint
from .config import Config, TrainConfig, validate
from .data.coco import CocoDataset
from .data.shapes import ShapesDataset
from .errors import ConfigError, DataError, TrainingStopped
from .files import check_folder, write_text
from .inference import evaluate
from .loader import device_batches, training_batches
from .modeling import MaskRCNN
from .modeling.backbone import load_pretrained
from .modeling.fused_conv import can_fuse, fuse_relus
from .optim import Skipped, learning_rate_factor
from .resume import check_resumable, describe_data, initialise, restore, training_state
from .run_log import NO_BEST, RunLog, summary_writer
from .step import TrainingStep
from .structures import Batch

Dataset = CocoDataset | ShapesDataset


def train(
    dataset: Dataset,
    config: Config,
    output: Path,
    device: torch.device,
    validation: Dataset | None = None,
    on_step: Callable[[int, dict], None] = lambda step, metrics: None,
    *,
    resume: Checkpoint | None = None,
    init_from: Checkpoint | None = None,
    tensorboard: bool = False,
    on_note: Callable[[str], None] = lambda sentence: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Checkpoint:
    """Train a model, writing config.json, metrics.jsonl, checkpoint.pt and best.pt (the best mask AP) to `output`.

    `metrics.jsonl` gets one JSON object every `log_every` steps and one an evaluation. `on_step` is called after
    every step, with the metrics where they were read from the device and {} elsewhere.

    A step whose gradient is not finite changes nothing and is counted; `train.skip_limit` of them in a row end the run,
    once the losses are read next.
    `train.compile` and `train.cuda_graphs` say how a step runs; what cannot be had is left out, and `on_note` told why.

    The model starts with random weights, with `config.model.weights` in its backbone, or with what fits of the
    checkpoint `init_from`; `on_note` gets sentences about what did. `resume` is the checkpoint.pt of the run in
    `output`, loaded with its training state: the run goes on with that model, and on a CPU ends as one without a pause
    does, to the last bit. `tensorboard` also writes the metrics to `output`/tensorboard. `should_stop` is asked in
    every step: where it says so, the run saves itself after the step and ends.

    Raises:
        DataError: the data set is empty, none of its images can be read, or it is not that of the run to resume.
        ConfigError: a value that cannot work, or is not that of the run to resume; `output` holds a checkpoint that is
            not resumed; nothing of `init_from` fits; the backbone's weights cannot be had; TensorBoard is missing.
        CheckpointError: `resume` has no training state; a checkpoint cannot be written.
        FloatingPointError: no step has a finite gradient any more, or a weight is not finite; the last checkpoint is
            kept.
        TrainingStopped: `should_stop` said so.
    """
    if len(dataset) == 0:
        raise DataError("the training set has no images")
    check_output(output, resuming=resume is not None)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=len(dataset.class_names)))
    validate(config)
    if resume is not None:
        check_resumable(resume, config, dataset)
    if tensorboard:
        summary_writer()

    torch.manual_seed(config.train.seed)
    model = resume.model if resume else _new_model(config, dataset.class_names, init_from, on_note)
    model = model.to(device)
    if device.type == "cuda":  # on a CPU channels_last convolutions are slower
        model = model.to(memory_format=torch.channels_last)
        torch.backends.cudnn.benchmark = config.data.group_by_aspect  # of many shapes each would be tried out
    if config.train.compile:
        on_note("the first steps of each shape of batch compile it, which takes minutes")
    if config.train.fused_convs:
        reason = can_fuse(device)
        on_note(f"not fused: {reason}" if reason else f"{fuse_relus(model)} convolutions with their ReLU")
    checkpoint = Checkpoint(model, config, dataset.class_names, dataset.category_ids, resume.step if resume else 0)
    step = TrainingStep(model.train(), config.train, start=checkpoint.step, on_note=on_note)
    if resume is not None:
        restore(resume.training, step.update, device)

    output.mkdir(parents=True, exist_ok=True)
    _write_config(output / "config.json", config, dataset.class_names)
    best = resume.training.get("best", NO_BEST) if resume else NO_BEST
    with RunLog(output, checkpoint.step, tensorboard, best) as log:
        _Run(checkpoint, step, device, dataset, validation, output, log, on_step, should_stop).finish()
    model.eval()
    return checkpoint


def _write_config(path: Path, config: Config, class_names: list[str]) -> None:
    """Write what the run is; a file that says so already is left alone."""
    text = json.dumps(dataclasses.asdict(config) | {"class_names": class_names}, indent=2) + "\n"
    if not path.is_file() or path.read_bytes() != text.encode():
        write_text(path, text)


def check_output(output: Path, resuming: bool = False) -> None:
    """Raise ConfigError unless a run can write to the folder `output`, which need not exist."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output {output} is a file; a folder is wanted")
    try:
        check_folder(output)
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be written: {error.strerror or error}") from None
    for name in ("checkpoint.pt", "best.pt"):
        if not resuming and (output / name).exists():
            raise ConfigError(
                f"{output} already holds a {name}: --resume goes on with that run, or choose another folder"
            )


def _new_model(
    config: Config, class_names: list[str], init_from: Checkpoint | None, on_note: Callable[[str], None]
) -> MaskRCNN:
    model = MaskRCNN(config.model)
    if init_from is None:
        if config.model.weights:
            load_pretrained(model.backbone, config.model.weights)
        return model
    for line in initialise(model, init_from):
        on_note(line)
    if len(class_names) == len(init_from.class_names) and class_names != init_from.class_names:
        on_note(f"  the class layers were taken, too; they were trained on {', '.join(init_from.class_names[1:])}")
    return model


@dataclass
class _Run:
    """A run from the step of its checkpoint to the last one."""

    checkpoint: Checkpoint
    step: TrainingStep
    device: torch.device
    dataset: Dataset
    validation: Dataset | None
    output: Path
    log: RunLog
    on_step: Callable[[int, dict], None]
    should_stop: Callable[[], bool]

    def __post_init__(self) -> None:
        self.described = describe_data(self.dataset)  # once: it reads all annotations
        self.save_is_due = False

    @property
    def settings(self) -> TrainConfig:
        return self.checkpoint.config.train

    def finish(self) -> None:
        """Take the steps that are left."""
        start = self.checkpoint.step
        if self.validation is not None and self.log.evaluated_step < start and self.is_evaluated(start):
            self.on_step(start, self.evaluate(start))  # the run was stopped between saving and this
        batches = training_batches(self.dataset, self.checkpoint.config, start, self.device.type == "cuda")
        with closing(device_batches(batches, self.device)) as on_device:  # which ends the loader's workers
            for step, batch in enumerate(on_device, start + 1):
                self.take(step, batch)

    def take(self, step: int, batch: Batch) -> None:
        """Take a step, and do what is due after it."""
        losses = self.step(batch)
        self.log.count(len(batch.image_ids), batch.replaced)
        stopping = self.should_stop()
        ending = stopping or step == self.settings.steps
        saving = ending or self.save_is_due or self.is_evaluated(step) or step % self.settings.save_every == 0
        metrics: dict = {}
        if saving or step % self.settings.log_every == 0:
            metrics, skipped = self.read(step, losses)
            # Weights that ran away in a step show in the next ones, which are left out: they would replace good ones.
            self.save_is_due = saving and skipped.in_a_row > 0 and not ending
        self.checkpoint.step = step
        if saving and not self.save_is_due:
            self.save()
        if self.is_evaluated(step) and not stopping:  # else it is made up for when the run goes on
            metrics |= self.evaluate(step)
        self.on_step(step, metrics)
        if stopping:
            path = self.output / "checkpoint.pt"
            raise TrainingStopped(f"stopped after step {step} of {self.settings.steps}: --resume goes on from {path}")

    def read(self, step: int, losses: dict[str, Tensor]) -> tuple[dict, Skipped]:
        """Metrics of a step, for which the host waits; FloatingPointError where too many in a row were left out."""
        values = dict(zip(losses, torch.stack(list(losses.values())).tolist(), strict=True))
        skipped = self.step.update.skipped()
        if skipped.longest >= self.settings.skip_limit:
            raise FloatingPointError(
                f"the gradient was not finite in {skipped.longest} steps in a row, up to step {step} or before (losses "
                f"there: {values}): begin anew with a lower --lr or with train.clip_norm (train.skip_limit is "
                f"{self.settings.skip_limit})"
            )
        lr = self.settings.lr * learning_rate_factor(step - 1, self.settings)
        return self.log.training(step, values, lr, skipped.of_all), skipped

    def is_evaluated(self, step: int) -> bool:
        """Whether the model is evaluated after `step`, where there is something to evaluate on."""
        every = self.settings.eval_every
        return step == self.settings.steps or bool(every and step % every == 0)

    def save(self) -> None:
        """Write checkpoint.pt; weights that are not finite would replace a good one."""
        if not all(value.isfinite().all() for value in self.checkpoint.model.state_dict().values()):
            raise FloatingPointError(
                f"the weights are not finite after step {self.checkpoint.step}: begin anew with a lower --lr or with "
                "train.clip_norm"
            )
        state = training_state(self.step.update, self.device) | self.described
        state["best"] = (self.log.best_step, float(self.log.best_ap))
        save_checkpoint(self.output / "checkpoint.pt", dataclasses.replace(self.checkpoint, training=state))

    def evaluate(self, step: int) -> dict:
        """Metrics on the validation set; a damaged image there is reported, and does not end the run."""
        if self.validation is None:
            return {}
        model, config = self.checkpoint.model, self.checkpoint.config
        try:
            results = evaluate(model, self.validation, config, config.model.max_detections)
        except DataError as error:
            return self.log.evaluation_error(step, error)
        # Before the line that says so: a run that is stopped in between evaluates again when it is resumed.
        if self.log.note_best(step, results):
            save_checkpoint(self.output / "best.pt", self.checkpoint)
            if not self.save_is_due:
                self.save()  # again, with the AP that best.pt is to be compared with: the line may be lost
        return self.log.evaluation(step, results)
