"""The training step: eager, compiled and captured are the same step."""

import copy
import dataclasses
from contextlib import contextmanager

import pytest
import torch
from forbid_sync import forbid_sync
from model_inputs import FEW, shapes_batch

from kernels import use_backend
from mrcnn.config import load_config
from mrcnn.graphs import is_compiler_error
from mrcnn.modeling import MaskRCNN
from mrcnn.step import TrainingStep

MODEL = dataclasses.replace(FEW, norm="frozen_bn")
SETTINGS = load_config("tiny", ["train.optimizer=sgd", "train.lr=1e-3", "train.clip_norm=10"]).train


def model_of(device: torch.device) -> MaskRCNN:
    torch.manual_seed(0)
    return MaskRCNN(MODEL).train().to(device)


def run(model: MaskRCNN, device: torch.device, steps: int = 3, **changes) -> tuple[list[dict], list[str], TrainingStep]:
    """Losses of each step from the same seed, what was noted, and the step."""
    notes: list[str] = []
    step = TrainingStep(model, dataclasses.replace(SETTINGS, **changes), on_note=notes.append)
    torch.manual_seed(1)
    batch = shapes_batch().to(device)
    losses = [{name: loss.item() for name, loss in step(batch).items()} for _ in range(steps)]
    return losses, notes, step


@pytest.fixture
def quick_compiler(monkeypatch, device):
    """torch.compile without code generation on a CPU, where that takes minutes; all before it is the same."""
    torch._dynamo.reset()
    if device.type == "cpu":
        compile_ = torch.compile
        monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compile_(*args, **kwargs, backend="aot_eager"))


