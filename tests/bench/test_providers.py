"""Which rows a call has, and what the less usual providers do."""

import pytest
import torch
from tiny_workloads import tiny

from bench import measure
from bench.gate import Truth, listed
from bench.measure import Contestant, Draws, measure_call
from bench.providers import (
    APART,
    ATOMIC,
    BASELINES,
    DETERMINISTIC_TORCHVISION,
    Provider,
    Variant,
    deterministic,
    get_provider,
    is_ours,
    variants,
    why_not_here,
)
from bench.repeats import MOST_RUNS, repeats_bit_for_bit
from bench.timing import CpuClock
from bench.workloads import DETERMINISTIC, ROI_OPS, Call, Sizes, Workload, calls


def providers(call):
    return {v.provider for v in variants(call)}


def test_each_form_stands_where_it_was_asked_for():
    # Atomics beside the gather where training and the worst cases are; torchvision's deterministic mode only where it
    # has the memory: at training sizes it would take down the study.
    for call in calls("cuda"):
        found, workload = providers(call), call.workload
        pooled = workload.op in ROI_OPS and call.direction == "backward"
        assert (ATOMIC in found) == (pooled and workload.suite in ("train", "adversarial"))
        assert (APART in found) == (workload.op == "joint_multiscale_roi_align")
        assert (DETERMINISTIC_TORCHVISION in found) == (workload.name == DETERMINISTIC)
        assert found >= {"triton", *BASELINES}


def test_what_is_ours_is_no_baseline():
    # Else a kernel that lost to its own other form would be reported as slower than the best baseline.
    assert [p for p in (*BASELINES, ATOMIC, APART, DETERMINISTIC_TORCHVISION, "triton") if is_ours(p)] == [
        ATOMIC,
        APART,
        "triton",
    ]
    assert not set(BASELINES) & {ATOMIC, APART, DETERMINISTIC_TORCHVISION, "triton"}


def test_on_a_cpu_the_flag_changes_nothing():
    # torchvision looks at it on a GPU only: a time under that name would be the ordinary op's.
    call = next(c for c in calls("cuda") if c.workload.name == DETERMINISTIC)
    reason = why_not_here(DETERMINISTIC_TORCHVISION, call, "cpu")
    assert "on a CPU" in reason and why_not_here(DETERMINISTIC_TORCHVISION, call, "cuda") is None
    assert "interpreter speed" in why_not_here(ATOMIC, call, "cpu")


@pytest.mark.parametrize("before", [False, True])
def test_deterministic_mode_ends_with_the_call(before):
    # Left on, it would slow down, or break, whoever is measured next.
    torch.use_deterministic_algorithms(before, warn_only=before)
    try:
        with pytest.raises(KeyError), deterministic():
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            raise KeyError
        assert torch.are_deterministic_algorithms_enabled() == before
        assert torch.is_deterministic_algorithms_warn_only_enabled() == before
    finally:
        torch.use_deterministic_algorithms(False)


def test_deterministic_mode_is_on_forward_and_backward(monkeypatch):
    # The forward decides which path is taken, the backward which gradient of an index there is.
    seen = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, feature, *rest):
            seen.append(torch.are_deterministic_algorithms_enabled())
            return feature.sum()[None]

        @staticmethod
        def backward(ctx, grad):
            seen.append(torch.are_deterministic_algorithms_enabled())
            return torch.zeros(2, 3, 32, 42), *[None] * 4

    assert get_provider(DETERMINISTIC_TORCHVISION, "roi_align").mode is deterministic
    watched = Provider("watched", "roi_align", Watched.apply, mode=deterministic)
    monkeypatch.setattr(measure, "get_provider", lambda name, op: watched)
    variant = Variant("watched", torch.float32, "nchw")
    Contestant(variant, Draws(Call(tiny("roi_align"), "backward", torch.float32), "cpu"), CpuClock())()
    assert seen == [True, True, True] and not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("op", "provider"),
    [*((op, ATOMIC) for op in ROI_OPS), *(("joint_multiscale_roi_align", p) for p in ("triton", APART))],
)
def test_our_forms_pass_the_gate(op, provider, device):
    # Without a GPU no study runs them: in the interpreter they have to give what the reference does, lists and all.
    sizes = Sizes(1, (64, 96), rois=4, mask_rois=2, channels=3, stride=8)
    inputs = Workload(op, "mini", "cpu", sizes).build(device.type, torch.float32, "channels_last", grad=True)
    outputs = listed(get_provider(provider, op)(inputs))
    truth, grad_outputs = Truth(op, inputs), [torch.randn_like(o) for o in outputs]
    truth.check_forward(outputs, torch.float32).require()
    grads = torch.autograd.grad(outputs, inputs.leaves, grad_outputs)
    truth.check_backward(grads, grad_outputs, torch.float32).require()


@pytest.mark.parametrize("op", ROI_OPS)
def test_backwards_say_whether_they_repeat(op):
    # What the column of the report is made of. A forward pass, and other ops, have nothing to say.
    rows = {r["provider"]: r for r in measure_call(Call(tiny(op), "backward", torch.float32), "cpu", 0.1)}
    assert (rows["torchvision"]["bitwise"], rows["torchvision"]["runs"]) == (True, MOST_RUNS["cpu"])
    assert "bitwise" not in rows["torch"] and "bitwise" not in rows["triton"]
    forward = measure_call(Call(tiny(op), "forward", torch.float32), "cpu", 0.1)
    assert not any("bitwise" in row for row in forward)


@pytest.mark.parametrize(("changed", "runs"), [(None, 3), (1e-45, 2), (-0.0, 2), (float("nan"), 2)])
def test_a_single_bit_is_seen(changed, runs):
    # An equality that tolerates anything would call atomics deterministic; NaN is a result like any other.
    count = []

    def call():
        count.append(1)
        grads = [torch.zeros(4).bfloat16(), torch.tensor([0.0, float("nan"), 1.0])]
        if changed is not None and len(count) == 3:
            grads[1][0] = changed
        return grads

    assert repeats_bit_for_bit(call, "cpu") == (changed is None, runs)
