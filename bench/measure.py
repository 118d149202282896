"""One call, all its providers: check, time in interleaved rounds, change the inputs, check again. One row a variant.

A row is a plain dict, the same in pytest-benchmark's `extra_info`, in a study's file and in the report. Only one whose
status is "ok" has times:

| key | value |
| --- | --- |
| op, direction, workload, suite, dtype | the call |
| provider, layout, measured_dtype, device | the variant, and where it ran |
| status, reason | "ok"; "red": a wrong result; "skipped": cannot run here; "failed": an error, or too little memory |
| times | {name: [seconds, a sample a round]}; see `timing` |
| first_call | seconds; compiles what no earlier row of the process has compiled |
| noise | of the call: {name: how far the same variant, measured a second time, was from itself} |
| twin | on one row a call: the samples of that second time |
| error, tolerance | the larger of the errors before and after timing, against the reference in float64 |
| peak_memory_bytes, saved_bytes | a call's peak beyond what was there; what is kept from forward to backward |
| step_memory_bytes | of a backward's row: the peak of a forward and a backward pass together, beyond the inputs |
| floor, model | the fewest bytes and instructions that the call can do with, and the hash of how they were counted |
| waits | whether the host waits for the device inside the call |
| bitwise, runs | of RoI ops' backward, not in sweeps: whether `runs` more gave the same bits (if not: the last) |
| inputs, sources, method | hashes and version: a result of other inputs, code or method is stale |
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict

import torch
from torch import Tensor

from .floors import floor
from .gate import Check, Truth, WrongResultError
from .inputs import Inputs, overwrite
from .memory import OutOfMemoryError, give_back_memory, is_out_of_memory, out_of_memory_text, ran_out
from .parts import count_images, listed, random_images
from .providers import BASELINES, Variant, get_provider, is_ours, may_decide_otherwise, variants, why_not_here
from .repeats import repeats_bit_for_bit
from .sources import model_hash, source_hash
from .timing import METHOD, Clock, left_running, make_clock, time_calls
from .verdicts import noise_floor
from .workloads import DTYPE_NAMES, ROI_OPS, Call, Workload

SECONDS = {"cuda": 2.0, "cpu": 0.3}  # of timing, a call and all its providers
TWIN = "twin"


class Draws:
    """The inputs that all variants of a call share, and the right answers to them."""

    def __init__(self, call: Call, device: str) -> None:
        self.call, self.device = call, device
        self._inputs: dict[tuple[torch.dtype, str], Inputs] = {}
        self._truths: dict[torch.dtype, Truth] = {}
        self._fresh = 0

    def inputs(self, dtype: torch.dtype, layout: str) -> Inputs:
        """The same values in any dtype and layout."""
        key = (dtype, layout)
        if key not in self._inputs:
            grad = self.call.direction == "backward"
            self._inputs[key] = self.call.workload.build(self.device, dtype, layout, grad, self._fresh)
        return self._inputs[key]

    def truth(self, dtype: torch.dtype) -> Truth:
        """For the inputs in `dtype`: rounding them is not the provider's fault."""
        if dtype not in self._truths:
            inputs = next(i for (d, _), i in self._inputs.items() if d == dtype)
            op = self.call.workload.op
            count = count_images(op, inputs)
            images = random_images(count) if self._fresh and count else None
            self._truths[dtype] = Truth(op, inputs, images)
        return self._truths[dtype]

    def grad_outputs(self, outputs: list[Tensor]) -> list[Tensor]:
        """Incoming gradients, the same for every variant, each in the layout of its output."""
        generator = torch.Generator(self.device).manual_seed(self._fresh)
        values = [torch.randn(output.shape, generator=generator, device=self.device) for output in outputs]
        return [torch.empty_like(o, requires_grad=False).copy_(v) for o, v in zip(outputs, values, strict=True)]

    def refresh(self) -> None:
        """Other values in the same tensors. A backward pass keeps its inputs: there the incoming gradient changes."""
        self._fresh += 1
        self._truths.clear()
        if self.call.direction == "forward":
            for (dtype, layout), inputs in self._inputs.items():
                inputs.overwrite(self.call.workload.build(self.device, dtype, layout, fresh=self._fresh))