def test_compiled_is_eager(device, quick_compiler):
    # Three steps: losses of the first are the eager ones, weights have moved alike.
    models = [model_of(device), model_of(device)]
    (eager, _, plain), (compiled, notes, step) = run(models[0], device), run(models[1], device, compile=True)
    assert notes == [] and (plain.mode, step.mode) == ("eager", "compiled")
    for name, loss in eager[0].items():
        assert compiled[0][name] == pytest.approx(loss, rel=1e-5), name
    for found, expected in zip(models[1].parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_batches_with_other_masks_are_not_compiled_again(device, quick_compiler):
    # Only the length of the pool differs; a compilation for each would reach torch.compile's limit in eight steps.
    torch._dynamo.utils.counters.clear()
    step = TrainingStep(model_of(device), dataclasses.replace(SETTINGS, compile=True), on_note=pytest.fail)
    batch = shapes_batch().to(device)
    pool = batch.targets.masks
    for extra in (0, 5, 64):
        longer = dataclasses.replace(pool, bitmaps=torch.cat([pool.bitmaps, pool.bitmaps.new_zeros(extra)]))
        step(dataclasses.replace(batch, targets=dataclasses.replace(batch.targets, masks=longer)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


class Broken:
    """A model whose compiled form fails, as a compiler without a C++ compiler does; `backward` fails there only."""

    def __init__(self, model: MaskRCNN, error: Exception, backward: bool) -> None:
        self.model, self.error, self.backward = model, error, backward

    def __call__(self, *args):
        if not self.backward:
            raise self.error
        losses = self.model(*args)
        losses["loss_mask"].register_hook(self.fail)
        return losses

    def fail(self, grad):
        raise self.error


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    "error",
    [
        torch._dynamo.exc.TorchDynamoException("no compiler\nlong story"),
        torch._dynamo.exc.FailOnRecompileLimitHit("no compiler"),
    ],
)
def test_what_cannot_be_compiled_runs_eagerly(backward, error, device, monkeypatch):
    # The step is taken all the same, once; backward is compiled late, when losses are there already.
    monkeypatch.setattr(torch, "compile", lambda model, **options: Broken(model, error, backward))
    found = model_of(device)
    losses, notes, step = run(found, device, steps=2, compile=True)
    assert notes == [f"not compiled: {type(error).__name__}: no compiler"] and step.mode == "eager"
    if not backward:  # which draws no sample in vain
        expected = model_of(device)
        assert losses == run(expected, device, steps=2)[0]
        assert all(map(torch.equal, found.parameters(), expected.parameters()))


def test_an_error_of_the_model_is_not_the_compilers(device, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **options: Broken(model, RuntimeError("out of range"), False))
    with pytest.raises(RuntimeError, match="out of range"):
        run(model_of(device), device, compile=True)


def test_graphs_without_a_gpu(monkeypatch):
    # On a CPU they are left out, with the reason; the result is the same to the last bit.
    models = [model_of(torch.device("cpu")) for _ in range(2)]
    plain, _, _ = run(models[0], torch.device("cpu"))
    found, notes, step = run(models[1], torch.device("cpu"), cuda_graphs=True)
    assert notes == ["no CUDA graphs: CUDA graphs need a GPU"] and step.mode == "eager"
    assert found == plain and all(map(torch.equal, models[0].parameters(), models[1].parameters()))


def test_phases_enclose_the_step(device):
    # In this order, once each; the weights move in the last.
    model, seen = model_of(device), []

    @contextmanager
    def phase(name):
        seen.append((name, model.rpn.deltas.bias.clone(), model.rpn.deltas.bias.grad is not None))
        yield

    step = TrainingStep(model, SETTINGS, phase=phase)
    step(shapes_batch().to(device))
    assert [name for name, _, _ in seen] == ["forward", "backward", "update"]
    assert [has_gradient for _, _, has_gradient in seen] == [False, False, True]
    assert torch.equal(seen[0][1], seen[2][1]) and not torch.equal(seen[2][1], model.rpn.deltas.bias)


def test_the_whole_step_does_not_wait(device):
    # Forward to weights, with everything forbidden that makes a GPU's host wait.
    step = TrainingStep(model_of(device), SETTINGS)
    batch = shapes_batch().to(device)
    step(batch)
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with forbid_sync() if device.type == "cuda" else _triton_without_waits():
            losses = step(batch)
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert all(not loss.requires_grad for loss in losses.values())


@contextmanager
def _triton_without_waits():
    """On a CPU the ops look at their indices, which on a GPU they do not."""
    import importlib

    with pytest.MonkeyPatch.context() as patch, use_backend("triton"), forbid_sync():
        for op in ("roi_align", "mask_bce_loss", "mask_targets", "rpn_loss", "proposals"):
            module = importlib.import_module(f"kernels.{op}.op")
            patch.setattr(module, "check_indices", lambda *args, **kwargs: None)
        yield


@pytest.mark.parametrize("compiled", [False, True])
def test_captured_is_not_captured_to_the_last_bit(compiled, device):
    # The same compiled step with and without the graph, 12 steps of which the graph takes nine, in deterministic mode:
    # losses and weights. Two shapes take turns, in one memory pool.
    if device.type == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for graphs in (False, True):
            model = model_of(device).to(memory_format=torch.channels_last)
            step = TrainingStep(
                model, dataclasses.replace(SETTINGS, compile=compiled, cuda_graphs=graphs), on_note=pytest.fail
            )
            torch.manual_seed(1)
            wide = shapes_batch().to(device)
            tall = dataclasses.replace(wide, images=torch.cat([wide.images, wide.images.flip(2)], dim=2))
            losses = [copy.deepcopy(step(batch)) for _ in range(12) for batch in (wide, tall)]
            assert step.mode == ("captured" if graphs else "compiled" if compiled else "eager")
            results.append((losses, [p.detach().clone() for p in model.parameters()]))
    finally:
        torch.use_deterministic_algorithms(False)
    for found, expected in zip(*(losses for losses, _ in results), strict=True):
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(map(torch.equal, *(weights for _, weights in results)))


def test_compiler_errors_are_known():
    assert is_compiler_error(torch._dynamo.exc.Unsupported("graph break"))
    assert not is_compiler_error(RuntimeError("CUDA out of memory"))
