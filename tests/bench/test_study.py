"""A study must lose nothing when it is cut off, and must not measure again what still holds."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from typer.testing import CliRunner

from bench import results, study
from bench.cli import app
from bench.results import STUDY_FILE, read_results, why_stale
from bench.sources import code_of, source_hash
from bench.status import find_statuses
from bench.study import (
    Progress,
    StudyError,
    TimeIsUpError,
    Worker,
    WorkerError,
    awaiting,
    parse_budget,
    run_study,
    select,
)
from bench.workloads import calls

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"gpu": None, "versions": {"torch": "2"}}
ONLY = ["box_iou forward", "mask_bce_loss forward"]


class FakeWorker:
    """Answers at once, in this process, with one made-up row a call; `fail` maps a call to what it raises."""

    device = "cpu"
    fail: ClassVar[dict] = {}
    environment: ClassVar[dict] = ENVIRONMENT

    def __init__(self, device):
        self.asked = []

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def call(self, function, *args, seconds):
        return dict(self.environment), None

    def submit(self, function, call, device):
        return call

    def result(self, call, seconds):
        if str(call) in self.fail:
            raise self.fail[str(call)]
        return [fake_row(call)]


def fake_row(call, **changes):
    workload = call.workload
    row = {"op": workload.op, "direction": call.direction, "workload": workload.name, "dtype": call.dtype_name}
    row |= {"suite": workload.suite, "provider": "torch", "layout": "nchw", "measured_dtype": call.dtype_name}
    row |= {"device": "cpu", "status": "ok", "reason": "", "times": {"op_eager": [1.0, 1.0, 1.0]}, "method": 1}
    return row | {"inputs": workload.fingerprint, "sources": source_hash(workload.op)} | changes


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(study, "Worker", FakeWorker)
    monkeypatch.setattr(FakeWorker, "fail", {})
    monkeypatch.setattr(FakeWorker, "environment", ENVIRONMENT)


def test_a_study_goes_on_where_it_was(fake, tmp_path):
    # A GPU may be had for ten minutes at a time: what is measured is not measured again.
    first = run_study(tmp_path, "cpu", ["box_iou forward"], 60)
    second = run_study(tmp_path, "cpu", ONLY, 60)
    assert first.measured == ["box_iou forward cpu fp32"] and not first.kept
    assert second.kept == first.measured and second.measured == ["mask_bce_loss forward cpu fp32"]
    found = read_results(tmp_path)
    assert len(found.rows) == 2 and sorted(found.sessions) == [1, 2]
    assert [row["session"] for row in found.rows] == [1, 2]


def test_what_changed_is_measured_again(fake, tmp_path, monkeypatch):
    # Another source, other inputs, another method, another PyTorch: the old times are of something else.
    run_study(tmp_path, "cpu", ONLY, 60)
    for name, change in {
        "source": lambda: monkeypatch.setattr(results, "source_hash", lambda op: "new"),
        "method": lambda: monkeypatch.setattr(results, "METHOD", 2),
        "version": lambda: monkeypatch.setattr(FakeWorker, "environment", {**ENVIRONMENT, "versions": {"torch": "3"}}),
    }.items():
        with monkeypatch.context():
            change()
            assert len(run_study(tmp_path, "cpu", ONLY, 60).measured) == 2, name
        monkeypatch.undo()
        monkeypatch.setattr(study, "Worker", FakeWorker)
    assert len(read_results(tmp_path).rows) == 2  # superseded rows are gone


def test_a_call_that_dies_costs_itself_only(fake, tmp_path):
    # An illegal access or a compiler that hangs must not end the study.
    FakeWorker.fail = {"box_iou forward cpu fp32": WorkerError("the process died")}
    progress = run_study(tmp_path, "cpu", ONLY, 60)
    assert progress.lost == {"box_iou forward cpu fp32": "the process died"}
    assert progress.measured == ["mask_bce_loss forward cpu fp32"]
    FakeWorker.fail = {}
    assert run_study(tmp_path, "cpu", ONLY, 60).measured == ["box_iou forward cpu fp32"]


def test_the_budget_ends_a_study_and_loses_nothing(fake, tmp_path):
    # When the time is up the rest is left for the next run, and so is a call that was cut off by it.
    FakeWorker.fail = {"box_iou forward cpu fp32": TimeIsUpError("stopped after 3 s")}
    assert run_study(tmp_path, "cpu", ONLY, 60).left == ["box_iou forward cpu fp32"]
    FakeWorker.fail = {}
    assert len(run_study(tmp_path / "none", "cpu", ONLY, 1e-9).left) == 2


def test_results_of_another_machine_are_not_mixed_in(fake, tmp_path):
    # Two GPUs in one folder would be compared with each other.
    run_study(tmp_path, "cpu", ONLY, 60)
    FakeWorker.environment = {"gpu": {"name": "NVIDIA H200"}, "versions": {}}
    before = (tmp_path / STUDY_FILE).read_bytes()
    with pytest.raises(StudyError, match="another machine: give another --out"):
        run_study(tmp_path, "cpu", ONLY, 60)
    assert (tmp_path / STUDY_FILE).read_bytes() == before


def test_a_foreign_file_is_not_overwritten(fake, tmp_path):
    # `study.jsonl` may be somebody's own.
    (tmp_path / STUDY_FILE).write_text("my notes\n")
    with pytest.raises(StudyError, match="not valid JSON"):
        run_study(tmp_path, "cpu", ONLY, 60)
    assert (tmp_path / STUDY_FILE).read_text() == "my notes\n"


def test_half_a_line_is_dropped_and_the_rest_kept(fake, tmp_path):
    # A machine that vanishes while a line is being written.
    run_study(tmp_path, "cpu", ONLY, 60)
    path = tmp_path / STUDY_FILE
    path.write_text(path.read_text()[:-40])
    progress = run_study(tmp_path, "cpu", ONLY, 60)
    assert len(progress.kept) == len(progress.measured) == 1
    assert all(json.loads(line) for line in path.read_text().splitlines())


def sleep_then_return(seconds):
    time.sleep(seconds)
    return os.getpid()


def die():
    os._exit(3)


def complain():
    raise ValueError("too many\nRoIs")


def caches():
    return os.environ["TRITON_CACHE_DIR"], os.environ.get("TRITON_INTERPRET")


def test_the_worker_survives_what_it_runs():
    # Hangs, deaths and errors: each costs one process, and the next function runs in a new one.
    with Worker("cpu") as worker:
        with pytest.raises(WorkerError, match="the process died"):
            worker.call(die, seconds=60)
        with pytest.raises(WorkerError, match=r"^ValueError: too many$"):
            worker.call(complain, seconds=60)
        with pytest.raises(TimeIsUpError, match="stopped after"):
            worker.call(sleep_then_return, 60, seconds=1)
        cache, interpret = worker.call(caches, seconds=60)
        # First calls compile anew, and what is measured is not the interpreter, whatever this process has set.
        assert cache != os.environ.get("TRITON_CACHE_DIR") and interpret is None
        process = worker.call(sleep_then_return, 0, seconds=60)
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CPU providers are quick enough for a test")
def test_a_terminated_study_keeps_what_it_has(tmp_path):
    # The real thing, from the command line, ended from outside in the middle.
    command = [sys.executable, "-m", "bench", "study", "--out", str(tmp_path), "--budget", "5m"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until = time.monotonic() + 120
    while time.monotonic() < until:
        path = tmp_path / STUDY_FILE
        if path.exists() and '"kind":"row"' in path.read_text():
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "run the same command to go on" in output
    rows = read_results(tmp_path).rows
    assert rows and all(why_stale(row) is None for row in rows)


@pytest.mark.parametrize(("text", "seconds"), [("8m", 480), ("90s", 90), ("90", 90), ("1h30m", 5400), ("0.5m", 30)])
def test_budgets(text, seconds):
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "8 minutes", "-3m", "0s", "1.2.3m", "m"])
def test_a_bad_budget_is_one_sentence(text):
    with pytest.raises(StudyError, match="write 8m, 90s or 1h30m"):
        parse_budget(text)


def test_only_selects_by_whole_words_and_keeps_the_order():
    # "roi_align" must not bring the multiscale op along, and the most valuable call stays first.
    everything = list(calls("cuda"))
    assert {c.workload.op for c in select("cuda", ["roi_align train"])} == {"roi_align"}
    assert select("cuda", []) == everything
    both = select("cuda", ["mask_bce_loss small", "label_anchors"])
    assert both == [c for c in everything if c in both] and len({c.workload.op for c in both}) == 2
    with pytest.raises(StudyError, match="no call matches 'roialign'"):
        select("cuda", ["roialign"])


def test_comments_do_not_make_a_result_stale():
    # Rewording is not another kernel, and minutes on a GPU are dear; any change of code is.
    source = '"""Old."""\n# why\ndef f(x):\n    """Doc."""\n\n    return x + 1  # one\n'
    reworded = '"""New,\nlonger."""\n\ndef f(x):\n    """Other doc."""\n    # because\n    return x + 1  # one\n'
    assert code_of(source) == code_of(reworded) == "def f(x):\n    return x + 1  # one"
    assert code_of(source.replace("+ 1", "+ 2")) != code_of(source)


def gpu_study(folder, rows):
    """A results folder as a GPU would leave it."""
    folder.mkdir(parents=True)
    session = {"session": 1, "environment": {"gpu": {"name": "NVIDIA H200"}, "versions": {"torch": "2"}}}
    lines = [{"kind": "session", **session}, *({"kind": "row", "session": 1, **row} for row in rows)]
    (folder / STUDY_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_status_knows_missing_stale_and_failed(tmp_path):
    # The list that the next minutes on a GPU are spent on.
    first, second, third, *_ = calls("cuda")
    gpu_study(
        tmp_path / "h200",
        [
            fake_row(first, device="cuda"),
            fake_row(second, device="cuda", sources="old"),
            fake_row(third, device="cuda", status="failed", reason="no memory"),
        ],
    )
    ((found,), problems) = find_statuses(tmp_path)
    assert found.machine == "NVIDIA H200" and not problems
    assert first not in found.awaiting
    assert found.awaiting[second] == "stale: the op's source changed"
    assert found.awaiting[third] == "failed: no memory"
    assert list(found.awaiting.values()).count("missing") == len(list(calls("cuda"))) - 3


def test_status_without_any_gpu_result_lists_everything(tmp_path):
    # As this repository began: nothing measured, and the command that would.
    gpu_study(tmp_path / "cpu", [fake_row(next(iter(calls("cpu"))))])  # of a CPU: not a GPU's
    done = CliRunner().invoke(app, ["status", str(tmp_path), "--calls"])
    assert done.exit_code == 1
    number = len(list(calls("cuda")))
    assert f"{number} calls await a GPU" in done.output and "python -m bench study --out" in done.output
    assert done.output.count(": missing") == number == len(list(awaiting(None)))


def test_an_unreadable_result_is_named(tmp_path):
    # A broken file must not count as measured, nor hide the others.
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / STUDY_FILE).write_text("{\n")
    done = CliRunner().invoke(app, ["status", str(tmp_path)])
    assert done.exit_code == 1 and "unreadable" in done.output and "not valid JSON" in done.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU they run")
@pytest.mark.parametrize("command", [["gpu-check"], ["sanitize"], ["ncu", "--out", "x"]])
def test_commands_that_need_a_gpu_say_so(command):
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2 and done.stderr.startswith("error: no GPU here") and done.stderr.count("\n") == 1


def test_a_bad_option_writes_nothing(tmp_path):
    for options in (["--budget", "soon"], ["--only", "roialign"]):
        done = CliRunner().invoke(app, ["study", "--out", str(tmp_path / "x"), *options])
        assert done.exit_code == 2 and done.stderr.startswith("error: ") and not (tmp_path / "x").exists()


def test_progress_starts_empty():
    # Mutable defaults shared between two studies would mix their calls.
    Progress().measured.append("a")
    assert Progress().measured == []