class Contestant:
    """A variant, ready to be called again and again. Making one runs it once: that is the first call."""

    def __init__(self, variant: Variant, draws: Draws, clock: Clock) -> None:
        self.variant, self.draws = variant, draws
        self.op, self.backward = draws.call.workload.op, draws.call.direction == "backward"
        self.inputs = draws.inputs(variant.dtype, variant.layout)
        self.provider = get_provider(variant.provider, self.op)
        self.adapted = self.provider.adapt(self.inputs)
        self.saved_bytes: int | None = None
        clock.synchronize()
        start = time.perf_counter()
        self._first()
        clock.synchronize()
        self.first_call = time.perf_counter() - start

    def __call__(self) -> object:
        """What is timed: the forward pass, or the backward pass over a forward pass that is kept.

        Raises:
            OutOfMemoryError: it needs more memory than there is. Where many are timed together, it says who did.
        """
        try:
            if self.backward:
                with self.provider.mode():
                    return torch.autograd.grad(self.outputs, self.adapted.leaves, self.grad_outputs, retain_graph=True)
            with torch.no_grad():
                return self.provider(self.adapted)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise OutOfMemoryError(self, error) from None
            raise

    def both_passes(self) -> object:
        """A forward pass and its backward pass, which frees what the forward kept."""
        with self.provider.mode():
            return torch.autograd.grad(listed(self.provider(self.adapted)), self.adapted.leaves, self.grad_outputs)

    def check(self) -> Check:
        """Run, and compare with the truth; raises `WrongResultError`."""
        truth, dtype = self.draws.truth(self.variant.dtype), self.variant.dtype
        if self.backward:
            return truth.check_backward(self(), self.grad_outputs, dtype).require()
        return truth.check_forward(self(), dtype, may_decide_otherwise(self.variant.provider, self.op)).require()

    def refresh(self) -> None:
        """Follow `Draws.refresh`: the gradient's new values go into the tensor that the timed call reads.

        The new inputs are brought into the provider's form once more.
        """
        if not self.backward:
            self.adapted = self.provider.adapt(self.inputs)
        else:
            for tensor, values in zip(self.grad_outputs, self.draws.grad_outputs(self.outputs), strict=True):
                overwrite(tensor, values)

    def _first(self) -> None:
        if self.backward:
            output, self.saved_bytes = _counting_saved(lambda: self.provider(self.adapted))
            self.outputs = listed(output)
            self.grad_outputs = self.draws.grad_outputs(self.outputs)
        self()


def measure_call(
    call: Call, device: str, seconds: float | None = None, leave_out: Mapping[str, str] | None = None
) -> list[dict]:
    """Measure all variants of `call`; one row each, in their order. `seconds=0` checks and takes no times.

    Args:
        call: what to measure.
        device: "cuda" or "cpu".
        seconds: for timing all of them, by default `SECONDS`.
        leave_out: providers to skip, with the reason to note.

    Raises:
        torch.AcceleratorError: a kernel broke the CUDA context, and with it this process.
    """
    seconds = SECONDS[device] if seconds is None else seconds
    clock, draws = make_clock(device), Draws(call, device)
    rows, ready = [], []
    for variant in variants(call):
        row = _blank_row(call, variant, device)
        rows.append(row)
        reason = why_not_here(variant.provider, call, device) or (leave_out or {}).get(variant.provider)
        if reason is not None:
            row.update(status="skipped", reason=reason)
            continue
        contestant = _prepare(row, variant, draws, clock)
        if contestant is not None:
            ready.append((row, contestant))
        elif ran_out(row):
            give_back_memory()
    if seconds and (ready := _timed(_still_ready(ready, clock), clock, seconds)):
        _check_again(ready, draws)
        _repeat(ready, device)
    return rows


