"""No published vector is left out: each is a case of a parity test, waits (``tests/pending.py``), or stands in a table with the reason.

Attention has a table of its own (``test_attention_shelf.py``). The test counts what lies in tests/goldens, and where the reference folder
lies beside the project, everything in it.
"""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path

import pytest

from tests import golden
from tests.parity import (
    test_blocks,
    test_heads,
    test_heads_end_to_end,
    test_heads_in_models,
    test_losses,
    test_losses_end_to_end,
    test_model_keys,
    test_models,
    test_ops_nms,
    test_ops_schedule,
    test_pose,
    test_train_step,
)
from tests.pending import PENDING

# vector or prefix -> why no test compares it
LEFT_OUT = {
    "models/baseline-": "networks of earlier papers, for information: unit/models/test_dialects.py has the sizes of those that are here",
    "blocks/ul_CBAM": "a variant without the paper's shared perceptron and max pooling; CBAM here is compared in attention/",
    "blocks/ul_ChannelAttention": "a part of that variant",
    "blocks/ul_SpatialAttention": "a part of that variant",
}
# single vectors of ops/ -> the test file that names them
OPS = {
    "anchors_dist_v9": "parity/test_ops_grid.py",
    "autoanchor_metric": "unit/models/test_assigners_autoanchor.py",
    "bbox_iou_": "parity/test_ops_iou.py",
    "box_iou_matrix_v9": "parity/test_ops_boxes.py",
    "boxes_v9": "parity/test_ops_boxes.py",
    "build_targets_v5": "parity/test_losses_candidates.py",
    "defaults_tasks": "parity/test_pose.py",
    "ema": "parity/test_ops_ema.py",
    "fitness_v9": "parity/test_ops_map.py",
    "keypoint_flip": "parity/test_pose.py",
    "letterbox": "parity/test_letterbox.py",
    "make_divisible": "parity/test_ops_grid.py",
    "musgd": "unit/engine/test_musgd.py",
    "map_keypoints_synth": "parity/test_pose.py",
    "map_synth": "parity/test_ops_map.py",
    "map_synth_ultralytics": "parity/test_ops_map.py",
    "map_synth_v5": "parity/test_ops_map.py",
    "map_masks_synth": "parity/test_ops_masks.py",
    "mask_iou": "parity/test_ops_masks.py",
    "oks": "parity/test_pose.py",
    "optimizer_groups": "parity/test_ops_optimizer.py",
    "polygon_masks": "parity/test_ops_masks.py",
    "process_mask": "parity/test_ops_masks.py",
    "smooth_v9": "parity/test_ops_map.py",
    "wiou_scale_v9": "parity/test_ops_iou.py",
}


def compared(folder: str) -> set[str]:
    """Names of the vectors that are cases of a test, or parts of one."""
    if folder == "blocks":
        return set(test_blocks.CASES)
    if folder == "heads":
        return {*test_heads.CASES, *test_heads.ANCHORED, test_heads.FOLDED, *test_heads_end_to_end.CASES, *test_pose.CASES}
    if folder == "losses":
        ends = (*test_losses_end_to_end.CASES, test_losses_end_to_end.SCHEDULE)
        return {*test_losses.ALIGNED, *test_losses.ANCHORED, *ends, *test_pose.LOSSES}
    if folder == "models":
        return {*test_model_keys.CASES, *test_train_step.CASES, "deploy_maps_yolov9_to_gelan"}
    ops = {name for name in golden.all_names("ops") for known in OPS if name == known or (known.endswith("_") and name.startswith(known))}
    return ops | set(test_ops_nms.NAMES) | {case for case, _ in test_ops_schedule.PUBLISHED}


@pytest.mark.parametrize("folder", ["blocks", "heads", "losses", "models", "ops"])
def test_every_golden_vector_is_compared_or_listed_as_pending(folder):
    found, done = set(golden.all_names(folder)), compared(folder)
    excused = {n for n in found for prefix in LEFT_OUT if f"{folder}/{n}".startswith(prefix)}
    waiting = {n for n in found if golden.waits_for(folder, n)}
    assert found
    assert not found - done - excused - waiting, "neither compared nor excused, nor pending"
    assert not done & excused, "excused, but compared"
    assert not waiting & excused, "excused, but pending"
    if folder == "ops":  # no test enumerates these: what a test names does not wait
        assert not done & waiting, "pending, but compared"
    index = golden.REFERENCE / folder / "INDEX.json"
    if index.is_file():
        assert {case["name"] for case in json.loads(index.read_text())["cases"]} <= found


def test_every_network_output_is_compared_once():
    anchored, free = set(test_heads_in_models.cases()), set(test_models.WITH_OUTPUT)
    networks = [n for n in golden.all_names("models") if n not in test_train_step.CASES]
    assert not anchored & free
    assert anchored | free == {n for n in networks if any(k.startswith(("raw_", "probs")) for k in golden.find("models", n).arrays)}


@pytest.mark.skipif(not golden.REFERENCE.is_dir(), reason="the reference folder is not at hand")
@pytest.mark.parametrize("row", PENDING)
def test_every_pending_row_matches_a_vector(row):
    folder, _, start = row.partition(":")[0].partition("/")
    assert fnmatch.filter(golden.all_names(folder), f"{start}*"), "nothing waits here any more: take the row out"


@pytest.mark.parametrize("folder", ["attention", "blocks", "heads", "losses", "models", "ops"])
def test_no_vector_in_goldens_is_pending(folder):
    kept = [path.stem for path in (golden.HERE / folder).glob("*.npz")]
    assert not [name for name in kept if golden.waits_for(folder, name)]


@pytest.mark.parametrize(("name", "file"), OPS.items())
def test_the_named_test_file_reads_the_vector(name, file):
    assert f'"{name}"' in (Path(__file__).parents[1] / file).read_text(encoding="utf-8")


def test_parity_tests_do_not_skip_at_run_time():
    """A skip would hide a vector from the lists above; only what needs the reference folder may."""
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if "pytest.skip(" in line and path.name != Path(__file__).name:
                assert "needs the deploy maps" in line or "reference folder is not at hand" in line, f"{path.name}: {line.strip()}"
