"""A study must lose nothing when it is cut off, and must not measure again what still holds."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from typer.testing import CliRunner

from bench import results, study
from bench.cli import app
from bench.providers import is_ours, variants
from bench.results import STUDY_FILE, read_results, why_stale
from bench.sources import FOLDERS, KERNELS, SHARED, code_of, source_hash
from bench.status import find_statuses
from bench.study import (
    LATER,
    StudyError,
    parse_budget,
    run_study,
    select,
    why_measure,
)
from bench.timing import METHOD
from bench.worker import TimeIsUpError, Worker, WorkerError
from bench.workloads import DTYPE_NAMES, MASK_OPS, OPS, ROI_OPS, RPN_OPS, SUITES, calls

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"gpu": None, "versions": {"torch": "2"}}
ONLY = ["box_iou forward", "mask_bce_loss forward"]


class FakeWorker:
    """Answers at once, in this process, with made-up rows; `fail` maps a call to what it raises."""

    fail: ClassVar[dict] = {}
    environment: ClassVar[dict] = ENVIRONMENT
    asked: ClassVar[list] = []

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def call(self, function, *args, seconds):
        return dict(self.environment), None, ""

    def submit(self, function, call, device, later):
        return call, later

    def result(self, future, seconds):
        call, later = future
        self.asked.append(f"{call} {later}")
        if str(call) in self.fail:
            raise self.fail[str(call)]
        return fake_rows(call, later if study._compiles(call, self) else ())


def fake_rows(call, later=(), **changes):
    """A row for every variant of the call."""
    workload = call.workload
    found = []
    for variant in variants(call):
        row = {"op": workload.op, "direction": call.direction, "workload": workload.name, "dtype": call.dtype_name}
        row |= {"suite": workload.suite, "provider": variant.provider, "layout": variant.layout, "device": "cpu"}
        row |= {"measured_dtype": DTYPE_NAMES[variant.dtype], "status": "ok", "reason": "", "method": METHOD}
        row |= {"times": {"op_eager": [1.0, 1.0, 1.0]}, "first_call": 9.0 if later else 0.1}
        if variant.provider in later:
            row |= {"status": "skipped", "reason": LATER}
            del row["times"], row["first_call"]
        found.append(row | {"inputs": workload.fingerprint, "sources": source_hash(workload.op)} | changes)
    return found


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(study, "Worker", FakeWorker)
    monkeypatch.setattr(FakeWorker, "fail", {})
    monkeypatch.setattr(FakeWorker, "environment", ENVIRONMENT)
    monkeypatch.setattr(FakeWorker, "asked", [])
    monkeypatch.setattr(study, "_compiles", lambda call, device: False)  # tested on its own


def test_a_study_goes_on_where_it_was(fake, tmp_path):
    # A GPU may be had for ten minutes at a time: what is measured is not measured again.
    first = run_study(tmp_path, "cpu", ["box_iou forward"], 60)
    second = run_study(tmp_path, "cpu", ONLY, 60)
    assert first.measured == ["box_iou forward cpu fp32"] and not first.kept
    assert second.kept == first.measured and second.measured == ["mask_bce_loss forward cpu fp32"]
    found = read_results(tmp_path)
    assert sorted(found.sessions) == [1, 2] and len(found.call_rows()) == 2
    assert {(row["op"], row["session"]) for row in found.rows} == {("box_iou", 1), ("mask_bce_loss", 2)}


def test_what_changed_is_measured_again(fake, tmp_path, monkeypatch):
    # Another source, other inputs, another method, another PyTorch: the old times are of something else.
    run_study(tmp_path, "cpu", ONLY, 60)
    for changed in (
        (results, "source_hash", lambda op: "new"),
        (results, "METHOD", METHOD + 1),
        (FakeWorker, "environment", {**ENVIRONMENT, "versions": {"torch": "3"}}),
        (study, "variants_of", lambda call: {("another", "nchw", "fp32")}),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(*changed)
            assert len(run_study(tmp_path, "cpu", ONLY, 60).measured) == 2, changed
        run_study(tmp_path, "cpu", ONLY, 60)
        assert not run_study(tmp_path, "cpu", ONLY, 60).measured  # else the next change would go unnoticed
    assert len(read_results(tmp_path).call_rows()) == 2
    run_study(tmp_path, "cpu", ONLY, 60)
    assert (tmp_path / STUDY_FILE).read_text().count('"kind":"call"') == 2  # what is superseded is gone


def test_a_call_that_dies_costs_itself_only(fake, tmp_path):
    # An illegal access or a compiler that hangs must not end the study.
    FakeWorker.fail = {"box_iou forward cpu fp32": WorkerError("the process died")}
    progress = run_study(tmp_path, "cpu", ONLY, 60)
    assert progress.lost == {"box_iou forward cpu fp32": "the process died"}
    assert progress.measured == ["mask_bce_loss forward cpu fp32"]
    rows = [row for row in read_results(tmp_path).rows if row["op"] == "box_iou"]
    by_provider = {row["provider"]: row for row in rows}
    assert by_provider["torch"]["status"] == "failed" and by_provider["torch"]["reason"] == "the process died"
    assert by_provider["triton"]["status"] == "skipped"  # it cannot run on a CPU, whatever died
    FakeWorker.fail = {}
    # It is tried again, and last: what failed before may well fail again and cost what is left of the time.
    FakeWorker.asked.clear()
    again = run_study(tmp_path, "cpu", ["box_iou"], 60)
    assert again.measured == ["box_iou backward cpu fp32", "box_iou forward cpu fp32"]
    assert len(read_results(tmp_path).call_rows()) == 3  # readable: every call has its session


def test_a_failure_does_not_replace_a_measurement(fake, tmp_path):
    # A stale time, marked as such, is worth more than the note that a later attempt failed.
    run_study(tmp_path, "cpu", ONLY, 60)
    before = read_results(tmp_path).rows
    FakeWorker.environment = {**ENVIRONMENT, "versions": {"torch": "3"}}
    FakeWorker.fail = {"box_iou forward cpu fp32": WorkerError("the process died")}
    assert run_study(tmp_path, "cpu", ["box_iou forward"], 60).lost
    assert read_results(tmp_path).rows == before
    mixed = run_study(tmp_path, "cpu", ["box_iou"], 60)  # the lost one comes first, and writes nothing
    assert mixed.lost and mixed.measured and len(read_results(tmp_path).call_rows()) == 3


def test_compiling_comes_in_a_second_pass(fake, tmp_path, monkeypatch):
    # It takes longer than everything else: first all calls without it, then those again with it. A compiler that
    # hangs costs no other provider's time, on this run or the next.
    monkeypatch.setattr(study, "_compiles", lambda call, device: True)
    name = "box_iou forward cpu fp32"
    progress = run_study(tmp_path, "cpu", ["box_iou forward", "mask_bce_loss forward"], 60)
    assert FakeWorker.asked == [
        "box_iou forward cpu fp32 ('torch.compile',)",
        "mask_bce_loss forward cpu fp32 ('torch.compile',)",
        "box_iou forward cpu fp32 ()",
        "mask_bce_loss forward cpu fp32 ()",
    ]
    assert len(progress.measured) == len(progress.compiled) == 2
    # By then every kernel is compiled: what a first call costs was seen in the first pass.
    assert {row["first_call"] for row in read_results(tmp_path).rows if row["provider"] == "torch"} == {9.0}
    call = select("cpu", ["box_iou forward"])[0]
    assert why_measure(call, read_results(tmp_path)) is None

    (tmp_path / "two").mkdir()
    rows = fake_rows(call, later=("torch.compile",))
    write_study(tmp_path / "two", [rows], ENVIRONMENT)
    assert why_measure(call, read_results(tmp_path / "two")) == "missing: torch.compile"
    FakeWorker.fail, FakeWorker.asked = {name: WorkerError("the compiler hangs")}, []
    progress = run_study(tmp_path / "two", "cpu", ["box_iou forward"], 60)
    assert progress.lost == {f"{name}, with torch.compile": "the compiler hangs"}
    assert FakeWorker.asked == [f"{name} ()"]
    assert [row["status"] for row in read_results(tmp_path / "two").rows] == [row["status"] for row in rows]
    # Next time it comes last: a compiler that hangs must not begin every run.
    write_more = fake_rows(select("cpu", ["mask_bce_loss forward"])[0], later=("torch.compile",))
    with (tmp_path / "two" / STUDY_FILE).open("a") as file:
        file.write(json.dumps({"kind": "call", "session": 1, "rows": write_more}) + "\n")
    FakeWorker.asked.clear()
    run_study(tmp_path / "two", "cpu", ["box_iou forward", "mask_bce_loss forward"], 60)
    assert FakeWorker.asked == ["mask_bce_loss forward cpu fp32 ()", "box_iou forward cpu fp32 ()"]
    assert "hangs" in (tmp_path / "two" / STUDY_FILE).read_text()


def test_a_failed_call_keeps_what_was_compiled(fake, tmp_path, monkeypatch):
    # Measured again in two passes, its compiled row would be gone until the second one.
    monkeypatch.setattr(study, "_compiles", lambda call, device: True)
    call = select("cpu", ["box_iou forward"])[0]
    rows = fake_rows(call)
    rows[0] |= {"status": "failed", "reason": "no memory"}
    write_study(tmp_path, [rows], ENVIRONMENT)
    run_study(tmp_path, "cpu", ["box_iou forward"], 60)
    assert FakeWorker.asked == ["box_iou forward cpu fp32 ()"]


def test_two_studies_do_not_share_a_folder(fake, tmp_path, monkeypatch):
    # They would overwrite each other's lines and disturb each other's times.
    inside = []

    def result(self, future, seconds):
        with pytest.raises(StudyError, match="another study is writing"):
            run_study(tmp_path, "cpu", ONLY, 60)
        inside.append(future)
        return fake_rows(*future)

    monkeypatch.setattr(FakeWorker, "result", result)
    assert len(run_study(tmp_path, "cpu", ONLY, 60).measured) == len(inside) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == [STUDY_FILE]


def test_the_budget_ends_a_study_and_loses_nothing(fake, tmp_path, monkeypatch):
    # When the time is up the rest is left for the next run, and so is a call that was cut off by it. One that takes
    # more than its share is lost instead, or it would be waited for on every run.
    now = [0.0]
    monkeypatch.setattr(study.time, "monotonic", lambda: now[0])
    plain = FakeWorker.result

    def slow(self, future, seconds):
        now[0] += 45
        return plain(self, future, seconds)

    monkeypatch.setattr(FakeWorker, "result", slow)
    FakeWorker.fail = {"mask_bce_loss forward cpu fp32": TimeIsUpError("stopped")}
    progress = run_study(tmp_path / "cut", "cpu", ["box_iou forward", "mask_bce_loss"], 60)
    assert progress.measured == ["box_iou forward cpu fp32"] and not progress.lost
    assert progress.left == ["mask_bce_loss forward cpu fp32", "mask_bce_loss backward cpu fp32"]
    assert run_study(tmp_path / "hung", "cpu", ["mask_bce_loss forward"], 60).lost


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
    for notes in ("my notes\n", "my notes without an end"):
        (tmp_path / STUDY_FILE).write_text(notes)
        with pytest.raises(StudyError, match=r"not valid JSON|not written by a study"):
            run_study(tmp_path, "cpu", ONLY, 60)
        assert (tmp_path / STUDY_FILE).read_text() == notes


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


def die_soon():
    threading.Timer(0.3, os._exit, [3]).start()


def complain():
    raise ValueError("too many\nRoIs")


def caches():
    return os.environ["TRITON_CACHE_DIR"], os.environ.get("TRITON_INTERPRET")


def test_the_worker_survives_what_it_runs():
    # Hangs, deaths and errors: each costs one process, and the next function runs in a new one.
    with Worker() as worker:
        with pytest.raises(WorkerError, match="the process died"):
            worker.call(die, seconds=60)
        with pytest.raises(WorkerError, match=r"^ValueError: too many$"):
            worker.call(complain, seconds=60)
        with pytest.raises(TimeIsUpError, match="stopped after"):
            worker.call(sleep_then_return, 60, seconds=1)
        cache, interpret = worker.call(caches, seconds=60)
        # First calls compile anew, and what is measured is not the interpreter, whatever this process has set.
        assert cache != os.environ.get("TRITON_CACHE_DIR") and interpret is None
        worker.call(die_soon, seconds=60)
        time.sleep(1)  # dies idle
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
        if path.exists() and '"kind":"call"' in path.read_text():
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "run the same command to go on" in output
    rows = read_results(tmp_path).rows
    assert rows and all(why_stale(row) is None for row in rows)


@pytest.mark.parametrize("op", OPS)
def test_everything_an_op_takes_from_kernels_is_in_its_hash(op):
    # A file that is imported and not hashed could change under a measurement that then still passes for valid.
    hashed = {*SHARED, *FOLDERS[op]}
    files = [KERNELS / name for name in hashed if name.endswith(".py")]
    files += [path for name in hashed if not name.endswith(".py") for path in (KERNELS / name).glob("*.py")]
    assert all(path.is_file() for path in files) and len(files) > len(SHARED)
    for path in files:
        dots = 2 if path.parent != KERNELS else 1
        for name in re.findall(rf"^\s*from \.{{{dots}}}(\w+)", path.read_text(), re.MULTILINE):
            assert name in hashed or f"{name}.py" in hashed, f"{path} imports {name}"


@pytest.mark.parametrize(("text", "seconds"), [("8m", 480), ("90s", 90), ("1h30m", 5400), ("0.5m", 30)])
def test_budgets(text, seconds):
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "8", "8 minutes", "-3m", "0s", "1.2.3m", "m", "99999h"])
def test_a_bad_budget_is_one_sentence(text):
    with pytest.raises(StudyError, match="write 8m, 90s or 1h30m"):
        parse_budget(text)


@pytest.mark.parametrize(("word", "ops"), [("rpn", RPN_OPS), ("roi_align", ROI_OPS), ("mask", MASK_OPS)])
def test_a_family_is_selected_by_its_word(word, ops):
    # `roi_align` is an op's name, too, and must bring the others along; `rpn` is none.
    for device in ("cuda", "cpu"):
        assert {c.workload.op for c in select(device, [word])} == set(ops)
    assert {c.direction for c in select("cuda", [f"{word} backward"])} == {"backward"}


def test_only_selects_by_whole_words_and_keeps_the_order():
    # "multiscale_roi_align" must not bring the joint op along, and the most valuable call stays first.
    everything = list(calls("cuda"))
    assert {c.workload.op for c in select("cuda", ["multiscale_roi_align train"])} == {"multiscale_roi_align"}
    assert select("cuda", []) == everything
    both = select("cuda", ["mask_bce_loss small", "label_anchors"])
    assert both == [c for c in everything if c in both] and len({c.workload.op for c in both}) == 2
    with pytest.raises(
        StudyError, match="no call on a cuda device matches 'roialign'; the words are multiscale_roi_align, forward"
    ):
        select("cuda", ["roialign"])


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_roi_align_selects_all_roi_ops_and_nothing_else(device):
    # They share their kernels: whoever changed one wants to know of all, the training step first.
    chosen = select(device, ["roi_align"])
    assert chosen == [c for c in calls(device) if c.workload.op in ROI_OPS]
    assert {c.workload.op for c in chosen} == {"multiscale_roi_align", "joint_multiscale_roi_align", "roi_align"}
    suites = [SUITES.index(c.workload.suite) for c in chosen]
    assert suites == sorted(suites)
    backward = select(device, ["roi_align backward"])
    assert backward == [c for c in chosen if c.direction == "backward"]


def test_comments_do_not_make_a_result_stale():
    # Rewording is not another kernel, and minutes on a GPU are dear; any change of code is.
    source = '"""Old."""\n# why\ndef f(x):\n    """Doc."""\n\n    return x + 1  # one\n'
    reworded = '"""New,\nlonger."""\n\ndef f(x):\n    """Other doc."""\n    # because\n    return x + 1  # one\n'
    assert code_of(source) == code_of(reworded) == "def f(x):\n    return x + 1  # one"
    assert code_of(source.replace("+ 1", "+ 2")) != code_of(source)


def write_study(folder, calls_rows, environment):
    """A results folder as a study would leave it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"kind": "session", "session": 1, "environment": environment}]
    lines += [{"kind": "call", "session": 1, "rows": rows} for rows in calls_rows]
    (folder / STUDY_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))