def failed_rows(call: Call, device: str, reason: str) -> list[dict]:
    """The rows of a call that could not be measured at all."""
    rows = []
    for variant in variants(call):
        skipped = why_not_here(variant.provider, call, device)
        outcome = {"status": "skipped", "reason": skipped} if skipped else {"status": "failed", "reason": reason}
        rows.append(_blank_row(call, variant, device) | outcome)
    return rows


def add_floors(call: Call, rows: list[dict]) -> None:
    """The fewest bytes and instructions of the call, in each row's own dtype; needs no GPU."""
    for row in rows:
        dtype = next(d for d, name in DTYPE_NAMES.items() if name == row["measured_dtype"])
        row["floor"] = _floor(call.workload, call.direction, dtype)
        row["model"] = model_hash()


@functools.cache
def _floor(workload: Workload, direction: str, dtype: torch.dtype) -> dict:
    return asdict(floor(workload.op, direction, workload.boxes_only(dtype), dtype))


def _blank_row(call: Call, variant: Variant, device: str) -> dict:
    workload = call.workload
    return {
        "op": workload.op,
        "direction": call.direction,
        "workload": workload.name,
        "suite": workload.suite,
        "dtype": call.dtype_name,
        "provider": variant.provider,
        "layout": variant.layout,
        "measured_dtype": DTYPE_NAMES[variant.dtype],
        "device": device,
        "inputs": workload.fingerprint,
        "sources": source_hash(workload.op),
        "method": METHOD,
    }


def _prepare(row: dict, variant: Variant, draws: Draws, clock: Clock) -> Contestant | None:
    """A contestant that passed the gate, or None with the reason in `row`."""
    try:
        contestant = Contestant(variant, draws, clock)
        checked = contestant.check()
    except torch.AcceleratorError:
        raise
    except Exception as error:
        row.update(_failure(error, variant.provider))
        return None
    row.update(
        status="ok", reason="", error=checked.error, tolerance=checked.tolerance, shapes=contestant.inputs.shapes(),
        first_call=_short(contestant.first_call), saved_bytes=contestant.saved_bytes,
    )  # fmt: skip
    return contestant


def _failure(error: Exception, provider: str) -> dict:
    """Status and reason. A baseline may be unable to run, for want of something to compile with."""
    from torch._dynamo.exc import TorchDynamoException

    text = f"{type(error).__name__}: {error}".strip().split("\n")[0][:300]
    if isinstance(error, WrongResultError):
        return {"status": "red", "reason": str(error)}
    if is_out_of_memory(error):
        return {"status": "failed", "reason": out_of_memory_text(error)}
    if not is_ours(provider) and isinstance(error, TorchDynamoException):
        return {"status": "skipped", "reason": f"cannot run this: {text}"}
    return {"status": "failed", "reason": text}


def _timed(ready: list[tuple[dict, Contestant]], clock: Clock, seconds: float) -> list[tuple[dict, Contestant]]:
    """Those that were timed: one that runs out of memory on the way fails alone, and the others begin again."""
    while ready:
        try:
            _time(ready, clock, seconds)
            return ready
        except OutOfMemoryError as error:
            (failed,) = [row for row, contestant in ready if contestant is error.contestant]
            ready = [(row, contestant) for row, contestant in ready if contestant is not error.contestant]
            _turn(failed, **_failure(error, failed["provider"]))
        give_back_memory()
    return ready


