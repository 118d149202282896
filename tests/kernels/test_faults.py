"""The tests can fail: a fault planted in a copy of each kernel turns that kernel's tests red."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

import kernels

KERNELS = Path(kernels.__file__).parent
TESTS = Path(__file__).parent

# kernel function, op, what stands there (once, inside that function), what the fault makes of it, tests that must fail
FAULTS = [
    ("_add_sample", "roi_align", "fma(wy_low * wx_high", "fma(wy_low * wx_low", "forward_is_as_exact"),
    ("_widen", "roi_align", "values << 16", "values << 15", "halves and pairs"),
    ("_axis", "roi_align", "whole = (lowest >= -1.0)", "whole = (lowest >= -2.0)", "every_kind and 1-72"),
    ("corners", "roi_align", "position >= -1.0", "position >= 0.0", "test_every_kind_of_box"),
    ("roi_geometry_kernel", "roi_align", "(area) + THRESHOLDS[i - 1]", "(area) + THRESHOLDS[i - 1] * 1.0001", "levels"),
    ("select_level", "roi_align", "level == i:", "level == i + 1:", "torchvisions_pooler"),
    ("roi_align_matrix_kernel", "roi_align", "total * weight", "total", "halves and products"),
    ("_cells_under", "roi_align", "end.to(tl.int32) + 1", "end.to(tl.int32)", "halves and products"),
    ("dot", "roi_align", "return tl.dot(low, values, total)", "return total", "gradients_in_halves"),
    ("_hat", "roi_align", "maximum(1.0 -", "maximum(0.9 -", "torchvisions_pooler"),
    ("_bins_near", "roi_align", "last - first + 1", "last - first", "every_tile"),
    ("tile_of", "roi_align", "inside % across * TILE_W", "inside // across * TILE_W", "every_tile"),
    ("list_rois_kernel", "roi_align", "x + TILE_W", "x + TILE_W - 1", "every_tile"),
    ("group_rois_kernel", "roi_align", "first + lane, here", "number - 1 - first - lane, here", "torchvisions_pooler"),
    ("roi_align_atomic_kernel", "roi_align", "(wy_high * wx_low)", "(wy_high * wx_high)", "atomics"),
    (
        "transpose_kernel",
        "roi_align",
        "column[:, None].to(tl.int64) * rows + row[None, :]",
        "column[:, None].to(tl.int64) + row[None, :] * columns",
        "transposed",
    ),
    ("box_iou_kernel", "box_iou", "iou_ptr += batch * n * m", "iou_ptr += batch * n * n", "batched"),
    ("box_iou_kernel", "box_iou", "range(narrow, last,", "range(narrow, narrow,", "every_chunk"),
    ("_rows", "box_iou", "n - 1", "n - 2", "bit_equal and 37"),
    ("_chunk", "box_iou", "rows2[4] + first + lane", "rows1[4] + first + lane", "bit_equal and 37"),
    ("_iou", "box_iou", "hull - union, hull", "hull, hull", "known_values"),
    ("_share", "box_iou", "0.5", "1.0", "gradient_at_ties"),
    ("box_iou_backward_kernel", "box_iou", "-by_union * iou", "by_union * iou", "gradient_at_ties"),
    ("box_iou_backward_kernel", "box_iou", "by_area += by_hull", "by_area -= by_hull", "gradient_in_fp32 and giou"),
    ("_near", "label_anchors", "divide(low - cells_high", "divide(high - cells_low", "maxima"),
    ("_bound", "label_anchors", "ratio * 1.0001", "ratio * 0.5", "search_ends"),
    ("_bound", "label_anchors", "largest * 4.8e-7", "largest * 0.0", "rounding_moves"),
    (
        "_near",
        "label_anchors",
        "last.to(tl.int32)",
        "first.to(tl.int32)",
        "maxima",
    ),
    (
        "best_iou_with_grid_kernel",
        "label_anchors",
        "most == INF, INF",
        "most == INF, 0.0",
        "flattens",
    ),
    (
        "best_iou_with_grid_kernel",
        "label_anchors",
        "where(exists, iou, 0.0)",
        "where(exists, iou, 0.0) * 0.5",
        "maxima",
    ),
    (
        "best_iou_with_anchors_kernel",
        "label_anchors",
        "where(exists, iou, 0.0)",
        "where(exists, iou, 0.0) * 0.5",
        "maxima",
    ),
    ("load_grid_anchors", "label_anchors", "column // PER_CELL", "column", "given_anchors"),
    (
        "load_grid_tile",
        "label_anchors",
        "first_anchor + y * columns",
        "first_anchor + y * rows",
        "given_anchors",
    ),
    ("hull_of", "label_anchors", "tl.max(tl.where(exists, x2", "tl.max(tl.where(exists, x1", "given_anchors"),
    ("find_objects", "label_anchors", "apart & proper", "apart", "negative_area"),
    ("label_anchors_kernel", "label_anchors", "~(bound < matters)", "~(bound < 0.8)", "test_options"),
    ("label_anchors_kernel", "label_anchors", "iou > best", "iou >= best", "ties_go_to"),
    ("label_anchors_kernel", "label_anchors", "(best_of_gt > 0)", "(best_of_gt >= 0)", "require_overlap"),
    ("label_anchors_kernel", "label_anchors", "tl.where(own_best > 0,", "tl.where(own_best >= 0,", "require_overlap"),
    ("nms_words_kernel", "nms", "iou > threshold", "iou >= threshold", "exactly_on_the_threshold"),
    ("nms_words_kernel", "nms", "(intersection > slack * enough) ^ suppresses", "(width < 0)", "around_the"),
    (
        "nms_words_kernel",
        "nms",
        "(first_word + BLOCK_WORDS) * 32 <= first_row",
        "first_word * 32 < first_row",
        "tiles_of_a_gpus_shape",
    ),
    ("nms_words_kernel", "nms", "== classes", "!= classes", "each_other"),
    ("_survey", "nms", "(area < 1e38), 0, valid", "(area < 1e38), 0, 0", "odd_boxes"),
    ("_settle", "nms", "(-2 << lane)", "(-4 << lane)", "chain and triton"),
    ("_or", "nms", "a | b", "a & b", "chain and triton"),
    ("_load_words", "nms", "wanted[:, None] & (word", "(wanted | True)[:, None] & (word", "chain and triton-130"),
    ("nms_sweep_kernel", "nms", "word == step", "word == first", "chain and triton"),
    ("nms_sweep_kernel", "nms", "first * 32, BLOCK_ROWS)", "first, BLOCK_ROWS)", "more_than_one"),
    ("_pixels", "mask_bce_loss", "(tl.int64) * strides[2]", "(tl.int64) * strides[3]", "strided"),
    (
        "mask_bce_forward_kernel",
        "mask_bce_loss",
        "mask = pixel < PIXELS",
        "mask = pixel < BLOCK",
        "torchvisions_mask_loss",
    ),
    ("mask_bce_backward_kernel", "mask_bce_loss", "(end - 1) // of_roi", "start // of_roi", "stretch"),
    ("mask_bce_backward_kernel", "mask_bce_loss", "tl.where(known, last, 0)", "last", "stretch"),
    ("bce_with_logits", "mask_bce_loss", "- z * target", "- z * z", "torchvisions_mask_loss"),
    (
        "bce_with_logits",
        "mask_bce_loss",
        "2.0 * ratio + 2.0 * ratio * square * series",
        "tl.log(1.0 + decay)",
        "confident",
    ),
    ("bce_with_logits", "mask_predictor_loss", "tl.exp(-tl.abs(z))", "tl.exp(-z)", "extreme"),
    ("known_class", "mask_predictor_loss", "(label >= 0) & (label < num_classes)", "label < num_classes", "empty_slot"),
    (
        "known_class",
        "mask_predictor_loss",
        "(label >= 0) & (label < num_classes)",
        "label >= 0",
        "out_of_range and nchw-3",
    ),
    ("weighted_mean_kernel", "mask_predictor_loss", "part * n + roi", "roi", "small_tiles and 20-m0-relu-nchw"),
    ("weighted_mean_kernel", "mask_bce_loss", 'float("nan")', "0.0", "out_of_range"),
    ("weighted_mean_kernel", "mask_bce_loss", "denominator < 1.0, 1.0", "denominator < 0.0, 1.0", "weights_and_empty"),
    (
        "_weights",
        "mask_predictor_loss",
        "tl.load(weights_ptr + roi, occupied, 0.0)",
        "tl.load(weights_ptr + roi, roi < n, 0.0)",
        "empty_slot",
    ),
    ("_channels", "mask_predictor_loss", "[:, None, None] * LANES", "[:, None, None]", "ordinary_predictor and 256"),
    (
        "_load",
        "mask_predictor_loss",
        "tl.minimum(stop, PIXELS) - 1",
        "tl.minimum(stop, PIXELS) - 2",
        "small_tiles and 128-m1-relu-nhwc",
    ),
    ("_load", "mask_predictor_loss", "& (channel < channels), 0.0)", ", 0.0)", "out_of_range and nchw-3"),
    ("_signs_at", "mask_predictor_loss", "(channels + 7) // 8", "channels // 8", "ordinary_predictor and 20"),
    ("mask_predictor_forward_kernel", "mask_predictor_loss", "(x <= 0.0) == 0", "x > 0.0", "real_slot"),
    (
        "mask_predictor_forward_kernel",
        "mask_predictor_loss",
        "part * PART + PART, PIXELS), 0)",
        "part * PART + PART, PIXELS), PIXELS)",
        "empty_slot",
    ),
    (
        "mask_predictor_forward_kernel",
        "mask_predictor_loss",
        "pixel + BLOCK, stop",
        "pixel, stop",
        "ordinary_predictor and 20",
    ),
    (
        "mask_predictor_features_kernel",
        "mask_predictor_loss",
        "tl.where(known, channels, 0), weight, 0.0)",
        "channels, weight, 0.0)",
        "empty_slot",
    ),
    ("mask_predictor_features_kernel", "mask_predictor_loss", "positive != 0", "positive != 1", "zero_learns_nothing"),
    (
        "mask_predictor_weight_kernel",
        "mask_predictor_loss",
        "count += tl",
        "count = tl",
        "small_tiles and 20-m0-relu-nchw",
    ),
    (
        "mask_predictor_weight_kernel",
        "mask_predictor_loss",
        "row % PARTS",
        "row % 1",
        "small_tiles and 20-m0-relu-nchw",
    ),
    ("_axis", "mask_targets", "extent, 1.0", "extent, 0.0", "every_kind and torchvision"),
    ("_axis", "mask_targets", "tl.max(end - begin, 0) + 1", "tl.max(end - begin, 0)", "several_tables and 8-4"),
    ("_axis", "mask_targets", ", propagate_nan=tl.PropagateNan.ALL", "", "that_are_none"),
    ("_offset", "mask_targets", "sample + 0.5", "sample + 0.25", "border and torchvision"),
    ("_store_weights", "mask_targets", "position >= -1.0", "position >= 0.0", "every_kind"),
    ("_store_weights", "mask_targets", "(cell < visible_to)", "(cell <= visible_to)", "nothing_else"),
    ("_store_weights", "mask_targets", "first + step", "step", "several_tables and 8-4"),
    ("mask_targets_kernel", "mask_targets", "(x1 - x0 + 7) // 8", "(x1 - x0) // 8", "border"),
    ("mask_targets_kernel", "mask_targets", "matched < slots", "matched <= slots", "match_out_of_range"),
    ("mask_targets_kernel", "mask_targets", "+ (near_x + j)", "+ j", "several_tables and 8-4"),
    ("mask_targets_kernel", "mask_targets", "total >= 0.5", "total > 0.5", "known_threshold"),
    ("_expand", "paste_masks", "center + half", "center + half + 1.0", "known_values"),
    (
        "_integer_box",
        "paste_masks",
        "tl.where(proper, x2, -1.0), tl.where(proper, y2, -1.0)",
        "tl.where(proper, x2, 9.0), tl.where(proper, y2, 9.0)",
        "broken",
    ),
    ("_rows_in", "paste_masks", "(x >= width)", "(x > width)", "gpus_shape and 0.5-size0"),
    ("_scale", "paste_masks", "CELLS + 2", "CELLS + 1", "torchvisions_paste"),
    ("_sources", "paste_masks", "maximum(at, 0.0)", "maximum(at, -1.0)", "torchvisions_paste"),
    ("_interpolate", "paste_masks", "weight_x) * c", "weight_y) * c", "torchvisions_paste"),
    ("_meets", "paste_masks", "- x < size", "- x < size - 8", "gpus_shape and 0.5-size0"),
    ("_store", "paste_masks", "first + lane >= 0", "first + lane >= -16", "beside_the_output"),
    ("paste_masks_kernel", "paste_masks", "- (offset % 16).to(tl.int32)", "", "gpus_shape and 0.5-size0"),
    ("_load_slots", "rpn_loss", "exists = drawn & (index", "exists = (index", "other_anchors"),
    ("_box_errors", "rpn_loss", "empty, 0.0, h)", "empty, 0.0, w)", "torchvisions_loss"),
    ("_encode_axis", "rpn_loss", "low + 0.5 * size -", "low -", "torchvisions_loss"),
    ("_of_positive", "rpn_loss", 'float("nan")', "0.0", "match_that"),
    ("_smooth_l1", "rpn_loss", "size - 0.5 * BETA", "size - BETA", "torchvisions_loss"),
    ("_smooth_l1_slope", "rpn_loss", "< BETA, error *", "< BETA, 2 * error *", "torchvisions_loss"),
    ("rpn_loss_forward_kernel", "rpn_loss", "loss += z - z", "loss += 0.0", "diverged"),
    ("rpn_loss_backward_kernel", "rpn_loss", "positive, -share", "positive, share - 1.0", "extreme"),
    ("topk_keys_kernel", "proposals", "0x7FFFFFFF - index", "index", "many_ties"),
    ("decode_proposals_kernel", "proposals", "y1 >= min_size", "y1 > min_size", "smallest_size"),
    ("_decode_axis", "proposals", "tl.where(scale > MAX_LOG_SCALE, MAX_LOG_SCALE, scale)", "scale", "every_kind"),
]


def run_tests(op: str, selected: str, path: Path) -> subprocess.CompletedProcess:
    """Run an op's tests against the `kernels` package in `path`, up to the first failure."""
    tests = [*map(str, sorted(TESTS.glob(f"test_{op}*.py"))), "-k", selected]
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=path, env=environment, capture_output=True, text=True, timeout=600)


