"""pytest hooks of the benchmark suite: keep the environment and the gaps, say what is missing, refuse to mix GPUs."""

from __future__ import annotations

import shlex

import pytest
import torch

from bench.environment import NO_GPU, describe_environment, has_uncommitted_files, same_gpu
from bench.recording import ROW
from bench.results import MAIN_TIME
from bench.timing import TIMES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_GAPS: pytest.StashKey[list[dict]] = pytest.StashKey()
_CEILINGS: pytest.StashKey[dict | None] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Which of the named times pytest-benchmark's own table shows and compares; the JSON has all of them."""
    parser.addoption(
        "--time",
        choices=TIMES[DEVICE],
        default=MAIN_TIME[DEVICE],
        help="the time that the table shows and --benchmark-compare compares (default: %(default)s)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Make room for the rows that will not get a time."""
    config.stash[_GAPS] = []
    config.stash[_CEILINGS] = None


def pytest_runtestloop(session: pytest.Session) -> None:
    """Measure the GPU's ceilings before the first row; without them there is no roof, but there are times."""
    if DEVICE == "cpu" or session.config.option.collectonly:
        return
    from bench.ceilings import measure_ceilings

    try:
        session.config.stash[_CEILINGS] = measure_ceilings().to_dict()
    except Exception as error:
        session.config.issue_config_time_warning(UserWarning(f"no roofs: {error}"), 2)


def pytest_report_header(config: pytest.Config) -> str:
    """One line on what the numbers of this run are about."""
    if DEVICE == "cpu":
        return NO_GPU
    return f"GPU: {torch.cuda.get_device_name()}; times shown: {config.getoption('time')}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The same line at the end: `-q`, this repository's default, hides the header."""
    terminalreporter.write_line("")
    terminalreporter.write_line(pytest_report_header(config), yellow=DEVICE == "cpu")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):  # noqa: ANN201
    """Remember rows without a time: pytest-benchmark's JSON only knows the ones that have one."""
    report = yield
    row = item.stash.get(ROW, None)
    if call.when == "call" and row is not None and row["status"] != "ok":
        item.config.stash[_GAPS].append(row)
    return report


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Add what decides a GPU's speed; drop the host name, which decides nothing."""
    machine_info.pop("node", None)
    machine_info.update(describe_environment(), time=config.getoption("time"))


def pytest_benchmark_compare_machine_info(
    config: pytest.Config, benchmarksession: object, machine_info: dict, compared_benchmark: dict
) -> None:
    """Refuse what would compare apples with pears; pytest-benchmark itself only warns."""
    other = compared_benchmark["machine_info"]
    if not same_gpu(machine_info, other):
        names = [(m.get("gpu") or {}).get("name", "no GPU") for m in (machine_info, other)]
        raise pytest.UsageError(f"times of different GPUs are not comparable: this is {names[0]}, that was {names[1]}")
    if machine_info["time"] != other.get("time"):
        raise pytest.UsageError(
            f"this run shows {machine_info['time']}, the saved one {other.get('time')}: choose the same --time"
        )


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict) -> None:
    """Call the tree dirty for new files too: an untracked kernel is as unrepeatable as a changed one."""
    commit_info["dirty"] = commit_info.get("dirty") or has_uncommitted_files()


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict) -> None:
    """Add the rows without a time, the ceilings, and the command to run again."""
    output_json["not_measured"] = config.stash[_GAPS]
    output_json["command"] = _command(config.invocation_params.args)
    output_json["ceilings"] = config.stash[_CEILINGS]


def _command(args: tuple[str, ...]) -> str:
    where = ("--benchmark-json", "--benchmark-storage")  # paths of this machine
    shown = [arg for arg in args if not str(arg).startswith(where)]
    return shlex.join(["python", "-m", "pytest", *map(str, shown), "--benchmark-json=RESULTS.json"])