def _time(ready: list[tuple[dict, Contestant]], clock: Clock, seconds: float) -> None:
    """Fill in times, noise, memory and waits; a row whose work escapes the clock turns red."""
    calls = {str(c.variant): c for _, c in ready}
    baselines = [str(c.variant) for _, c in ready if c.variant.provider in BASELINES]
    # The twin stands last: had it stood beside its original, it would always find the caches as that left them.
    times = time_calls({**calls, TWIN: ready[0][1]}, clock, seconds, baselines)
    original, twin = times[str(ready[0][1].variant)], times[TWIN]
    noise = {name: noise_floor(original[name], twin[name]) for name in twin}
    for row, contestant in ready:
        row.update(times=_shortened(times[str(contestant.variant)]), noise=noise)
        row.update(waits=clock.waits(contestant), peak_memory_bytes=clock.peak_memory(contestant))
        row.update(step_memory_bytes=_step_memory(contestant, clock))
        eager = min(row["times"]["op_eager"])
        repeats = max(1, min(100, int(5e-3 / eager)))
        limit = max(5e-4, 0.2 * repeats * eager)
        left = min(left_running(contestant, clock, repeats) for _ in range(3))  # one may be a neighbour's doing
        if left > limit:
            _turn_red(row, f"the device worked on for {left:.1e} s after the call's stream had finished")
    ready[0][0][TWIN] = _shortened(twin)


def _step_memory(contestant: Contestant, clock: Clock) -> int | None:
    """The peak of both passes; None of a forward's row, and where there is no memory for them beside all the others."""
    if not contestant.backward:
        return None
    try:
        return clock.peak_memory(contestant.both_passes)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    give_back_memory()
    return None


def _still_ready(ready: list[tuple[dict, Contestant]], clock: Clock) -> list[tuple[dict, Contestant]]:
    """Those that run with all the others' memory in use, too; the rest fail alone."""
    kept = []
    for row, contestant in ready:
        try:
            contestant()
            clock.synchronize()
            kept.append((row, contestant))
        except torch.AcceleratorError:
            raise
        except Exception as error:
            _turn(row, **_failure(error, contestant.variant.provider))
    return kept


def _check_again(ready: list[tuple[dict, Contestant]], draws: Draws) -> None:
    """With other values in the same tensors: a result that was kept from an earlier call is now wrong."""
    draws.refresh()
    for row, contestant in ready:
        try:
            contestant.refresh()
            row["error"] = max(row["error"], contestant.check().error)
        except torch.AcceleratorError:
            raise
        except WrongResultError as error:
            _turn_red(row, f"after timing, with other inputs: {error}")
        except OutOfMemoryError as error:
            _turn(row, **_failure(error, row["provider"]))
        except Exception as error:  # of this row: the others' times still hold
            _turn_red(row, f"after timing, with other inputs: {type(error).__name__}: {error}".split("\n")[0][:300])


def _repeat(ready: list[tuple[dict, Contestant]], device: str) -> None:
    """Note which of the RoI ops' own backwards, ours and torchvision's, gives the same bits again and again."""
    for row, contestant in ready:
        compared = is_ours(row["provider"]) or row["provider"].startswith("torchvision")
        backward = row["op"] in ROI_OPS and row["direction"] == "backward"
        if compared and backward and row["status"] == "ok" and row["suite"] != "sweep":
            try:
                row["bitwise"], row["runs"] = repeats_bit_for_bit(contestant, device)
            except (OutOfMemoryError, torch.OutOfMemoryError):  # two sets of gradients beside all the others' memory
                continue  # the times hold


def _turn_red(row: dict, reason: str) -> None:
    _turn(row, "red", reason)


def _turn(row: dict, status: str, reason: str) -> None:
    """Its times mean nothing any more."""
    row.update(status=status, reason=reason)
    for key in ("times", TWIN, "noise", "first_call"):
        row.pop(key, None)


def _counting_saved(function: Callable[[], object]) -> tuple[object, int]:
    """Result, and the bytes of all tensors kept for backward (inputs as well: they cannot be freed either)."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = function()
    return output, sum(storages.values())


def _shortened(times: dict[str, list[float]]) -> dict[str, list[float]]:
    return {name: [_short(s) for s in samples] for name, samples in times.items()}


def _short(seconds: float) -> float:
    """Four digits: more is noise, and a study has fifty thousand samples."""
    return float(f"{seconds:.4g}")
