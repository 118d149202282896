"""pytest hooks of the benchmark suite: say what is missing, keep the environment and the gaps with the times."""

from __future__ import annotations

import shlex

import pytest
import torch

from bench.environment import describe_environment, has_uncommitted_files

NO_GPU = "no GPU: small workloads, CPU providers only; these times say nothing about the Triton kernels"
_GAPS: pytest.StashKey[list[dict]] = pytest.StashKey()


def pytest_configure(config: pytest.Config) -> None:
    """Make room for the rows that will not get a time."""
    config.stash[_GAPS] = []


def pytest_report_header(config: pytest.Config) -> str:
    """One line on what the numbers of this run are about."""
    if not torch.cuda.is_available():
        return NO_GPU
    return f"GPU: {torch.cuda.get_device_name()}; times are device events, L2 not flushed"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The same line at the end: `-q`, this repository's default, hides the header."""
    terminalreporter.write_line("")
    terminalreporter.write_line(pytest_report_header(config), yellow=not torch.cuda.is_available())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):  # noqa: ANN201
    """Remember why a row has no time: pytest-benchmark's JSON only knows the rows that have one."""
    report = yield
    row = getattr(item, "callspec", None) and item.callspec.params.get("row")
    if row is not None and call.excinfo is not None and call.when != "teardown":
        reason = getattr(call.excinfo.value, "msg", None) or str(call.excinfo.value)
        status = "skipped" if report.skipped else "failed"
        gap = {**row.labels(), "status": status, "reason": reason.strip().split("\n")[0][:300]}
        item.config.stash[_GAPS].append(gap)
    return report


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Add what decides a GPU's speed; drop the host name, which decides nothing."""
    machine_info.pop("node", None)
    machine_info.update(describe_environment())


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict) -> None:
    """Call the tree dirty for new files too: an untracked kernel is as unrepeatable as a changed one."""
    commit_info["dirty"] = commit_info.get("dirty") or has_uncommitted_files()


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict) -> None:
    """Add the rows without a time, and the command to run again."""
    output_json["not_measured"] = config.stash[_GAPS]
    output_json["command"] = _command(config.invocation_params.args)


def _command(args: tuple[str, ...]) -> str:
    shown = [arg for arg in args if not str(arg).startswith("--benchmark-json")]
    return shlex.join(["python", "-m", "pytest", *map(str, shown), "--benchmark-json=RESULTS.json"])
