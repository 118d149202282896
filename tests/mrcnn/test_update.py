"""The update of the weights, on the device: schedule, clipping, and steps that are left out."""

import copy
import dataclasses

import pytest
import torch
from forbid_sync import forbid_sync
from torch import nn

from mrcnn.config import load_config
from mrcnn.modeling import MaskRCNN
from mrcnn.optim import Update, learning_rate_factor


def settings(*overrides: str):
    return load_config(
        "tiny", ["train.warmup_steps=0", "train.schedule=constant", "train.clip_norm=0", *overrides]
    ).train


def sgd(*overrides: str):
    decay = [f"train.{name}weight_decay=0" for name in ("", "norm_", "bias_")]
    return settings("train.optimizer=sgd", "train.lr=0.5", "train.momentum=0.9", *decay, *overrides)


def give(model: nn.Module, value: float) -> None:
    """Every gradient is `value`."""
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


@pytest.fixture
def model(device) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(device)


def test_the_schedule_moves_every_group(device):
    # The backbone keeps its share of the rate through warm-up and after a milestone; a run that is taken up later
    # has the rates of that step. Seen in the groups after each step.
    changes = ["train.backbone_lr_factor=0.1", "train.schedule=multistep", "train.steps=9", "train.warmup_steps=1"]
    config = sgd(*changes, "train.lr=1")
    model = MaskRCNN(load_config("tiny").model).to(device)
    for start in (0, 4):
        update = Update(model, config, start)
        assert all(group["momentum"] == 0.9 for group in update.optimizer.param_groups)
        for step in range(start, 9):
            update_without_gradients(update)
            expected = learning_rate_factor(step, config)
            for group in update.optimizer.param_groups:
                rate = expected * (0.1 if "backbone" in group["name"] else 1)
                assert group["lr"].item() == pytest.approx(rate, rel=1e-6)


def update_without_gradients(update: Update) -> None:
    update.optimizer.param_groups[0]["params"][0].grad = torch.zeros_like(update.optimizer.param_groups[0]["params"][0])
    update()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_it_is_the_optimizer_with_its_schedule(optimizer, device):
    # Against PyTorch's own, with a LambdaLR on the host, over warm-up and a milestone.
    changes = [f"train.optimizer={optimizer}", "train.schedule=multistep", "train.steps=6", "train.warmup_steps=2"]
    config = settings(*changes, "train.lr=0.01", "train.weight_decay=0.1", "train.bias_weight_decay=0.1")
    results = []
    for ours in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(5, 3).to(device)
        if ours:
            update = Update(model, config)
        else:
            kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]
            options = {"momentum": config.momentum} if optimizer == "sgd" else {}
            plain = kind(model.parameters(), config.lr, weight_decay=0.1, **options)
            schedule = torch.optim.lr_scheduler.LambdaLR(plain, lambda step: learning_rate_factor(step, config))
        for step in range(6):
            torch.manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape).to(device)
            if ours:
                update()
            else:
                plain.step()
                schedule.step()
        results.append(weights(model))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("norm", "moved"), [(0.5, 0.5), (100.0, None), (0.0, None)])
