"""A provider that cheats gets no time: each test plants one way of being fast without doing the work."""

import threading
import time

import pytest
import torch
from tiny_workloads import tiny

from bench import measure
from bench.measure import TWIN, measure_call
from bench.memory import is_out_of_memory, ran_out
from bench.providers import Provider, Variant, get_provider
from bench.timing import SLOW_ROUNDS, CpuClock, left_running
from bench.workloads import Call

FORWARD = Call(tiny("roi_align"), "forward", torch.float32)
BACKWARD = Call(tiny("mask_bce_loss"), "backward", torch.float32)
LABELS = Call(tiny("label_anchors"), "forward", torch.float32)
SECONDS = 0.3


def measure_with(monkeypatch, call, cheat, order=("torch", "cheat")):
    """Rows of the honest reference and of `cheat`, a function of the honest one that returns what to call."""
    honest = get_provider("torch", call.workload.op)

    def choose(name, op):
        return Provider(name, op, cheat(honest.call)) if name == "cheat" else honest

    layout = "nchw" if call.workload.op == "roi_align" else "contiguous"
    monkeypatch.setattr(measure, "get_provider", choose)
    monkeypatch.setattr(measure, "variants", lambda call: [Variant(p, call.dtype, layout) for p in order])
    return measure_call(call, "cpu", SECONDS)


def assert_only_the_cheat_is_red(rows, reason):
    honest, cheat = rows
    # On a busy machine either may be taken for a slow call, which gets fewer rounds.
    assert honest["status"] == "ok" and len(honest["times"]["op_eager"]) >= SLOW_ROUNDS
    assert len(honest["twin"]["op_eager"]) >= SLOW_ROUNDS
    assert cheat["status"] == "red" and reason in cheat["reason"]
    assert "times" not in cheat and "first_call" not in cheat


@pytest.mark.parametrize("call", [FORWARD, LABELS], ids=str)
def test_a_result_kept_from_an_earlier_call_is_caught(monkeypatch, call):
    # The same inputs every time would hide it: they change after timing, in the same tensors, so that no key helps.
    def keep(op):
        kept = []

        def run(*args):
            if not kept:
                kept.append(op(*args))
            return kept[0]

        return run

    assert_only_the_cheat_is_red(measure_with(monkeypatch, call, keep), "after timing")


def test_a_result_kept_by_address_and_version_is_caught(monkeypatch):
    # The commonest key of a cache: PyTorch counts the writes to a tensor, and so would see an ordinary copy.
    def keep(op):
        kept = {}

        def run(*args):
            key = tuple((a.data_ptr(), a._version) for a in args if isinstance(a, torch.Tensor))
            if key not in kept:
                kept[key] = op(*args)
            return kept[key]

        return run

    assert_only_the_cheat_is_red(measure_with(monkeypatch, FORWARD, keep), "after timing")


def test_an_error_after_timing_costs_its_own_row_only(monkeypatch):
    # Out of memory in the second check, say: a call's worth of time on a GPU must not be lost with it.
    def later(op):
        calls = []

        def run(*args):
            calls.append(1)
            if len(calls) > 2 and not torch.equal(args[1], FORWARD.workload.build("cpu", torch.float32).args[1]):
                raise RuntimeError("no memory")
            return op(*args)

        return run

    assert_only_the_cheat_is_red(measure_with(monkeypatch, FORWARD, later), "RuntimeError: no memory")


def test_a_kept_gradient_is_caught(monkeypatch):
    # In a backward pass the incoming gradient changes.
    def keep(op):
        class Kept(torch.autograd.Function):
            @staticmethod
            def forward(ctx, logits, *rest):
                with torch.enable_grad():
                    leaf = logits.detach().requires_grad_()
                    ctx.inside = op(leaf, *rest)
                ctx.leaf, ctx.grad = leaf, None
                return ctx.inside.detach()

            @staticmethod
            def backward(ctx, grad):
                if ctx.grad is None:
                    (ctx.grad,) = torch.autograd.grad(ctx.inside, ctx.leaf, grad, retain_graph=True)
                return ctx.grad, None, None

        return Kept.apply

    assert_only_the_cheat_is_red(measure_with(monkeypatch, BACKWARD, keep), "after timing")


