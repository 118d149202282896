"""`mrcnn-bench step`: what is measured in which order, what a killed run keeps, and one small real run."""

import json
import os
import signal
from itertools import pairwise

import pytest
import torch
from typer.testing import CliRunner

from bench.cli import app
from bench.step import bitwise, run
from bench.step.ours import Options
from bench.step.providers import BASELINE, LADDER, TOP, ablation, all_providers, in_order_of_value, ladder, top
from bench.step.record import STEP_FILE, Log, StepError, check_continues, read_record
from bench.step.workload import SMALL, Workload
from kernels.backend import OPS

ON_GPU_SIZES = (1, 8)


def test_rungs_change_one_thing_each():
    options = [rung.options for rung in ladder()]
    changed = [[key for key in after if after[key] != before[key]] for before, after in pairwise(options)]
    assert changed == [["layout"], ["ops"], ["joined"], ["compiled"], ["device_update"], ["graph"], ["fused"]]
    assert options[0]["ops"] == "torchvision" and options[0]["layout"] == "nchw"


def test_the_ablation_names_ops_that_there_are():
    single = [op for provider in ablation() for op in provider.options["reference"]]
    assert top().options == ladder()[6].options == vars(Options())
    assert set(single) <= set(OPS) and len(single) == len(set(single)) == 8


def test_the_most_valuable_rows_come_first():
    order = [p.name for p in in_order_of_value(list(all_providers(True, ON_GPU_SIZES)))]
    assert order[:5] == [
        *(f"torchvision {a} {b} eager" for a in ("channels_last", "nchw") for b in ("fp16", "bf16")),
        TOP,
    ]
    assert all("torch.compile" in name for name in order[5:9]) and order[9] == ladder()[-1].name
    assert len(order) == len(set(order)) == 8 + 8 + 9 + 2 * 7 + 2 + 1


def test_selections_are_by_words_and_groups():
    providers = list(all_providers(True, ON_GPU_SIZES))
    assert [p.name for p in run.choose(providers, ["bf16 eager nchw"], [BASELINE])] == ["torchvision nchw bf16 eager"]
    assert {p.group for p in run.choose(providers, [], [LADDER])} == {LADDER}
    with pytest.raises(StepError, match="no row matches 'fp64'"):
        run.choose(providers, ["fp64"], [])


class FakeRun:
    """Rows without a measurement: seconds a step by name; a name in `broken` fails."""

    def __init__(self, monkeypatch, seconds, broken=()):
        self.calls, self.seconds, self.broken = [], seconds, broken
        monkeypatch.setattr(run, "measure_provider", self.measure)
        monkeypatch.setattr(run, "prepare", self.prepare)
        workload = Workload(SMALL, None, torch.zeros(1), None, {}, {}, {"title": SMALL.title, "losses": {}})
        monkeypatch.setattr(run, "make_workload", lambda setting, device: workload)
        monkeypatch.setattr(run, "expected_losses", lambda workload: {})
        monkeypatch.setattr(run, "describe_commit", lambda: {"id": "invented", "dirty": None})  # git takes a second

    def prepare(self, provider, workload):
        return type("Rival", (), {"provider": provider})()

    def measure(self, provider, workload, rival, left, twin=False):
        self.calls.append((provider.name, rival and rival.provider.name))
        if provider.name in self.broken:
            return {"status": "failed", "reason": "planted"}
        seconds = self.seconds.get(provider.name, 1.0)
        row = {"status": "ok", "reason": "", "seconds_per_step": seconds, "images_per_second": 1 / seconds}
        reference = {"name": rival.provider.name, "block_seconds": [1.0]} if rival else None
        return row | {"mode": "eager", "reference": reference}

    def __call__(self, out, only=("torchvision eager", "torchvision torch.compile", TOP), **more):
        self.calls.clear()
        return run.run_step(out, torch.device("cpu"), only, ("baseline", "ladder"), **more)


EAGER = ("torchvision channels_last fp32 eager", "torchvision nchw fp32 eager")
COMPILED = tuple(name.replace("eager", "torch.compile") for name in EAGER)


def test_ours_is_measured_again_beside_a_better_baseline(tmp_path, monkeypatch):
    fake = FakeRun(monkeypatch, {EAGER[0]: 3.0, EAGER[1]: 2.0, COMPILED[0]: 1.8, COMPILED[1]: 1.5})
    fake(tmp_path)
    assert fake.calls == [
        (EAGER[0], None),
        (EAGER[1], EAGER[0]),
        (TOP, EAGER[1]),
        (COMPILED[0], EAGER[1]),  # two compiled ones are never alive at once
        (COMPILED[1], EAGER[1]),
        (TOP, COMPILED[1]),
    ]
    assert read_record(tmp_path).row(TOP)["reference"]["name"] == COMPILED[1]
    assert fake(tmp_path).measured == [] and fake.calls == []  # nothing is measured twice


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    fake = FakeRun(monkeypatch, {})
    fake(tmp_path, only=("torchvision eager",))
    with (tmp_path / STEP_FILE).open("a") as file:
        file.write('{"kind": "row", "name": "cut o')  # as a kill leaves it
    progress = fake(tmp_path)
    assert progress.kept == list(EAGER) and fake.calls[0] == (TOP, EAGER[0])
    lines = [json.loads(line) for line in (tmp_path / STEP_FILE).read_text().splitlines()]
    assert [line["session"] for line in lines if line["kind"] == "session"] == [1, 2]


