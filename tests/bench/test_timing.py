import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.results import read_results
from bench.timing import BUDGETS, Samples, backward_call, measure

ROOT = Path(__file__).parents[2]


def run_pytest(*args):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_samples_reach_pytest_benchmark(tmp_path):
    # `record` uses private methods of pytest-benchmark: this fails when an upgrade changes them.
    (tmp_path / "test_fed.py").write_text(
        "from bench.timing import Samples, record\n"
        "def test_fed(benchmark):\n"
        "    record(benchmark, Samples([0.25, 0.5, 1.0], 7), op='x')\n"
    )
    saved = tmp_path / "out.json"
    done = run_pytest(tmp_path / "test_fed.py", f"--rootdir={tmp_path}", f"--benchmark-json={saved}", "-W", "error")
    assert done.returncode == 0, done.stdout
    (benchmark,) = json.loads(saved.read_text())["benchmarks"]
    assert benchmark["stats"]["data"] == [0.25, 0.5, 1.0]
    assert benchmark["stats"]["median"] == 0.5
    assert benchmark["extra_info"] == {"op": "x", "measures": "op_warm", "peak_memory_bytes": 7}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the suite without a GPU; with one it takes minutes")
def test_the_suite_says_what_it_could_not_measure(tmp_path):
    # On a CPU there must be times of the baselines, no time under Triton's name, and a reason for that.
    saved = tmp_path / "out.json"
    selected = "box_iou and forward and not compile"
    done = run_pytest("bench", "--benchmark-only", f"--benchmark-json={saved}", "-k", selected)
    assert done.returncode == 0, done.stdout
    assert "these times say nothing about the Triton kernels" in done.stdout
    results = read_results(saved)
    assert set(results.table["provider"]) == {"torchvision", "torch"}
    assert (results.table["error"] <= results.table["tolerance"]).all()
    (gap,) = results.gaps
    assert gap["provider"] == "triton" and "interpreter speed" in gap["reason"]
    assert str(tmp_path) not in results.command and selected in results.command
    assert results.machine["versions"]["torch"] == torch.__version__ and "node" not in results.machine


def test_cpu_times_are_seconds_of_one_call():
    # A wrong unit or a sum over calls would pass every ratio test.
    samples = measure(lambda: time.sleep(0.01), "cpu")
    assert 0.009 < sorted(samples.seconds)[len(samples.seconds) // 2] < 0.03
    assert samples.peak_memory_bytes is None


def test_the_number_of_samples_has_bounds():
    # Too few give no quantiles; a microsecond op must not run a million times.
    budget = BUDGETS["cuda"]
    assert budget.samples(10.0) == budget.least
    assert budget.samples(1e-9) == budget.most


def test_backward_can_be_timed_again_and_again():
    # The forward pass is kept: every sample must compute the same gradient, not accumulate or fail.
    x = torch.randn(5, requires_grad=True)
    call = backward_call(x.sin(), (x,), torch.ones(5))
    assert torch.equal(call()[0], x.cos()) and torch.equal(call()[0], x.cos()) and x.grad is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device_time_is_the_kernels_time():
    # Events around an asynchronous call must wait for the work, not for its launch.
    a = torch.randn(4096, 4096, device="cuda")
    samples = measure(lambda: a @ a, "cuda")
    assert isinstance(samples, Samples) and min(samples.seconds) > 2 * 4096**3 / 2e15
    assert samples.peak_memory_bytes >= a.numel() * 4
