import json

import pandas as pd
import pytest
from synthetic import CEILINGS, ROOF_BYTES, mixed, row, save_pytest, save_study, session, without_time

from bench.results import ResultsError, best_triton_rows, read_results

FLOOR = {"dram_bytes": int(ROOF_BYTES), "instructions": 0}


def pick(table, provider, dtype="fp32", **names):
    keys = {"provider": provider, "dtype": dtype, "direction": "forward", **names}
    return table[(table[list(keys)] == list(keys.values())).all(axis=1)].iloc[0]


def read(tmp_path, rows, **more):
    return read_results(save_study(tmp_path / "study", rows, **more))


def test_ratios_are_against_the_best_baseline_in_any_dtype(tmp_path):
    # A bf16 kernel slower than torchvision in fp32 is no win, whatever it gains over bf16 baselines.
    table = read(tmp_path, mixed()).table()
    fp32 = pick(table, "triton", layout="channels_last")
    assert fp32["ratio"] == pytest.approx(2.0) and fp32["best_baseline"] == "torchvision fp32"
    assert fp32["low"] < 2.0 < fp32["high"] and fp32["high"] - fp32["low"] < 0.05 and fp32["verdict"] == "faster"
    bf16 = pick(table, "triton", "bf16")
    assert bf16["ratio"] == pytest.approx(0.8) and bf16["verdict"] == "slower"
    assert bf16["best_baseline"] == "torchvision fp32" and bf16["ratio_same_dtype"] == pytest.approx(2.0)
    assert pick(table, "torch")["ratio"] == pytest.approx(0.25)
    assert fp32["q25"] < fp32["median"] < fp32["q75"] and fp32["median"] == pytest.approx(1e-3)


def test_the_ratio_of_another_time_has_its_own_best_baseline(tmp_path):
    # The quickest kernel need not be the quickest call: launches and dispatch count there.
    rows = [row("triton", 0.1, eager=0.9), row("torch", 0.2, eager=0.1), row("torchvision", 0.15, eager=2.0)]
    results = read(tmp_path, rows)
    assert pick(results.table(), "triton")["ratio"] == pytest.approx(1.5)
    eager = pick(results.table("op_eager"), "triton")
    assert eager["ratio"] == pytest.approx(0.3) and eager["best_baseline"] == "torch fp32"


def test_only_baselines_are_rivals(tmp_path):
    # Our atomics, our separate calls and torchvision's deterministic mode stand beside the others: however quick, they
    # are neither what Triton is compared with nor what stands for it.
    others = [row(name, 0.1) for name in ("triton atomic", "triton apart", "torchvision deterministic")]
    table = read(tmp_path, [row("triton", 1.0, layout="nchw"), *others, row("torch", 2.0)]).table()
    ours = pick(table, "triton")
    assert ours["ratio"] == pytest.approx(2.0) and ours["best_baseline"] == "torch fp32"
    assert pick(table, "triton atomic")["ratio"] == pytest.approx(20.0)  # shown, as a row
    assert list(best_triton_rows(table)["provider"]) == ["triton"]


@pytest.mark.parametrize(("noise", "verdict"), [(0.005, "faster"), (0.1, "no difference"), (-0.1, "no difference")])
def test_a_difference_below_the_noise_floor_is_none(tmp_path, noise, verdict):
    # An A/A pair 10 % apart: this run cannot tell a ratio of 1.05 from nothing, however tight its interval.
    found = pick(read(tmp_path, [row("triton", 1.0, noise=noise), row("torch", 1.05)]).table(), "triton")
    assert found["verdict"] == verdict and found["low"] > 1.03


def test_both_kinds_of_file_give_the_same_table(tmp_path):
    # One suite, two carriers: a number must not depend on which of them brought it.
    rows = [*mixed(), without_time("torch.compile", "failed", "error 1")]
    study = read(tmp_path, rows).table()
    other = read_results(save_pytest(tmp_path / "results.json", rows)).table()
    pd.testing.assert_frame_equal(study.drop(columns="session"), other.drop(columns="session"))


def test_the_newest_row_of_a_name_wins(tmp_path):
    # A study that goes on measures a stale row again and appends it.
    # Of providers that exist no longer, too: what is left of them would make the call stale for ever.
    old = [row("triton", 9.0, direction="backward", sources="long ago"), row("gone", 1.0, direction="backward")]
    found = read(tmp_path, [*old, *mixed()], sessions=[session(1)]).table()
    assert len(found) == len(mixed()) and "gone" not in set(found["provider"])
    assert pick(found, "triton", direction="backward")["median"] == pytest.approx(1e-3)