def plant(fault: tuple[str, ...], path: Path) -> subprocess.CompletedProcess:
    """The tests' verdict on a copy of the kernels with the fault, in `path`."""
    kernel, op, old, new, selected = fault
    shutil.copytree(KERNELS, path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    files = [*(path / "kernels" / op).glob("kernel*.py"), *(path / "kernels").glob("device*.py")]
    file = next(f for f in files if f"def {kernel}(" in f.read_text())
    before, name, rest = file.read_text().partition(f"def {kernel}(")
    body, separator, after = rest.partition("@triton.jit")
    assert body.count(old) == 1, "the kernel has changed: plant the fault anew"
    file.write_text(before + name + body.replace(old, new) + separator + after)
    return run_tests(op, selected, path)


@pytest.fixture(scope="module")
def planted(request, tmp_path_factory) -> Iterator[dict[tuple[str, ...], Future]]:
    """The verdict on each fault whose test is selected: as many at a time as there are processors."""
    items = [item for item in request.session.items if getattr(item, "originalname", "") == "test_fault_is_found"]
    faults = [item.callspec.params["fault"] for item in items]
    pool = ThreadPoolExecutor(os.cpu_count())
    yield {fault: pool.submit(plant, fault, tmp_path_factory.mktemp("planted")) for fault in faults}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("fault", FAULTS, ids=[f[0] for f in FAULTS])
def test_fault_is_found(fault, planted):
    result = planted[fault].result()
    assert result.returncode == 1, result.stdout + result.stderr  # 1: tests ran and failed; 2 would be a broken import
    assert "FAILED" in result.stdout and "ERROR" not in result.stdout
