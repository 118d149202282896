import json

import pytest
import torch

from bench import ncu
from bench.ncu import METRICS, count_calls, find_tool, profile_call, read_counters
from bench.providers import variants
from bench.study import StudyError
from bench.workloads import calls

CALL = next(calls("cuda"))
VARIANT = next(variants(CALL))
HEAD = ["ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream", "Block Size", "Grid Size"]
UNITS = ["byte", "byte", "byte", "inst", "%", "nsecond"]


def quoted(*cells):
    return ",".join(f'"{cell}"' for cell in cells)


def output(units=UNITS):
    """As ncu's documentation describes the raw page: messages, header, units, a line a kernel."""
    start = ["7", "123", "python3", "host"]
    return "\n".join(
        [
            "==PROF== Connected to process 123",
            "==PROF== Profiling \"roi_align\" - 0: 0%....50%....100% - 9 passes",
            quoted(*HEAD, *METRICS),
            quoted(*[""] * len(HEAD), *units),
            quoted(*start, "roi_align_forward_kernel", "1", "7", "(128, 1, 1)", "(57344, 2, 1)",
                   "731,000,000", "206000000", "1,600,000,000", "235000000", "61.5", "400,000"),
            quoted(*start, "void at::native::fill<float, 4>(int)", "1", "7", "(128, 1, 1)", "(1, 1, 1)",
                   "0", "64", "64", "10", "1.0", "2000"),
        ]
    )  # fmt: skip


def test_counters_are_read():
    # Thousands separators, commas inside a kernel's name, and base units.
    first, second = read_counters(output())
    assert first.kernel == "roi_align_forward_kernel" and second.kernel == "void at::native::fill<float, 4>(int)"
    assert (first.dram_read_bytes, first.dram_write_bytes, first.l2_bytes) == (731e6, 206e6, 1.6e9)
    assert (first.instructions, first.issue_percent) == (235e6, 61.5) and first.seconds == pytest.approx(4e-4)


def test_another_unit_is_not_taken_for_bytes():
    # A release that prints Mbyte would be off by a million.
    with pytest.raises(StudyError, match="no number in a known unit"):
        list(read_counters(output(["Mbyte", *UNITS[1:]])))


def test_no_table_is_no_kernel():
    assert list(read_counters("==ERROR== ERR_NVGPUCTRPERM\n")) == []


def test_a_missing_tool_is_one_sentence(monkeypatch):
    monkeypatch.setattr(ncu.shutil, "which", lambda *args, **more: None)
    with pytest.raises(StudyError, match="ncu is not on the PATH"):
        find_tool("ncu")


def fake_ncu(tmp_path, monkeypatch, text, status=0):
    program = tmp_path / "ncu"
    (tmp_path / "text").write_text(text)
    program.write_text(f'#!/bin/sh\necho "$@" > "{tmp_path}/args"\ncat "{tmp_path}/text"\nexit {status}\n')
    program.chmod(0o755)
    monkeypatch.setattr(ncu, "find_tool", lambda name: str(program))


def test_a_call_stands_beside_its_floor(tmp_path, monkeypatch):
    # Counters without the model's bytes of the same call and dtype would compare with nothing.
    fake_ncu(tmp_path, monkeypatch, output())
    found = profile_call(CALL, VARIANT)
    assert len(found["kernels"]) == 2 and VARIANT.dtype == torch.bfloat16
    assert 3e8 < found["floor"]["dram_bytes"] < 937e6  # fewer than all cells, see kernels' notes
    args = (tmp_path / "args").read_text()
    assert "--clock-control none" in args and str(CALL) in args and "bench.profile_call" in args


def test_forbidden_counters_are_told(tmp_path, monkeypatch):
    # Where ncu may not read the counters it exits with its reason; nothing is reported as zero bytes.
    fake_ncu(tmp_path, monkeypatch, "==ERROR== ERR_NVGPUCTRPERM: no permission\n", status=1)
    with pytest.raises(StudyError, match="ERR_NVGPUCTRPERM"):
        profile_call(CALL, VARIANT)


def test_counting_goes_on_where_it_was(tmp_path, monkeypatch):
    # ncu takes a quarter of a minute a call: what is counted is kept, and not counted again for the same source.
    fake_ncu(tmp_path, monkeypatch, output())
    path, said = tmp_path / "out" / "ncu.json", []
    count_calls([CALL], path, 60, said.append)
    assert len(json.loads(path.read_text())) == 2  # two memory formats
    assert "937 MB through DRAM" in said[0] and "up to 62 % used" in said[0]
    monkeypatch.setattr(ncu, "profile_call", None)  # would fail
    count_calls([CALL], path, 60, said.append)
    assert said[2:] == said[:2]
    path.write_text("{")
    with pytest.raises(StudyError, match="not valid JSON"):
        count_calls([CALL], path, 60, said.append)


def test_the_end_of_the_budget_is_no_error(tmp_path, monkeypatch):
    # And the program that holds the GPU is stopped with ncu.
    fake_ncu(tmp_path, monkeypatch, output())
    (tmp_path / "ncu").write_text("#!/bin/sh\nsleep 60\n")
    said = []
    count_calls([CALL], tmp_path / "ncu.json", 0.5, said.append)
    assert said == ["the time is up: run the same command to go on"]
