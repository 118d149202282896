"""The suite as pytest-benchmark carries it: `pytest bench --benchmark-only`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.results import read_results

ROOT = Path(__file__).parents[2]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the suite without a GPU; with one it takes minutes")


def run_pytest(*args, cwd=ROOT):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One run of the suite's quickest op, kept in both of pytest-benchmark's ways."""
    folder = tmp_path_factory.mktemp("suite")
    selected = "box_iou and forward and not compile"
    done = run_pytest(
        "bench", "--benchmark-only", f"--benchmark-json={folder / 'out.json'}", "-k", selected,
        "--benchmark-autosave", f"--benchmark-storage=file://{folder / 'storage'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_samples_reach_pytest_benchmark(tmp_path):
    # `record` uses private methods of pytest-benchmark: this fails when an upgrade changes them.
    (tmp_path / "test_fed.py").write_text(
        "from bench.recording import record\n"
        "def test_fed(benchmark):\n"
        "    row = {'op': 'x', 'times': {'kernel_cold': [0.25, 0.5, 1.0], 'op_eager': [9.0]}}\n"
        "    record(benchmark, row, 'kernel_cold')\n"
    )
    out = tmp_path / "out.json"
    done = run_pytest(tmp_path / "test_fed.py", f"--rootdir={tmp_path}", f"--benchmark-json={out}", "-W", "error")
    assert done.returncode == 0, done.stdout
    (benchmark,) = json.loads(out.read_text())["benchmarks"]
    assert benchmark["stats"]["data"] == [0.25, 0.5, 1.0]
    assert benchmark["stats"]["median"] == 0.5
    assert benchmark["extra_info"]["times"]["op_eager"] == [9.0] and benchmark["extra_info"]["time"] == "kernel_cold"


@no_gpu
def test_the_suite_says_what_it_could_not_measure(saved):
    # On a CPU there must be times of the baselines, no time under Triton's name, and a reason for that.
    folder, output = saved
    assert "these times say nothing about the Triton kernels" in output
    results = read_results(folder / "out.json")
    by_provider = {row["provider"]: row for row in results.rows}
    assert set(by_provider) == {"triton", "torchvision", "torch"}
    assert by_provider["triton"]["status"] == "skipped" and "interpreter speed" in by_provider["triton"]["reason"]
    for name in ("torchvision", "torch"):
        row = by_provider[name]
        assert row["error"] <= row["tolerance"] and len(row["times"]["op_eager"]) >= 15
        assert row["floor"]["dram_bytes"] > 0
    (session,) = results.sessions.values()
    assert str(folder) not in session["command"] and "box_iou" in session["command"]
    assert session["environment"]["versions"]["torch"] == torch.__version__ and "node" not in session["environment"]


@no_gpu
def test_a_regression_fails_the_run(saved):
    # `--benchmark-compare-fail` is what a CI uses. Against a run whose times are made a thousandth, all is slower.
    folder, _ = saved
    (path,) = folder.glob("storage/*/*.json")
    content = path.read_text()
    quick = json.loads(content)
    for benchmark in quick["benchmarks"]:
        benchmark["stats"]["median"] /= 1000
    path.write_text(json.dumps(quick))
    done = compare(folder, "--benchmark-compare-fail=median:5%")
    path.write_text(content)
    assert done.returncode != 0 and "Performance has regressed" in done.stdout + done.stderr


@no_gpu
@pytest.mark.parametrize("key", ["gpu", "time"])
def test_unlike_runs_are_not_compared(saved, key):
    # Two GPUs, or a kernel time with an eager one: pytest-benchmark by itself would warn and print ratios.
    folder, _ = saved
    (path,) = folder.glob("storage/*/*.json")
    content = path.read_text()
    other = json.loads(content)
    other["machine_info"][key] = {"gpu": {"name": "NVIDIA A100"}, "time": "kernel_cold"}[key]
    path.write_text(json.dumps(other))
    done = compare(folder)
    path.write_text(content)
    assert done.returncode == 4  # a usage error, before anything is measured
    expected = "this is no GPU, that was NVIDIA A100" if key == "gpu" else "choose the same --time"
    assert expected in done.stdout + done.stderr


def compare(folder, *args):
    selected = "box_iou and forward and torchvision"
    storage = f"--benchmark-storage=file://{folder / 'storage'}"
    return run_pytest("bench", "--benchmark-only", "-k", selected, "--benchmark-compare", storage, *args)