def test_work_skipped_after_the_check_is_caught(monkeypatch):
    # Right the first time it is looked at, lazy while the clock runs.
    def lazy(op):
        calls = []

        def run(*args):
            calls.append(1)
            return op(*args) if len(calls) < 3 else torch.empty_like(op(*args)).fill_(1e-3)

        return run

    assert_only_the_cheat_is_red(measure_with(monkeypatch, FORWARD, lazy), "after timing")


@pytest.mark.parametrize("fill", [0.0, float("nan")])
def test_an_unwritten_output_is_caught(monkeypatch, fill):
    # Zeros and NaN are what memory holds when a kernel writes nothing.
    def blank(op):
        return lambda *args: torch.full_like(op(*args), fill)

    assert_only_the_cheat_is_red(measure_with(monkeypatch, FORWARD, blank), "exceeds")


def test_half_the_rois_are_caught(monkeypatch):
    # A grid that is too small leaves the last RoIs out.
    def half(op):
        def run(feature, rois, *rest):
            out = op(feature, rois, *rest)
            out[len(rois) // 2 :] = 0
            return out

        return run

    assert_only_the_cheat_is_red(measure_with(monkeypatch, FORWARD, half), "exceeds")


class Streams(CpuClock):
    """A device with a second stream, played by threads: the caller's own stream is always done at once."""

    def __init__(self):
        self.threads = []

    def synchronize(self):
        for thread in self.threads:
            thread.join()
        self.threads.clear()


def test_work_on_another_stream_is_noticed():
    # Events on the caller's stream see nothing of it. What is left when that stream is done gives it away.
    clock = Streams()

    def elsewhere():
        clock.threads.append(threading.Thread(target=time.sleep, args=(0.05,)))
        clock.threads[-1].start()

    assert left_running(elsewhere, clock, repeats=2) > 0.02
    assert left_running(lambda: time.sleep(0.01), clock, repeats=2) < 0.005


def test_another_stream_turns_the_row_red(monkeypatch):
    # The number alone would be read by nobody.
    monkeypatch.setattr(measure, "left_running", lambda call, clock, repeats: 0.1 * (call.variant.provider == "cheat"))
    rows = measure_with(monkeypatch, FORWARD, lambda op: op)
    assert_only_the_cheat_is_red(rows, "after the call's stream had finished")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_real_second_stream_turns_the_row_red(monkeypatch):
    honest, side = get_provider("torch", "roi_align"), torch.cuda.Stream()

    def run(*args):
        result = honest.call(*args)
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)  # work that nobody waits for
        return result

    monkeypatch.setattr(measure, "get_provider", lambda name, op: Provider(name, op, run))
    monkeypatch.setattr(measure, "variants", lambda call: [Variant("cheat", call.dtype, "nchw")])
    (row,) = measure_call(FORWARD, "cuda", SECONDS)
    assert row["status"] == "red" and "the device worked on" in row["reason"]


def test_an_error_costs_its_own_row_only(monkeypatch):
    # One baseline that cannot run must not take the others' times with it.
    def broken(op):
        def run(*args):
            raise RuntimeError("no kernel\nfor this")

        return run

    honest, cheat = measure_with(monkeypatch, FORWARD, broken)
    assert honest["status"] == "ok"
    assert (cheat["status"], cheat["reason"]) == ("failed", "RuntimeError: no kernel")


MESSAGES = {
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.77 GiB. GPU 0 has a total ..."): "9.77",
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 512.00 MiB. GPU 0 ..."): "0.5",
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 3221225472 bytes."): "3",
}


