"""What every registered task has to hold, whatever its rows, targets, detections and files look like.

A task is tried with the data that it makes itself: its rows come from its own ``label_rows``, its detections from its own targets.
"""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from engine.task_presets import HYPS
from tasks import TASKS, Task, get_task, register_task
from tasks.base import DrawStyle, ExportOutput, targets_of_images
from tasks.rows import InvalidRow, LabelRow
from utils.errors import UserError
from utils.instances import Instances
from utils.nms import Suppression
from utils.types import Batch, Detections, Letterbox, Predictions, Targets

HW, NAMES, NC = (96, 160), ("one", "two"), 2
ORIGINAL_HW = (48, 76)
LETTERBOX = Letterbox(torch.tensor([ORIGINAL_HW] * 2), torch.full((2, 2), 2.0), torch.tensor([[4.0, 0.0]] * 2))  # 2 x 76 + 8 = 160
TARGETS = {field.name for field in dataclasses.fields(Targets)} - {"image"}
KEYPOINTS = 3
# What heads add, where it is not what detections have: for each candidate, and for the whole image.
FROM_HEADS: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]] = {
    "pose": ({"keypoints": (3 * KEYPOINTS,)}, {}),
    "segment": ({"coefficients": (3,)}, {"prototypes": (3, HW[0] // 4, HW[1] // 4)}),
}
SETTINGS = {"kpt_shape": [KEYPOINTS, 3]}  # what files say of results, for the tasks that read it

pytestmark = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())


def instances(count: int) -> Instances:
    """Objects with all that any task could want: a box, a polygon (its corners) and keypoints inside."""
    starts = np.array([(20, 12), (60, 32), (100, 48)], np.float32)[:count]  # multiples of any task's cells
    boxes = np.concatenate((starts, starts + (24, 16)), axis=1).astype(np.float32)
    corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 2)
    keypoints = np.concatenate((np.repeat(starts[:, None], KEYPOINTS, 1) + 5, np.full((count, KEYPOINTS, 1), 2)), axis=2)
    return Instances(np.arange(count, dtype=np.float32) % NC, boxes, corners, np.full(count, 4, np.int64), keypoints.astype(np.float32))


def usual(task: Task) -> tuple[int, int]:
    """How many results two images have: of a whole image there is one."""
    return (1, 1) if task.whole_image else (2, 1)


def batch(task: Task, counts: tuple[int, int] | None = None) -> Batch:
    """Two images with so many objects."""
    counts = counts or usual(task)
    targets = targets_of_images([task.targets(instances(n), HW) for n in counts])
    return Batch(torch.zeros(2, 3, *HW, dtype=torch.uint8), targets, ("a.jpg", "b.jpg"), LETTERBOX, max(counts))


def detections(task: Task, counts: tuple[int, int] | None = None) -> list[Detections]:
    """The objects of the batch as detections in px of the batch's images."""
    return task.detections_of_targets(batch(task, counts).targets, HW, count=2)


def good_row(task: Task) -> list[str]:
    """A row that the task writes itself."""
    return task.label_rows(detections(task)[0], HW)[0].split()


def predictions(task: Task, boxes: torch.Tensor, scores: torch.Tensor) -> Predictions:
    """Candidates with what the task's heads add, all zero."""
    batch_size, count = scores.shape[:2]
    of_detections = {name: tuple(value.shape[1:]) for name, value in detections(task)[0].fields.items()}
    fields, shared = FROM_HEADS.get(task.name, (of_detections, {}))
    return Predictions(
        boxes, scores, {name: torch.zeros(batch_size, count, *shape) for name, shape in fields.items()},
        {name: torch.zeros(batch_size, *shape) for name, shape in shared.items()},
    )  # fmt: skip


def random_predictions(task: Task, count: int = 40) -> Predictions:
    count = 1 if task.whole_image else count
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(2, count, 2, generator=generator) * torch.tensor([HW[1] - 20.0, HW[0] - 20.0])
    return predictions(task, torch.cat((corner, corner + 16), dim=2), torch.rand(2, count, NC, generator=generator))


def assert_close(left: Any, right: Any, *, atol: float) -> None:
    """Two containers hold the same, field by field."""
    assert type(left) is type(right)
    for (name, a), (_, b) in zip(left._present(), right._present(), strict=True):
        values = ((a[key], b[key]) for key in a) if isinstance(a, dict) else ((a, b),)
        for x, y in values:
            torch.testing.assert_close(x, y, atol=atol, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


# What it is


def test_attributes_have_the_right_types(task):
    assert isinstance(task, Task)
    assert get_task(task.name) is task
    assert isinstance(task.name, str)
    assert "class" in task.expected_row
    assert isinstance(task.columns, tuple)
    assert all(name.startswith("metrics/") for name in task.columns)
    assert len(set(task.columns)) == len(task.columns) > 0
    assert task.coco_type in (None, "bbox", "segm", "keypoints")
    assert isinstance(task.whole_image, bool)
    assert task.defaults.imgsz % 32 == 0
    assert 0 <= task.defaults.val_conf <= task.defaults.conf < 1
    assert not task.defaults.hyp or (HYPS / task.defaults.hyp).is_file()
    assert all(isinstance(output, ExportOutput) for output in task.outputs)
    assert {"boxes", "scores"} <= {part for output in task.outputs for part in output.tolerance}


def test_settings_in_a_file_give_the_same_task_again(task):
    described = task.from_settings(SETTINGS, source="a file")
    assert described.name == task.name
    assert described.from_settings(described.settings, source="a file").settings == described.settings
    assert described.for_labels(SETTINGS, source="a data set").settings == described.settings


def test_a_task_can_be_sent_to_another_process(task):
    again = pickle.loads(pickle.dumps(task))
    assert again.name == task.name
    assert isinstance(again.parse_row(good_row(task)), LabelRow)


def test_a_name_belongs_to_one_task(task):
    assert register_task(task) is task
    with pytest.raises(UserError, match="registered already"):
        register_task(type(task)())
    with pytest.raises(UserError, match="is unknown"):
        get_task(f"{task.name}s of another kind")


# Rows and targets


def test_a_good_row_is_read(task):
    row = task.parse_row(good_row(task))
    assert isinstance(row, LabelRow)
    assert row.class_index == 0
    assert row.box_cxcywh.shape == (4,)
    assert ((row.box_cxcywh >= 0) & (row.box_cxcywh <= 1)).all()
    assert (row.box_cxcywh[2:] > 0).all()
    assert row.polygon.shape == (len(row.polygon), 2)


@pytest.mark.parametrize(("column", "value"), [(1, "nan"), (1, "inf"), (1, "x"), (1, "1.5"), (2, "-0.5"), (0, "-1"), (0, "0.5"), (0, "")])
def test_a_bad_value_is_refused_and_named(task, column, value):
    row = good_row(task)
    if column >= len(row):
        pytest.skip("the task's rows are shorter")
    row[column] = value
    wrong = task.parse_row(row)
    assert isinstance(wrong, InvalidRow)
    assert all((wrong.message, wrong.kind, wrong.skips_image))


def test_a_row_of_another_length_is_refused_with_what_is_expected(task):
    for row in ([], [*good_row(task), "0.5"], good_row(task)[:-1], good_row(task) * 2):
        wrong = task.parse_row(row)
        assert isinstance(wrong, InvalidRow)
        assert task.expected_row in wrong.message


@pytest.mark.parametrize("count", [0, 1, 3])
def test_targets_have_a_row_for_each_object_and_the_names_of_targets(task, count):
    made = task.targets(instances(count), HW)
    assert {"classes", "boxes"} <= made.keys() <= TARGETS
    assert {len(value) for value in made.values() if isinstance(value, np.ndarray)} == {count}
    assert made["boxes"].shape == (count, 4)
    assert made["boxes"].dtype == np.float32
    assert ((made["boxes"] >= 0) & (made["boxes"] <= 1)).all()


def test_targets_of_a_batch_say_which_image_they_are_on(task):
    for counts in ((0, 0), (2, 0), (0, 3), (1, 2)):
        targets = batch(task, counts).targets
        assert targets.image.tolist() == [0] * counts[0] + [1] * counts[1]
        assert targets.classes.dtype == targets.image.dtype == torch.int64
        assert len(targets.boxes) == sum(counts)


# Detections


def test_nothing_predicted_gives_no_detection(task):
    for candidates in (0, 5):
        empty = predictions(task, torch.zeros(2, candidates, 4), torch.zeros(2, candidates, NC))
        assert [len(found) for found in task.postprocess(empty, Suppression())] == [0, 0]


def test_detections_are_sorted_and_within_the_limits(task):
    suppression = Suppression(conf=0.1, max_det=7)
    for found in task.postprocess(random_predictions(task), suppression):
        assert 0 < len(found) <= 7
        assert found.boxes.shape == (len(found), 4)
        assert found.classes.dtype == torch.int64
        assert (found.scores > 0.1).all()
        assert (found.scores.diff() <= 0).all()
        original = task.to_original([found, found[:0]], LETTERBOX)
        assert [d.fields.keys() for d in original] == [detections(task)[0].fields.keys()] * 2


def test_the_way_to_the_original_and_back_changes_nothing(task):
    for counts in (usual(task), (0, 1), (0, 0)):
        found = detections(task, counts)
        if task.whole_image:  # of the whole original, whatever part of it the batch shows
            found = task.to_batch(task.to_original(found, LETTERBOX), LETTERBOX)
        there = task.to_original(found, LETTERBOX)
        assert [len(d) for d in there] == list(counts)
        for before, after in zip(found, task.to_batch(there, LETTERBOX), strict=True):
            assert_close(after, before, atol=1e-3)
    assert task.to_original([], LETTERBOX) == []


def test_the_compact_form_is_selected_joined_measured_and_undone(task):
    counts = (usual(task)[0], 0)
    there = task.to_original(detections(task, counts), LETTERBOX)
    compact = task.to_original_compact(detections(task, counts), LETTERBOX)
    for before, after in zip(there, compact, strict=True):
        assert_close(task.expanded(after), before, atol=0)
        assert_close(task.expanded(task.compact(before)), before, atol=0)
        assert_close(task.expanded(task.compact(after)), before, atol=0)
    joined = Detections.cat([compact[1], compact[0], compact[0]])
    assert_close(task.expanded(joined[torch.arange(len(joined)) >= counts[0]]), there[0], atol=0)
    results = []
    for found in (there, compact):
        metric = task.metric(NAMES)
        metric.update(found, task.ground_truth(batch(task, counts)), images=("a.jpg", "b.jpg"))
        results.append(metric.compute().columns)
    assert results[0] == pytest.approx(results[1], nan_ok=True)


def test_label_rows_are_rows_that_the_task_reads(task):
    found = detections(task, (usual(task)[0], 0))
    rows = task.label_rows(found[0], HW)
    assert task.label_rows(found[1], HW) == []
    parsed = [task.parse_row(row.split()) for row in rows]
    assert [row.class_index for row in parsed] == found[0].classes.tolist()
    h, w = HW
    centres = np.array([row.box_cxcywh[:2] for row in parsed]) * (w, h)
    np.testing.assert_allclose(centres, (found[0].boxes[:, :2] + found[0].boxes[:, 2:]) / 2, atol=0.01)
    scored = task.label_rows(found[0], HW, with_confidence=True)
    assert [line.rsplit(maxsplit=1) for line in scored] == [[row, "1"] for row in rows]
    written = task.result_rows(found[0], HW, names=NAMES, with_confidence=True)
    assert len(written) == len(rows)
    assert task.result_rows(found[1], HW, names=NAMES) == []


def test_what_was_found_is_summed_up_by_class_name(task):
    found = detections(task, (usual(task)[0], 0))
    assert NAMES[0] in task.summary(found[0], NAMES)
    assert task.summary(found[1], NAMES) == ""


def test_drawing_gives_another_image_of_the_same_shape(task):
    image = np.full((*HW, 3), 114, np.uint8)
    for found in detections(task, (usual(task)[0], 0)):
        drawn = task.draw(image, found, NAMES, DrawStyle())
        assert (drawn.shape, drawn.dtype) == (image.shape, image.dtype)
        assert (image == 114).all()
        assert bool((drawn != image).any()) == bool(len(found))
    task.draw(image, detections(task)[0], NAMES, DrawStyle(line_thickness=1, hide_labels=True, hide_conf=True))


def test_shapes_say_what_detections_cover(task):
    for found in detections(task, (usual(task)[0], 0)):
        shapes = task.shapes(found)
        assert shapes.extents.shape == (len(found), 4)
        assert shapes.area.shape == (len(found),)
        all_rows = torch.arange(len(found))
        torch.testing.assert_close(shapes.common(all_rows, all_rows), shapes.area)
        assert not shapes.common(all_rows[:1], all_rows[1:2]).any(), "the objects lie apart"


# The metric


def measured(task: Task, *, found: bool = True, rule: str = "coco") -> Any:
    """A metric that has seen two images with all their objects found, or none of them."""
    metric = task.metric(NAMES, rule=rule)
    one = batch(task)
    original = task.to_original(detections(task), LETTERBOX)
    metric.update(original if found else [d[:0] for d in original], task.ground_truth(one), images=one.paths)
    return metric


@pytest.mark.parametrize("rule", ["coco", "yolov5", "ultralytics"])
def test_all_found_is_perfect_and_nothing_found_is_zero(task, rule):
    perfect, nothing = (measured(task, found=found, rule=rule).compute() for found in (True, False))
    assert perfect.fitness == pytest.approx(1, abs=0.02)
    assert nothing.fitness == 0
    for result in (perfect, nothing):
        assert tuple(result.columns) == task.columns
        assert all(isinstance(value, float) and np.isfinite(value) for value in result.columns.values())
        assert isinstance(result.headline[0], str)
        assert 0 <= result.headline[1] <= 1
        assert len(result.class_ap) == NC
        assert all(isinstance(line, str) for line in (result.table(), result.table(per_class=False), *result.remarks))
    filled = dataclasses.replace(perfect, losses={"box": 1.0}, speed_ms={"inference": 2.0})
    assert (filled.losses, filled.speed_ms, filled.columns) == ({"box": 1.0}, {"inference": 2.0}, perfect.columns)


def test_a_metric_without_any_image_computes(task):
    result = task.metric(NAMES).compute()
    assert result.fitness == 0
    assert isinstance(result.table(), str)
    empty = task.metric(NAMES)
    one = batch(task, (0, 0))
    empty.update(task.to_original(detections(task, (0, 0)), LETTERBOX), task.ground_truth(one), images=one.paths)
    assert tuple(empty.compute().columns) == task.columns


def test_ranks_that_merge_their_states_measure_the_whole(task):
    one = batch(task)
    original, truth = task.to_original(detections(task), LETTERBOX), task.ground_truth(one)
    whole, shares = task.metric(NAMES), [task.metric(NAMES) for _ in range(2)]
    whole.update(original, truth, images=one.paths)
    for image, share in enumerate(shares):
        of_image = truth[truth.image == image]
        share.update([original[image]], of_image.replace(image=of_image.image * 0), images=[one.paths[image]])
    states = [pickle.loads(pickle.dumps(share.state())) for share in shares]
    for share in shares:
        for state in states:
            share.merge(state)  # its own images are known already
        assert share.compute().columns == pytest.approx(whole.compute().columns)


def test_ground_truth_joins_the_detections_that_are_none_of_it(task):
    counts = (usual(task)[0], 0)
    truth = task.ground_truth(batch(task, counts))
    original = task.to_original(detections(task, counts), LETTERBOX)
    known = task.add_truth(original[0].replace(scores=torch.full((counts[0],), 0.5)), truth, image=0)
    assert known.scores.tolist() == [1] * counts[0]
    assert len(task.add_truth(original[1], truth, image=1)) == 0
    scores = [0.5, 0.4][: counts[0]]
    moved = original[0].replace(classes=1 - original[0].classes, scores=torch.tensor(scores))
    assert task.add_truth(moved, truth, image=0).scores.tolist() == pytest.approx([1] * counts[0] + scores)


def test_the_figures_of_a_metric_are_written(task, tmp_path):
    task.plot(measured(task).compute(), tmp_path)
    assert any(tmp_path.iterdir())


# Export


def test_the_outputs_of_an_exported_file_decode_to_what_went_in(task):
    before = task.from_export(task.to_export(random_predictions(task)), nc=NC)  # in the task's own form
    tensors = task.to_export(before)
    assert len(tensors) == len(task.outputs)
    assert_close(task.from_export(tensors, nc=NC), before, atol=1e-4)
    described = task.from_settings(SETTINGS, source="a file")
    assert described.class_count([tuple(t.shape) for t in tensors]) == NC
    assert task.class_count([]) == 0


def test_rows_of_a_one_to_one_file_are_predictions_again(task):
    before = random_predictions(task)
    scores, classes = before.scores.max(dim=2, keepdim=True)
    if before.shared:
        return  # such a task has no file of rows
    rows = task.to_rows(before.boxes, scores, classes.float(), before.fields)
    after = task.from_rows(rows, nc=NC)
    assert after.unique
    torch.testing.assert_close(after.boxes, before.boxes, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(after.scores, torch.zeros_like(before.scores).scatter(2, classes, scores))
    assert after.fields.keys() == before.fields.keys()
    assert all(torch.equal(after.fields[name], before.fields[name]) for name in before.fields)
    with pytest.raises(ValueError, match="is needed"):
        task.from_rows(rows[..., :5], nc=NC)


def test_tensors_of_another_task_are_refused(task):
    tensors = task.to_export(random_predictions(task))
    for wrong in ([], [*tensors, tensors[0]], [tensors[0][:, 1:], *tensors[1:]], [tensors[0][0], *tensors[1:]]):
        with pytest.raises(ValueError, match="needed"):
            task.from_export(wrong, nc=NC)


def test_the_layout_of_outputs_can_be_traced(task):
    from torch import nn

    from models.export.torchscript import torchscript_warnings

    few, many = random_predictions(task, 10), random_predictions(task, 30)

    class Layout(nn.Module):
        def forward(self, boxes: torch.Tensor, scores: torch.Tensor, *more: torch.Tensor) -> tuple[torch.Tensor, ...]:
            count = len(few.fields)
            return task.to_export(Predictions(boxes, scores, dict(zip(few.fields, more[:count])), dict(zip(few.shared, more[count:]))))

    with torchscript_warnings():
        inputs = (few.boxes, few.scores, *few.fields.values(), *few.shared.values())
        traced = torch.jit.trace(Layout(), inputs, check_trace=False)
    got = traced(many.boxes, many.scores, *many.fields.values(), *many.shared.values())
    for value, expected in zip(got, task.to_export(many), strict=True):
        torch.testing.assert_close(value, expected)