H200 = {"gpu": {"name": "NVIDIA H200"}, "versions": {"torch": "2"}}


def test_status_knows_missing_stale_and_failed(tmp_path):
    # The list that the next minutes on a GPU are spent on.
    first, second, third, *_ = calls("cuda")
    write_study(
        tmp_path / "h200",
        [
            fake_rows(first, device="cuda"),
            fake_rows(second, device="cuda", sources="old"),
            fake_rows(third, device="cuda", status="failed", reason="no memory"),
        ],
        H200,
    )
    ((found,), problems) = find_statuses(tmp_path)
    assert found.machine == "NVIDIA H200" and not problems
    assert first not in found.awaiting
    assert found.awaiting[second] == "stale: the op's source changed"
    assert found.awaiting[third] == "failed: no memory"
    assert list(found.awaiting.values()).count("missing") == len(list(calls("cuda"))) - 3


def test_a_baseline_without_enough_memory_is_not_tried_again(tmp_path):
    # Torchvision's matrix of a thousand objects will not fit tomorrow either; ours running out is a bug to be mended.
    first, second, *_ = calls("cuda")
    row = {"status": "failed", "reason": "out of memory (asked for 9.77 GiB)"}
    rows = {call: fake_rows(call, device="cuda") for call in (first, second)}
    for call, ours in ((first, False), (second, True)):
        next(r for r in rows[call] if is_ours(r["provider"]) == ours).update(row)
    write_study(tmp_path / "h200", list(rows.values()), H200)
    ((found,), _) = find_statuses(tmp_path)
    assert first not in found.awaiting
    assert found.awaiting[second] == "failed: out of memory (asked for 9.77 GiB)"


