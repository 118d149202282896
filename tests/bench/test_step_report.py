"""README.md from an invented record of an "Invented GPU"."""

import numpy as np
import pytest

from bench.step.providers import BASELINE, CHECK, INFERENCE, LOADER, TOP, all_providers, ladder
from bench.step.record import Record, StepError, read_record, source_hash
from bench.step.report import report_context, write_step_report

BEST, OTHER = "torchvision channels_last bf16 torch.compile", "torchvision nchw fp16 eager"
SESSION = {
    "session": 1, "on_gpu": True, "commit": {"id": "invented", "dirty": False}, "started": "never",
    "command": "mrcnn-bench step --out invented",
    "environment": {"gpu": {"name": "Invented GPU", "sm_count": 99}, "driver": "1.2", "versions": {"torch": "9.9"}},
    "workload": {"title": "R50-FPN, 91 classes", "images": [12, 800, 1344], "losses": {"loss_mask": 0.7},
                 "activations_std": {"P2": 1.0}},
}  # fmt: skip


def blocks(seconds, seed=0):
    noise = np.random.default_rng(seed).standard_normal(8)
    return list(seconds * (1 + 0.002 * (noise - np.median(noise))))


def row(provider, seconds, beside=None, **more):
    found = {
        "name": provider.name, "group": provider.group, "status": "ok", "reason": "", "session": 1,
        "sources": source_hash(provider.name.startswith("torchvision")), "images": 12, "mode": "eager", "notes": [],
        "block_seconds": blocks(seconds), "seconds_per_step": seconds, "images_per_second": 12 / seconds,
        "step_ms": {"p5": 900 * seconds, "p50": 1e3 * seconds, "p95": 1100 * seconds}, "noise": 0.01,
        "memory": {"allocated_bytes": 2**33, "reserved_bytes": 2**34}, "waits": 7,
        "clock": {"sm_mhz_min": 1700, "sm_mhz_median": 1980, "watts_median": 600},
        "phases_ms": {"forward": 10.0, "backward": 20.0, "update": 1.0},
        "counts": {"anchors": 3072, "anchors_positive": 90, "rois": 6144, "rois_positive": 1536, "mask_rois": 1536},
        "trace": {"launches": 3000, "graph_launches": 0, "waits": {"cudaStreamSynchronize": 40}, "kernels": 3000,
                  "groups": {"our kernels": 2.0}, "ours": {"roi_align_forward_kernel": 1.25}, "top": {}},
    }  # fmt: skip
    if beside:
        found["reference"] = {"name": beside[0], "block_seconds": blocks(beside[1], 1), "images": 12}
    return found | more


def record(seconds=None, **more):
    """Everything measured; `seconds` of rows that are not as usual, `more` rows that replace others."""
    seconds = {BEST: 0.15, OTHER: 0.3, TOP: 0.06, ladder()[-1].name: 0.05} | (seconds or {})
    rows = {}
    for provider in all_providers(True, (1, 8)):
        name, group = provider.name, provider.group
        usual = {BASELINE: 0.25, INFERENCE: 0.02 if name.startswith("ours") else 0.04}.get(group, 0.1)
        beside = None if group in (BASELINE, INFERENCE) else (BEST, seconds[BEST])
        rows[name] = row(provider, seconds.get(name, usual), beside, detections=[90, 100])
        if group == LOADER:
            rows[name]["rates"] = {name: {"images_per_second": 321.0}}
        if group == CHECK:
            modes = ["compiled", "captured"]
            rows[name]["check"] = {
                "equal": True, "steps": 100, "modes": modes, "first_difference": None, "weights": [],
            }  # fmt: skip
    return Record({1: SESSION}, rows | more)


def page(found, tmp_path):
    return write_step_report(found, tmp_path).read_text()


def test_the_verdict_is_against_the_best_baseline(tmp_path):
    text = page(record(), tmp_path)
    verdict = text.splitlines()[2]
    assert f"200.0 img/s** (eager) against 80.0 img/s of the best baseline, {BEST}: 2.50x [2.4" in verdict
    assert verdict.endswith(f"faster; 5.00x {OTHER} (not in the same rounds).") and "figures of a CPU" not in text
    assert f"| **{BEST}** | 80.0 |" in text and "12 images of 800 x 1344" in text


def test_every_table_has_its_figures(tmp_path):
    text = page(record(), tmp_path)
    assert "| 7 one CUDA graph | 3000 | 0 | 40 / 7 | 3000 | 2.0 | – |" in text
    assert "| our kernels | 2.00 | 2.00 |" in text and "| roi_align_forward_kernel | 1.250 |" in text
    assert "| reference nms | 100 ms | +40.00 ms | eager |" in text
    assert (
        "| loader alone | 321.0 |" in text and "100 steps (compiled against captured): losses and weights are" in text
    )
    assert "| ours captured batch 8 | 20.0 ms | 600.0 | 2.00x (not in the same rounds) | 7 | 90–100 |" in text
    assert "8.0 / 16.0 | 1980 / 1700 | 600 |" in text
    assert "Nothing that was measured is slower" in text and "## Not measured" not in text


def test_where_it_loses_is_said(tmp_path):
    slow = {TOP: 0.2, "ours captured batch 1": 0.05, "ours compiled batch 1": 0.05, "ours eager batch 1": 0.05}
    context = report_context(record(slow))
    assert f"{TOP} is slower than {BEST}: 0.75x" in context["losses"]
    assert any(line.startswith(f"{TOP} is slower than the rung before it") for line in context["losses"])
    assert "reference nms is quicker than the Triton kernel in its place" in context["losses"]
    assert any(line.startswith("inference of batch 1 is slower than torchvision") for line in context["losses"])
    assert all(line in page(record(slow), tmp_path) for line in context["losses"])


def test_what_was_not_measured_says_so(tmp_path):
    found = record()
    del found.rows["reference nms"], found.rows["loader alone"]
    provider = ladder()[1]
    found.rows[provider.name] = {"name": provider.name, "group": "ladder", "status": "failed", "reason": "a | b"}
    text = page(found, tmp_path)
    assert "| reference nms | not measured | – | – |  |" in text and "| loader alone | not measured |" in text
    assert f"- {provider.name}: not measured (failed: a / b)" in text


def test_a_red_row_has_no_speed(tmp_path):
    found = record()
    found.rows[TOP] |= {"status": "red", "reason": "a loss is not finite"}
    text = page(found, tmp_path)
    assert f"Nothing can be said yet: {TOP} was not measured." in text and "2.50x" not in text.splitlines()[2]


def test_stale_rows_are_named(tmp_path):
    found = record()
    found.rows[TOP]["sources"] = "older"
    assert f"other code than the present one:** {TOP}." in page(found, tmp_path)


def test_a_ratio_of_other_rounds_has_no_interval(tmp_path):
    found = record()
    found.rows[TOP]["reference"]["name"] = OTHER
    assert "2.50x (not in the same rounds)" in page(found, tmp_path)


def test_a_difference_is_shown(tmp_path):
    found = record()
    (name,) = (p.name for p in all_providers(True, (1, 8)) if p.group == CHECK)
    found.rows[name] |= {"status": "red", "reason": "the two differ"}
    found.rows[name]["check"] |= {"equal": False, "first_difference": 4, "weights": ["a", "b"]}
    assert "losses differ from step 4 on; 2 weights differ" in page(found, tmp_path)


def test_an_empty_folder_is_a_sentence(tmp_path):
    with pytest.raises(StepError, match=r"holds no step\.jsonl"):
        write_step_report(read_record(tmp_path), tmp_path)