def test_a_line_cut_off_in_the_middle_does_not_count(tmp_path):
    # The machine may vanish while a line is written; everything before it is whole.
    cut = json.dumps({"kind": "call", "session": 1, "rows": [row("triton", 5.0, "bf16")]})[:200]
    assert len(read(tmp_path, [row("triton", 1.0)], tail=cut).rows) == 1


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"sources": "0123"}, "the op's source changed"),
        ({"inputs": "0123"}, "the inputs changed"),
        ({"method": 0}, "the way of timing changed"),
        ({"workload": "of-old"}, "the workload is gone"),
    ],
)
def test_stale_rows_say_why(tmp_path, changed, reason):
    # A time of other code, inputs or method is no time of the present ones.
    found = read(tmp_path, [{**row("triton", 1.0), **changed}]).table().iloc[0]
    assert found["stale"] == reason if reason else pd.isna(found["stale"])


def test_a_row_above_its_roof_is_red(tmp_path):
    # Quicker than the memory allows: the work was not done or not timed. It has no time and beats nothing.
    rows = [row("triton", 2.0, floor=FLOOR), row("torch", 0.9, floor=FLOOR), row("torchvision", 0.99, floor=FLOOR)]
    table = read(tmp_path, rows, sessions=[session(ceilings=CEILINGS)]).table()
    red, edge, honest = (pick(table, name) for name in ("torch", "torchvision", "triton"))
    assert red["status"] == "red" and red["reason"].startswith("kernel_cold is less than its bytes can take")
    assert red[["median", "kernel_cold", "op_eager", "first_call", "roof_share", "ratio"]].isna().all()
    assert edge["status"] == "ok"  # ceilings are measured too: a per cent above is none
    assert honest["roof_share"] == pytest.approx(0.5) and honest["bound"] == "DRAM"
    assert honest["best_baseline"] == "torchvision fp32"


def test_a_warm_row_cannot_beat_the_cache(tmp_path):
    # A warm call may find all in L2, but has to get it from there: 4 GB at 10 TB/s take 0.4 ms.
    quick = row("torch", 2.0, floor=FLOOR)
    quick["times"]["kernel_warm"] = [0.3e-3] * len(quick["times"]["kernel_warm"])
    table = read(tmp_path, [row("triton", 2.0, floor=FLOOR), quick], sessions=[session(ceilings=CEILINGS)]).table()
    assert pick(table, "torch")["status"] == "red" and "kernel_warm" in pick(table, "torch")["reason"]


def test_a_mended_floor_reaches_old_rows(tmp_path):
    # Times are dear, floors are not: a better count of the bytes is applied to what was measured before it.
    old = row("triton", 1.0, floor=FLOOR) | {"model": "an older one"}
    found = read(tmp_path, [old]).table().iloc[0]
    assert found["dram_bytes"] != ROOF_BYTES and 4e8 < found["dram_bytes"] < 5e8  # roi_align, train, fp32


def test_instructions_alone_turn_nothing_red(tmp_path):
    # A kernel that finds a way to need fewer of them is better than the model, not a cheat.
    clever = row("triton", 1.0, floor={"dram_bytes": 1, "instructions": int(5e9)})
    table = read(tmp_path, [clever], sessions=[session(ceilings=CEILINGS)]).table()
    assert table.iloc[0]["status"] == "ok" and table.iloc[0]["roof_share"] == pytest.approx(5.0)


def test_a_row_without_a_check_passed_has_no_time(tmp_path):
    # Even where a file holds one.
    red = {**row("torch", 0.5), "status": "red", "reason": "wrong"}
    table = read(tmp_path, [row("triton", 1.0), red]).table()
    assert pick(table, "torch")[["median", "kernel_cold", "op_eager", "first_call"]].isna().all()
    assert pd.isna(pick(table, "triton")["ratio"])


BAD = {
    "missing": None,
    "broken": "{",
    "empty": "",
    "a list": "[]",
    "no benchmarks": '{"benchmarks": []}',
    "another suite's": '{"benchmarks": [{"extra_info": {}, "stats": {"data": [1]}}]}',
}
BAD_STUDIES = {
    "empty": "",
    "no rows": '{"kind": "session", "session": 1, "environment": {}}\n',
    "broken": '{"kind": \n',
    "not ours": '{"kind": "row"}\n',
    "rows from nowhere": json.dumps({"kind": "call", "session": 7, "rows": [row("torch", 1.0)]}) + "\n",
    "a list": "[]\n",
}


@pytest.mark.parametrize(
    ("name", "content"),
    [("results.json", c) for c in BAD.values()] + [("study.jsonl", c) for c in BAD_STUDIES.values()],
)
def test_bad_input_is_one_sentence(tmp_path, name, content):
    # Whoever mistypes a path or mixes up files gets told which one, not a traceback.
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(ResultsError) as raised:
        read_results(path)
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)
