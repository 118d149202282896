import re

import pytest
from synthetic import CEILINGS, ROOF_BYTES, mixed, row, save_pytest, save_study, session, without_time
from typer.testing import CliRunner

from bench.cli import app
from bench.memory_plots import memory_curves, memory_plots
from bench.plots import scaling_curves
from bench.report import claims, write_report
from bench.results import ResultsError, read_results

CPU = {"gpu": None, "cpu_name": "Invented CPU", "cpu_threads": 1}
SWEEP = [
    row(provider, base * rois / 512, "bf16", op="multiscale_roi_align", workload=workload)
    for rois, workload in ((8, "rois-8"), (128, "rois-128"), (512, "train-box"), (2048, "rois-2048"))
    for provider, base in (("triton", 1.0), ("torchvision", 2.0))
]


def report(tmp_path, rows, **more):
    """HTML, Markdown and the names of the plots."""
    page, markdown, *plots = write_report(save_study(tmp_path / "study", rows, **more), tmp_path / "out")
    return page.read_text(), markdown.read_text(), [p.name for p in plots]


def claims_of(tmp_path, rows, **more):
    results = read_results(save_study(tmp_path / "study", rows, **more))
    return claims(results.table(), results.table("op_eager"))


def test_losses_come_first_and_noise_is_no_win(tmp_path):
    # 0.1 % within the noise must not be called faster, and only Triton's best layout counts.
    made = claims_of(tmp_path, mixed())
    assert [c.verdict for c in made] == ["slower", "no difference", "faster"]
    assert made[0].ratio == pytest.approx(0.8) and "bf16" in made[0].call
    assert made[0].low < 0.8 < made[0].high and made[0].noise == pytest.approx(0.01)
    assert made[2].mode == "channels_last"


def test_the_train_suite_comes_first(tmp_path):
    # What trains decides; a loss with eight RoIs must not push it down the page, nor vanish.
    small = [row("triton", 4.0, workload="small"), row("torch", 1.0, workload="small")]
    assert [c.suite for c in claims_of(tmp_path, [*small, *mixed()])] == ["train", "train", "train", "small"]


def test_a_win_that_dispatch_eats_shows_it(tmp_path):
    # The kernel is twice as fast, the call half as fast: both figures stand in the same line.
    page, markdown, _ = report(tmp_path, [row("triton", 0.1, eager=0.9), row("torch", 0.2, eager=0.3)])
    for text in (page, markdown):
        assert "2.00x" in text and "0.50x" in text