@pytest.mark.parametrize("error", MESSAGES, ids=MESSAGES.get)
@pytest.mark.parametrize("after", [0, 1, 2, 9], ids="call {}".format)
def test_out_of_memory_is_a_row_that_says_so(monkeypatch, error, after):
    # At once, beside the others, or in the middle of their times: with the matrix of all pairs it is the finding, and
    # the others' times must not be lost with it.
    def greedy(op):
        calls = []

        def run(*args):
            calls.append(1)
            if len(calls) > after:
                raise error
            return op(*args)

        return run

    honest, greedy_row = measure_with(monkeypatch, LABELS, greedy)
    assert honest["status"] == "ok" and len(honest["times"]["op_eager"]) >= SLOW_ROUNDS and TWIN in honest
    assert greedy_row["status"] == "failed" and not {"times", TWIN, "noise", "first_call"} & set(greedy_row)
    assert greedy_row["reason"] == f"out of memory (asked for {MESSAGES[error]} GiB)"
    assert ran_out(greedy_row) and not ran_out(honest)


def test_out_of_memory_of_the_first_provider(monkeypatch):
    # The twin belongs to the first that is timed: where that one fails, the next has it, and the call has its noise.
    def greedy(op):
        calls = []

        def run(*args):
            calls.append(1)
            if len(calls) > 9:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return op(*args)

        return run

    rows = measure_with(monkeypatch, LABELS, greedy, order=("cheat", "torch"))
    assert [row["status"] for row in rows] == ["failed", "ok"] and rows[0]["reason"] == "out of memory"
    assert TWIN in rows[1] and rows[1]["noise"]["op_eager"] >= 0


def test_other_errors_are_not_taken_for_out_of_memory():
    # A row that says so is a result, and is not tried again.
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_without_time_only_the_gate_runs():
    # `--benchmark-disable` is the quick check that all providers are right.
    rows = measure_call(FORWARD, "cpu", seconds=0)
    assert {r["status"] for r in rows} == {"ok", "skipped"} and not any("times" in r for r in rows)


def test_bytes_kept_for_backward_are_counted():
    # Our mask loss keeps logits, labels and targets; a provider that keeps less is better, so it must show.
    rows = measure_call(BACKWARD, "cpu", seconds=0, leave_out={"torch.compile": "takes seconds"})
    rows = [row for row in rows if row["provider"] == "torchvision"]
    logits, labels, targets = BACKWARD.workload.build("cpu", torch.float32).args
    picked = logits[:, 0].numel() * 4
    assert [row["layout"] for row in rows] == ["channels_last", "nchw"]
    for row in rows:
        assert row["saved_bytes"] >= picked + labels.numel() * 8 + targets.numel() * 4
        assert row["saved_bytes"] < logits.numel() * 4  # not the logits themselves


class Counting(CpuClock):
    """As if it counted memory: notes what it is asked about, and is short of it for both passes."""

    def __init__(self, short=None):
        self.asked, self.short = [], short

    def peak_memory(self, call):
        call()
        self.asked.append(call)
        if self.short and len(self.asked) % 2 == 0:
            raise self.short
        return 10 * len(self.asked)


@pytest.mark.parametrize("short", [None, torch.OutOfMemoryError("CUDA out of memory.")])
def test_memory_of_both_passes(monkeypatch, short):
    # What the forward keeps is not in the backward's own peak: the sum of the two is what a step has to have. For want
    # of it a row is left without that number, not without its times.
    clock = Counting(short)
    monkeypatch.setattr(measure, "make_clock", lambda device: clock)
    rows = measure_with(monkeypatch, BACKWARD, lambda op: op)
    assert [row["status"] for row in rows] == ["ok", "ok"] and [row["peak_memory_bytes"] for row in rows] == [10, 30]
    assert [row["step_memory_bytes"] for row in rows] == ([20, 40] if short is None else [None, None])
    assert clock.asked[1] == clock.asked[0].both_passes


def test_a_forward_pass_has_no_memory_of_both(monkeypatch):
    monkeypatch.setattr(measure, "make_clock", lambda device: Counting())
    rows = measure_with(monkeypatch, LABELS, lambda op: op)
    assert [row["step_memory_bytes"] for row in rows] == [None, None]