def test_clipping_limits_the_step(norm, moved, model):
    # Plain SGD with lr 0.5: the weights move by half the gradient, whose norm is the limit; a limit above the
    # gradient's norm, and none, leave it as it is.
    before = weights(model)
    update = Update(model, sgd(f"train.clip_norm={norm}"))
    give(model, 2.0)
    update()
    expected = 0.5 * (moved or 2.0 * len(before) ** 0.5)
    assert (weights(model) - before).norm().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e38])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_step_without_a_finite_gradient_changes_nothing(bad, clip, model):
    # One number of one gradient is enough; 1e38 in all of them, whose norm is beyond fp32. Weights and momentum stay,
    # so that the next step is what it would have been without it; the schedule goes on.
    update = Update(model, sgd(f"train.clip_norm={clip}"))
    give(model, 1.0)
    update()
    before = weights(model)
    give(model, 1.0 if abs(bad) != 1e38 else bad)
    next(model.parameters()).grad[0, 0] = bad
    update()
    assert torch.equal(weights(model), before)
    assert update.skipped() == (1, 1, 1)
    give(model, 1.0)
    update()
    scale = 1.0 if clip == 0 else 1 / (len(before) ** 0.5)
    torch.testing.assert_close(before - weights(model), torch.full_like(before, 0.5 * 1.9 * scale))
    assert update.skipped() == (1, 0, 0)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_first_step_may_be_left_out(optimizer, model, device):
    # PyTorch's fused SGD makes its momentum in the first step without writing it: were that step left out, the second
    # would take whatever is in that memory.
    torch.use_deterministic_algorithms(True)  # memory that nobody wrote is NaN
    try:
        update = Update(model, sgd(f"train.optimizer={optimizer}"))
        before = weights(model)
        give(model, float("nan"))
        update()
        assert torch.equal(weights(model), before)
        give(model, 1.0)
        update()
    finally:
        torch.use_deterministic_algorithms(False)
    moved = before - weights(model)
    assert moved.isfinite().all() and (moved > 0.4).all()  # by the rate, as in a first step


def test_counts_of_steps_left_out(model):
    # The longest row counts from one asking to the next, a good step in between or not.
    update = Update(model, sgd())
    bad = float("nan")
    for gradients, expected in (([1.0], (0, 0, 0)), ([bad], (1, 1, 1)), ([bad, bad], (3, 3, 3)), ([1.0], (3, 0, 0)),
                                ([bad, bad, 1.0, bad, 1.0], (6, 0, 2))):  # fmt: skip
        for gradient in gradients:
            give(model, gradient)
            update()
        assert update.skipped() == expected


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_nothing_waits_for_the_device(optimizer, clip, model, device):
    update = Update(model, sgd(f"train.optimizer={optimizer}", f"train.clip_norm={clip}"))
    for _ in range(2):
        give(model, 1.0)
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            with forbid_sync():
                update()
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_state_goes_round(optimizer, model, device):
    # Rates are plain numbers in it; what is loaded goes on as what was saved, and its rates still follow the schedule.
    config = sgd(f"train.optimizer={optimizer}", "train.schedule=cosine", "train.steps=4")
    update = Update(model, config)
    for gradient in (1.0, float("nan")):
        give(model, gradient)
        update()
    state = copy.deepcopy(update.state_dict())  # as a file would hold it
    assert all(type(group["lr"]) is float for group in state["optimizer"]["param_groups"])
    twin = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(device)
    twin.load_state_dict(model.state_dict())
    resumed = Update(twin, config, start=2)
    resumed.load_state_dict(state)
    assert resumed.skipped() == (1, 0, 0)  # in a row counts from here
    for u, m in ((update, model), (resumed, twin)):
        for gradient in (1.0, -2.0):
            give(m, gradient)
            u()
    assert torch.equal(weights(model), weights(twin))
    assert [g["lr"].item() for g in resumed.optimizer.param_groups] == [
        g["lr"].item() for g in update.optimizer.param_groups
    ]


def test_more_steps_than_the_run_has(model):
    # A benchmark takes as many as it likes: the last rate stays.
    update = Update(model, dataclasses.replace(sgd("train.schedule=cosine"), steps=2))
    rates = []
    for _ in range(4):
        give(model, 1.0)
        update()
        rates.append(update.optimizer.param_groups[0]["lr"].item())
    assert rates[1:] == [rates[1]] * 3 and rates[0] > rates[1]


def test_how_an_optimizer_runs_is_its_own(model):
    # Not that of the state, which may come from a CPU, where nothing can be captured, or from another version.
    config = sgd("train.optimizer=adamw")
    update = Update(model, config)
    give(model, 1.0)
    update()
    state = copy.deepcopy(update.state_dict())
    for group in state["optimizer"]["param_groups"]:
        group |= {"capturable": True, "foreach": True, "fused": None}
    resumed = Update(model, config)
    resumed.load_state_dict(state)
    assert all(g["fused"] and not g["foreach"] and not g["capturable"] for g in resumed.optimizer.param_groups)
    give(model, 1.0)
    resumed()