def test_the_page_states_the_loss_and_needs_nothing_else(tmp_path):
    # One file to send around: no script, style sheet, font or image from anywhere else.
    failed = without_time("torch.compile", "failed", "error 1 <b>")
    html, text, plots = report(tmp_path, [*mixed(), failed])
    assert "slower in 1" in html and "0.80x" in html and "error 1 &lt;b&gt;" in html
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)|url\((?!#)|@import|<script|<link""", html)
    assert html.count("<svg") == 3 == len(plots) and "currentColor" in html and "#123456" not in html
    assert "slower in 1" in text.replace("*", "") and "<b>" not in text
    assert all((tmp_path / "out" / link).is_file() for link in re.findall(r"\]\((plots/[^)]+)\)", text))


def test_a_red_row_shows_no_time_anywhere(tmp_path):
    # A wrong result is quick for free. 7.77 ms is in the file, and nowhere in the report; nor does it beat anyone.
    red = {**row("triton", 7.77), "status": "red", "reason": "off by 0.5"}
    failed = without_time("torchvision", "failed", "ran away")
    for text in report(tmp_path, [red, failed, row("torch", 8.0)])[:2]:
        assert "off by 0.5" in text and "ran away" in text
        assert "1 Triton row red or failed" in text and "1 baseline row red or failed" in text
        assert "7.77" not in text and "7.80" not in text and "faster in" not in text


def test_stale_rows_are_marked_and_not_counted(tmp_path):
    # A time of earlier code next to one of today's must not look the same, in tables and in plots.
    old = [{**r, "sources": "of earlier code"} for r in mixed()[:4]]
    html, text, _ = report(tmp_path, [*old, *mixed()[4:]])
    for words in (html, text):
        assert "4 rows are stale" in words and "source changed: 4" in words
        assert "faster in 0" in words.replace("*", "")
    assert html.count('<tr class="stale">') == 5 and text.count("(stale)**") == 5  # four rows and a claim
    assert "hollow: stale" in html and "(stale)" in html
    html, text, _ = report(tmp_path, mixed())
    assert "stale</span>" not in html and "(stale)" not in text and "hollow: stale" not in html


def test_only_stale_times_say_nothing_of_the_present_code(tmp_path):
    # After a change of the kernel, before the next run on a GPU.
    html, text, _ = report(tmp_path, [{**r, "inputs": "others"} for r in mixed()])
    for words in (html, text):
        assert "every Triton time is stale" in words and "faster in" not in words


def test_a_cpu_run_invents_nothing(tmp_path):
    # Without Triton times there is no speed-up to state or to draw, and no column of a GPU.
    common = {"op": "box_iou", "workload": "cpu", "device": "cpu"}
    rows = [
        without_time("triton", "skipped", "needs a GPU", **common),
        row("torchvision", 2.0, **common),
        row("torch", 8.0, **common),
    ]
    html, text, plots = report(tmp_path, rows, sessions=[session(environment=CPU)])
    for words in (html, text):
        assert "No Triton time exists" in words and "awaiting a run on a GPU" in words and "Invented CPU" in words
        assert "needs a GPU" in words and "faster in" not in words
    header = next(line for line in text.splitlines() if line.startswith("| call | provider"))
    assert header == "| call | provider | op_eager | 25 %–75 % | vs best | vs same dtype | error | first_call |"
    assert plots == ["box_iou-forward.png"]


def test_a_roof_is_shown_as_a_bound(tmp_path):
    # It stands beside times in a table: "≥" and its own column tell them apart, also where Triton has no time at all.
    floor = {"dram_bytes": int(ROOF_BYTES), "instructions": 0}
    rows = [without_time("triton", "failed", "out of luck", floor=floor), row("torch", 4.0, floor=floor)]
    html, text, _ = report(tmp_path, rows, sessions=[session(ceilings=CEILINGS)])
    for words in (html, text):
        assert "roof (bound)" in words and words.count("≥ 1.00 ms") == 2 and "25 % (DRAM)" in words
        assert "ceiling: DRAM copy" in words and "4,000 GB/s" in words and "700 TFLOP/s" in words
    assert "No Triton time" in html and "awaiting a run" not in html


def test_waiting_for_the_device_is_flagged(tmp_path):
    # A kernel time that contains the host's part is not what it seems.
    html, text, _ = report(tmp_path, [row("triton", 1.0), row("torchvision", 9.0, waits=True)])
    # On its row, and beside the claim that it is the best baseline of.
    assert html.count("waits for the device</span>") == 2 and text.count("waits for the device") >= 2


def test_repeats_are_reported(tmp_path):
    # One different bit in a hundred runs is what "deterministic" is about: it must be read off the row.
    rows = [
        row("triton", 1.0, direction="backward", bitwise=True, runs=100),
        row("triton atomic", 0.9, direction="backward", layout="channels_last", bitwise=False, runs=7),
        row("torch", 8.0, direction="backward"),
    ]
    html, text, _ = report(tmp_path, rows)
    for words in (html, text):
        assert "repeats bit for bit" in words and "yes, 100 runs" in words and "no, run 7 differs" in words
        assert "8.00x" in words and "faster in 1" in words.replace("*", "").replace("<strong>", "")
    assert "repeats bit for bit" not in report(tmp_path, mixed())[1]


def test_our_other_forms_count_as_ours_when_they_are_wrong(tmp_path):
    # A red row of the atomics is a bug of this repository, not a weak rival.
    red = without_time("triton atomic", "red", "off by 0.5", direction="backward")
    for text in report(tmp_path, [red, row("torch", 8.0)])[:2]:
        assert "1 Triton row red or failed" in text and "baseline row" not in text


def test_the_curve_over_roi_size_has_no_point_of_all_sizes(tmp_path):
    # The train workload mixes them: it has no place on that axis.
    sizes = (32, 128, 512)
    made = [row("triton", s, "bf16", op="multiscale_roi_align", workload=f"roi-size-{s}") for s in sizes]
    made += [row("triton", 1.0, "bf16", op="multiscale_roi_align", workload="train-box-uniform")]
    table = read_results(save_study(tmp_path / "study", made)).table()
    curves = scaling_curves("multiscale_roi_align", table)
    assert list(curves) == ["roi_size"] and sorted(curves["roi_size"]["size"]) == list(sizes)
    assert write_report(tmp_path / "study", tmp_path / "out")


def test_sweeps_are_curves_and_no_claims(tmp_path):
    # A curve's points are picked to span a range, not for what they say; the train workload is one of them.
    results = read_results(save_study(tmp_path / "study", SWEEP))
    made = claims(results.table(), results.table("op_eager"))
    assert [c.call for c in made] == ["multiscale_roi_align forward, train-box, bf16"]
    curves = scaling_curves("multiscale_roi_align", results.table())
    assert list(curves) == ["rois"] and sorted(set(curves["rois"]["size"])) == [8, 128, 512, 2048]
    plots = write_report(tmp_path / "study", tmp_path / "out")[2:]
    assert "multiscale_roi_align-forward-scaling.png" in [p.name for p in plots]
    assert not scaling_curves("multiscale_roi_align", results.table().head(2))  # one point is no curve


NO_ROOM = "out of memory (asked for 17.2 GiB)"


def memory_rows():
    """Torchvision's memory grows with objects and anchors, and does not suffice for a thousand objects."""
    sizes = {"objects-1": 9, "objects-10": 12, "train": 900, "objects-100": 1800}
    sizes |= {"image-400x672": 220, "image-1200x2016": 2000}
    rows = []
    for name, mib in sizes.items():
        common = {"op": "label_grid_anchors", "workload": name}
        rows.append(row("triton", 0.1, peak_memory_bytes=20 * 2**20, noise=0.01, **common))
        rows.append(row("torchvision", 5.0, peak_memory_bytes=mib * 2**20, **common))
    common = {"op": "label_grid_anchors", "workload": "objects-1000"}
    rows.append(row("triton", 0.3, peak_memory_bytes=21 * 2**20, noise=0.01, **common))
    return [*rows, without_time("torchvision", "failed", NO_ROOM, **common)]


def test_memory_is_a_curve_with_its_end(tmp_path):
    # The complaint: what runs out has to stand in the figure, and nowhere as a number that nobody measured.
    table = read_results(save_study(tmp_path / "study", memory_rows())).table()
    curves = memory_curves("label_grid_anchors", table)
    assert list(curves) == ["objects", "anchors"]
    theirs = curves["objects"][curves["objects"]["provider"] == "torchvision"].sort_values("size")
    assert list(theirs["size"]) == [1, 10, 50, 100, 1000]
    assert list(theirs["mib"])[:4] == [9, 12, 900, 1800] and theirs["mib"].isna().sum() == 1
    anchors = curves["anchors"][curves["anchors"]["provider"] == "torchvision"].sort_values("size")
    assert dict(zip(anchors["label"], anchors["mib"], strict=True)) == {"67k": 220, "269k": 900, "604k": 2000}


def predictor_memory():
    """The forward keeps more of the ordinary path than its backward takes: of both passes it is the larger part."""
    rows = []
    for name, mib in {"classes-2": 700, "train": 900, "classes-366": 2000}.items():
        common = {"op": "mask_predictor_loss", "direction": "backward", "workload": name, "dtype": "bf16"}
        for layout, more in (("nchw", 5), ("channels_last", 0)):
            memory = {"peak_memory_bytes": mib * 2**20, "step_memory_bytes": (3 * mib + more) * 2**20}
            rows.append(row("torchvision", 5.0, layout=layout, **memory, **common))
        memory = {"peak_memory_bytes": 500 * 2**20, "step_memory_bytes": 600 * 2**20}
        rows.append(row("triton", 0.1, layout="channels_last", **memory, noise=0.01, **common))
    return rows


def test_memory_of_both_passes_is_drawn_and_written(tmp_path):
    # The predictor's goal is about what a step has to have: a backward's own peak leaves out what the forward kept.
    table = read_results(save_study(tmp_path / "study", predictor_memory())).table()
    curves = memory_curves("mask_predictor_loss", table)
    assert list(curves) == ["classes"]
    theirs = curves["classes"][curves["classes"]["provider"] == "torchvision"].sort_values("size")
    assert list(theirs["size"]) == [2, 81, 366] and list(theirs["mib"]) == [2100, 2700, 6000]  # its better layout
    html, text, plots = report(tmp_path, predictor_memory())
    assert "mask_predictor_loss-backward-memory.png" in plots
    for words in (html, text):
        assert "peak memory of a forward and its backward" in words and "both passes" in words
    assert "2,700.0 MiB" in text and "600.0 MiB" in text


def test_pasting_is_a_curve_through_its_inference_workload(tmp_path):
    # It has no training workload: without the canonical point a curve would lack its middle.
    common = {"op": "paste_masks", "layout": "contiguous", "noise": 0.01}
    rows = [
        row("triton", ms, workload=w, **common) for w, ms in (("masks-10", 0.1), ("inference", 1), ("masks-300", 3))
    ]
    table = read_results(save_study(tmp_path / "study", rows)).table()
    points = scaling_curves("paste_masks", table)["masks"].sort_values("size")
    assert list(points["size"]) == [10, 100, 300]


def test_out_of_memory_is_in_the_report(tmp_path):
    # In the table, among the baselines that failed, and in the figure: a missing row would read as "not tried".
    html, text, plots = report(tmp_path, memory_rows())
    assert "label_grid_anchors-forward-memory.png" in plots
    for words in (html, text):
        assert NO_ROOM in words and "out of memory, asked for 17.2 GiB" in words
        assert "label_grid_anchors, forward: peak memory of a call" in words
        assert "1 baseline row red or failed" in words
    assert "20.0 MiB" in text and "900.0 MiB" in text and ">out of memory<" in html


def test_memory_is_drawn_only_where_it_is_known(tmp_path):
    # A CPU does not count it, and a figure of nothing, or of one point, says nothing.
    cpu = [{**r, "peak_memory_bytes": None} for r in memory_rows()]
    for rows in (cpu, memory_rows()[4:6], mixed()):
        table = read_results(save_study(tmp_path / "study", rows)).table()
        assert not memory_plots(table)


def test_environment_and_what_is_missing(tmp_path):
    # What a reader needs to judge the numbers, and to get them again.
    html, text, _ = report(tmp_path, mixed())
    for words in (html, text):
        for fact in ("Invented GPU (99 SMs)", "abc123, with uncommitted changes", "2031-01-01", "9.9"):
            assert fact in words
        assert "python -m bench study --out somewhere" in words and "have not been measured yet" in words


def test_bad_input_writes_nothing(tmp_path):
    # A report half made of nothing would pass for one.
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ResultsError):
        write_report(tmp_path / "results.json", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["folder", "study.jsonl", "results.json"])
def test_the_command_line(tmp_path, kind):
    # Exit codes and streams are what scripts build on: 0 and the files, or 2 and one line on stderr.
    folder = save_study(tmp_path / "study", mixed())
    json = save_pytest(tmp_path / "results.json", mixed())
    path = {"folder": folder, "study.jsonl": folder / "study.jsonl", "results.json": json}[kind]
    done = CliRunner().invoke(app, ["report", str(path), "--output", str(tmp_path / "out")])
    assert done.exit_code == 0 and (tmp_path / "out" / "report.html").is_file()


def test_the_command_line_on_nothing(tmp_path):
    # See above.
    done = CliRunner().invoke(app, ["report", str(tmp_path / "nothing.json"), "--output", str(tmp_path / "other")])
    assert done.exit_code == 2 and not (tmp_path / "other").exists()
    assert done.stderr.count("\n") == 1 and "does not exist" in done.stderr


def test_help_shows_defaults():
    # The default folder is where people look for the page.
    assert "runs/bench-report" in CliRunner().invoke(app, ["report", "--help"]).output
