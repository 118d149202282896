import json
import re

import pytest
from typer.testing import CliRunner

from bench.cli import app
from bench.report import claims, write_report
from bench.results import ResultsError, load_results

NAMES = {"op": "roi_align", "direction": "forward", "workload": "canonical", "device": "cuda", "layout": "nchw"}


def measurement(provider, milliseconds, dtype="fp32", measured_dtype=None, **extra):
    extra = {**NAMES, "provider": provider, "dtype": dtype, "measured_dtype": measured_dtype or dtype, **extra}
    extra |= {"shapes": "2x3", "error": 1e-6, "tolerance": 1e-4, "measures": "op_warm", "peak_memory_bytes": 2**20}
    samples = [milliseconds / 1e3 * factor for factor in (0.98, 0.99, 1.0, 1.01, 1.02)]
    return {"extra_info": {"note": "", **extra}, "stats": {"data": samples, "rounds": 5}}


# Triton wins fp32 (2x), loses bf16 to torchvision's *fp32* time, and ties backward.
MIXED = [
    measurement("triton", 1.0, layout="channels_last"),
    measurement("triton", 3.0),
    measurement("torchvision", 2.0),
    measurement("torch", 8.0),
    measurement("triton", 2.5, "bf16"),
    measurement("torchvision", 4.0, "bf16", "fp16"),
    measurement("torch", 5.0, "bf16"),
    measurement("triton", 1.0, direction="backward"),
    measurement("torch", 1.005, direction="backward"),
]
CPU_ONLY = [measurement("torchvision", 2.0, device="cpu"), measurement("torch", 8.0, device="cpu")]


def save(tmp_path, benchmarks, **more):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"benchmarks": benchmarks, "machine_info": {}, "commit_info": {}, **more}))
    return path


def pick(table, provider, dtype, layout="nchw", direction="forward"):
    keys = {"provider": provider, "dtype": dtype, "layout": layout, "direction": direction}
    return table[(table[list(keys)] == list(keys.values())).all(axis=1)].iloc[0]


def test_ratios(tmp_path):
    # The best baseline may be in a more precise dtype (a bf16 kernel slower than fp32 is no win), never a less
    # precise one; the same-dtype ratio stands beside it.
    table = load_results(save(tmp_path, MIXED))
    fp32 = pick(table, "triton", "fp32", "channels_last")
    assert fp32["ratio_best"] == pytest.approx(2.0) and fp32["best_baseline"] == "torchvision fp32"
    bf16 = pick(table, "triton", "bf16")
    assert bf16["ratio_best"] == pytest.approx(2.0 / 2.5) and bf16["best_baseline"] == "torchvision fp32"
    assert bf16["ratio_same_dtype"] == pytest.approx(5.0 / 2.5)
    assert pick(table, "torch", "fp32")["ratio_best"] == pytest.approx(0.25)
    assert (fp32["q25"], fp32["q75"]) == (pytest.approx(0.99e-3), pytest.approx(1.01e-3))


def test_an_fp32_row_is_not_measured_against_half_precision(tmp_path):
    # Whoever needs fp32 cannot use a quick fp16 op.
    quick_half = measurement("torchvision", 0.1, "bf16", "fp16")
    table = load_results(save(tmp_path, [*MIXED, quick_half]))
    assert pick(table, "triton", "fp32", "channels_last")["ratio_best"] == pytest.approx(2.0)
    assert pick(table, "triton", "bf16")["ratio_best"] == pytest.approx(0.1 / 2.5)


def test_losses_come_first_and_noise_is_no_win(tmp_path):
    # Three-valued: 0.5 % with overlapping quartiles must not be called faster. Only Triton's best layout counts.
    made = claims(load_results(save(tmp_path, MIXED)))
    assert [c.judgement for c in made] == ["slower", "no clear difference", "faster"]
    assert made[0].ratio == pytest.approx(0.8) and "bf16" in made[0].call


def test_the_page_states_the_loss_and_needs_nothing_else(tmp_path):
    # One file to send around: no script, style sheet, font or image from anywhere else.
    failed = {**NAMES, "dtype": "fp32", "provider": "torch.compile", "status": "failed", "reason": "error 1 <b>"}
    page, markdown, *plots = write_report(save(tmp_path, MIXED, not_measured=[failed]), tmp_path / "out")
    html = page.read_text()
    assert "slower in 1" in html and "0.80x" in html and "error 1 &lt;b&gt;" in html
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)|url\((?!#)|@import|<script|<link""", html)
    assert html.count("<svg") == 3 == len(plots) and "currentColor" in html and "#123456" not in html
    text = markdown.read_text()
    assert "slower in 1" in text and "no_" not in text
    assert all((tmp_path / "out" / link).is_file() for link in re.findall(r"\]\((plots/[^)]+)\)", text))


def test_a_cpu_run_invents_nothing(tmp_path):
    # Without Triton rows there is no speed-up to state or to draw.
    page, markdown, *plots = write_report(save(tmp_path, CPU_ONLY), tmp_path / "out")
    for text in (page.read_text(), markdown.read_text()):
        assert "No Triton time exists" in text and "awaiting a run on a GPU" in text
        assert "faster in" not in text
    assert [p.name for p in plots] == ["roi_align-forward.png"]


def test_results_without_samples_still_load(tmp_path):
    # `--benchmark-save` keeps only the statistics.
    slim = {"extra_info": MIXED[0]["extra_info"], "stats": {"q1": 1.0, "median": 2.0, "q3": 3.0, "rounds": 9}}
    row = load_results(save(tmp_path, [slim])).iloc[0]
    assert (row["median"], row["samples"]) == (2.0, 9)


BAD = {
    "missing": None,
    "broken": "{",
    "empty": "",
    "a list": "[]",
    "no benchmarks": '{"benchmarks": []}',
    "another suite's": '{"benchmarks": [{"extra_info": {}, "stats": {"data": [1]}}]}',
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path, content):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ResultsError) as raised:
        write_report(path, tmp_path / "out")
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_the_command_line(tmp_path):
    # Exit codes and streams are what scripts build on: 0 and the files, or 2 and one line on stderr.
    runner = CliRunner()
    done = runner.invoke(app, ["report", str(save(tmp_path, MIXED)), "--output", str(tmp_path / "out")])
    assert done.exit_code == 0 and (tmp_path / "out" / "report.html").is_file()
    failed = runner.invoke(app, ["report", str(tmp_path / "nothing.json"), "--output", str(tmp_path / "other")])
    assert failed.exit_code == 2 and not (tmp_path / "other").exists()
    assert failed.stderr.count("\n") == 1 and "does not exist" in failed.stderr


def test_help_shows_defaults():
    done = CliRunner().invoke(app, ["report", "--help"])
    assert "runs/bench-report" in done.output