def test_status_without_any_gpu_result_lists_everything(tmp_path):
    # As this repository began: nothing measured, and the command that would.
    write_study(tmp_path / "cpu", [fake_rows(next(iter(calls("cpu"))))], ENVIRONMENT)  # of a CPU: not a GPU's
    done = CliRunner().invoke(app, ["status", str(tmp_path), "--calls"])
    assert done.exit_code == 1
    number = len(list(calls("cuda")))
    assert f"{number} calls await a GPU" in done.output and "python -m bench study --out" in done.output
    assert done.output.count(": missing") == number


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


def test_a_budget_that_is_too_short_to_begin_says_so(tmp_path):
    # Not "stopped after 1 s", which sounds as if something had hung.
    with pytest.raises(StudyError, match="too short: starting up alone took longer"):
        run_study(tmp_path, "cpu", ONLY, 0.01)


def test_status_of_one_folder_and_of_none(tmp_path):
    # The folder that `study --out` wrote is what people have at hand; a typing error is not "nothing measured".
    write_study(tmp_path / "h200", [fake_rows(next(calls("cuda")), device="cuda")], H200)
    assert "NVIDIA H200" in CliRunner().invoke(app, ["status", str(tmp_path / "h200")]).output
    missing = CliRunner().invoke(app, ["status", str(tmp_path / "h100")])
    assert missing.exit_code == 2 and "is no folder" in missing.stderr


def test_a_bad_option_writes_nothing(tmp_path):
    for options in (["--budget", "soon"], ["--only", "roialign"]):
        done = CliRunner().invoke(app, ["study", "--out", str(tmp_path / "x"), *options])
        assert done.exit_code == 2 and done.stderr.startswith("error: ") and not (tmp_path / "x").exists()