def test_what_failed_is_tried_again_last(tmp_path, monkeypatch):
    fake = FakeRun(monkeypatch, {}, broken=(EAGER[0],))
    progress = fake(tmp_path)
    assert progress.failed == {EAGER[0]: "planted"} and TOP in progress.measured
    fake.broken = ()
    fake(tmp_path, only=("torchvision eager", "2 channels_last"))
    assert [name for name, _ in fake.calls] == ["2 channels_last", EAGER[0]]


def test_changed_code_is_measured_again(tmp_path, monkeypatch):
    fake = FakeRun(monkeypatch, {})
    fake(tmp_path)
    monkeypatch.setattr(run, "source_hash", lambda baseline: "another" if not baseline else _hash(True))
    fake(tmp_path)
    assert [name for name, _ in fake.calls] == [TOP]


_hash = run.source_hash


def test_no_time_leaves_the_rest(tmp_path, monkeypatch):
    fake = FakeRun(monkeypatch, {})
    progress = fake(tmp_path, budget=1e-9)
    assert not progress.measured and set(progress.left) == {*EAGER, *COMPILED, TOP}


def test_a_folder_of_another_machine_is_refused(tmp_path):
    log = Log(tmp_path)
    session = {"kind": "session", "session": 1, "environment": {"gpu": {"name": "H1"}}, "workload": {"title": "a"}}
    log.add(session)
    record = read_record(tmp_path)
    check_continues(record, {"gpu": {"name": "H1"}}, "a")
    with pytest.raises(StepError, match="another machine"):
        check_continues(record, {"gpu": None}, "a")
    with pytest.raises(StepError, match="another workload"):
        check_continues(record, {"gpu": {"name": "H1"}}, "b")
    (tmp_path / STEP_FILE).write_text('{"kind": "row", "session": 7, "name": "x"}\n')
    with pytest.raises(StepError, match="not written by this command"):
        read_record(tmp_path)


class StandIn:
    """A step whose weight is moved by random numbers; from `fault` on, the "captured" one by a little more."""

    def __init__(self, graph, fault=None):
        self.model, self.mode = torch.nn.Linear(1, 1, bias=False), "captured" if graph else "compiled"
        torch.nn.init.ones_(self.model.weight)
        self.number, self.fault = 0, fault if graph else None

    @torch.no_grad()
    def __call__(self):
        self.number += 1
        self.model.weight += torch.rand(())
        if self.fault is not None and self.number >= self.fault:
            self.model.weight *= 1 + 2**-23
        return {"a": self.model.weight.sum(), "b": torch.ones(())}


def test_bitwise_comparison():
    found = bitwise.check_bitwise(StandIn, 5)
    assert found["equal"] and found["modes"] == ["compiled", "captured"] and found["first_difference"] is None
    found = bitwise.check_bitwise(lambda graph: StandIn(graph, fault=3), 5)
    assert not found["equal"] and found["first_difference"] == 3 and found["weights"] == ["weight"]
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_command_measures_and_reports(tmp_path):
    # A real run of two rows; everything else of the page says that it was not measured.
    words = ["--only", "torchvision nchw eager", "--only", TOP]
    result = CliRunner().invoke(app, ["step", "--out", str(tmp_path), "--baseline", "--ladder", *words])
    assert result.exit_code == 0, result.output
    assert f"{TOP}: " in result.output and "256 rois_positive" in result.output
    row = read_record(tmp_path).row(TOP)
    assert row["status"] == "ok" and row["reference"]["name"] == EAGER[1] and not row["far_losses"]
    assert set(row["phases_ms"]) == {"forward", "backward", "update"} and row["noise"] >= 0
    page = (tmp_path / "README.md").read_text()
    assert "figures of a CPU" in page and "say nothing about a GPU" in page and "not measured" in page
    assert "faster" not in page


def test_a_stopped_run_reports_what_it_has(tmp_path, monkeypatch):
    # SIGTERM, as a lent machine's time limit sends it, in the middle of the second row.
    fake = FakeRun(monkeypatch, {})

    def stop(provider, *arguments, **more):
        if provider.name != EAGER[0]:
            os.kill(os.getpid(), signal.SIGTERM)
        row = fake.measure(provider, *arguments, **more)
        return {"status": "failed", "reason": "planted"} if row["status"] != "ok" else _as_measured(row)

    monkeypatch.setattr(run, "measure_provider", stop)
    page_of = {"images": [2, 64, 96], "activations_std": {}, "title": SMALL.title, "losses": {}}
    workload = Workload(SMALL, None, torch.zeros(1), None, {}, {}, page_of)
    monkeypatch.setattr(run, "make_workload", lambda setting, device: workload)
    result = CliRunner().invoke(app, ["step", "--out", str(tmp_path), "--baseline"])
    assert result.exit_code == 130 and "stopped; what was measured is in" in result.output
    assert list(read_record(tmp_path).rows) == [EAGER[0]] and "| 1.0 |" in (tmp_path / "README.md").read_text()


def _as_measured(row):
    steps = {"p5": 1.0, "p50": 1.0, "p95": 1.0}
    more = {"step_ms": steps, "memory": {}, "clock": {}, "phases_ms": {}, "trace": {}, "waits": None, "noise": 0.1}
    return row | more | {"block_seconds": [1.0]}


def test_command_errors_are_sentences(tmp_path):
    for arguments, said in [
        (["--budget", "soon"], "is not a time"),
        (["--only", "nothing such"], "no row matches"),
        (["--report-only"], "run `mrcnn-bench step` first"),
    ]:
        result = CliRunner().invoke(app, ["step", "--out", str(tmp_path / "new"), *arguments])
        assert result.exit_code == 2 and said in result.output and "error: " in result.output
