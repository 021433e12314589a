"""The containers: indexing, ``cat``, ``to`` and ``replace`` act on every attribute and field, and what is absent stays absent."""

from __future__ import annotations

import pickle

import pytest
import torch

from tests.fake_cuda import fake_cuda
from utils.metrics.metrics import GroundTruth
from utils.types import Columns, Detections, Predictions, Targets, detections_on_host, split_detections

M, K = 5, 3


def counted(*shape: int) -> torch.Tensor:
    """Values that are all different, so that a row that went astray shows."""
    return torch.arange(int(torch.tensor(shape).prod()), dtype=torch.float32).reshape(shape)


def full_targets() -> Targets:
    masks, angle = torch.arange(M * 4, dtype=torch.uint8).reshape(M, 2, 2), counted(M)
    return Targets(torch.tensor([0, 0, 1, 1, 3]), torch.arange(M), counted(M, 4), masks, counted(M, K, 3), angle)


def full_detections() -> Detections:
    return Detections(counted(M, 4), counted(M), torch.arange(M), {"masks": counted(M, 2, 2), "angle": counted(M)})


CONTAINERS: dict[str, Columns] = {
    "targets": full_targets(),
    "plain targets": Targets(torch.zeros(M, dtype=torch.long), torch.arange(M), counted(M, 4)),
    "predictions": Predictions(counted(M, 7, 4), counted(M, 7, 2), {"coefficients": counted(M, 7, 6)}, {"prototypes": counted(M, 3, 8, 8)}),
    "detections": full_detections(),
    "plain detections": Detections(counted(M, 4), counted(M), torch.arange(M)),
    "ground truth": GroundTruth(
        torch.arange(M), torch.arange(M), counted(M, 4), counted(M), torch.zeros(M) > 0, {"masks": counted(M, 2, 2)}
    ),
}  # fmt: skip
ALL = pytest.mark.parametrize("columns", CONTAINERS.values(), ids=CONTAINERS.keys())


def flat(columns: Columns) -> dict[str, torch.Tensor]:
    """Every tensor by its name."""
    out = {}
    for name, value in columns._present():
        out |= {f"{name}.{key}": t for key, t in value.items()} if isinstance(value, dict) else {name: value}
    return out


def same(left: Columns, right: Columns) -> bool:
    a, b = flat(left), flat(right)
    return type(left) is type(right) and a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@ALL
@pytest.mark.parametrize(
    "index", [slice(1, 4), slice(0, 0), torch.tensor([4, 0, 0]), torch.tensor([True, False, True, False, False])], ids=str
)
def test_indexing_selects_the_same_rows_of_everything(columns, index):
    selected = columns[index]
    assert flat(selected).keys() == flat(columns).keys()
    assert all(torch.equal(value, flat(columns)[name][index]) for name, value in flat(selected).items())


@ALL
def test_cat_of_parts_is_the_whole(columns):
    assert same(type(columns).cat([columns[:2], columns[2:2], columns[2:]]), columns)


@ALL
def test_every_tensor_goes_to_a_device(columns):
    assert {t.device.type for t in flat(columns.to("meta")).values()} == {"meta"}
    assert same(columns.cpu(), columns)


@ALL
def test_replace_changes_one_attribute_and_leaves_the_original(columns):
    name = next(iter(flat(columns)))
    changed = columns.replace(**{name: flat(columns)[name] + 1})
    assert torch.equal(flat(changed)[name], flat(columns)[name] + 1)
    assert same(changed.replace(**{name: flat(columns)[name]}), columns)


@ALL
def test_a_container_survives_pickling(columns):
    assert same(pickle.loads(pickle.dumps(columns)), columns)


def test_what_is_absent_stays_absent():
    for targets in (CONTAINERS["plain targets"][:3], Targets.empty(), Targets.cat([Targets.empty()] * 2), Targets.empty().cpu()):
        assert (targets.masks, targets.keypoints, targets.angle) == (None, None, None)
    for detections in (Detections.empty(), CONTAINERS["plain detections"][2:], Detections.cat([Detections.empty()] * 3)):
        assert detections.fields == {}


def test_an_empty_container_keeps_the_shapes_of_its_rows():
    empty = full_detections()[:0]
    assert len(empty) == 0
    assert {name: tuple(t.shape[1:]) for name, t in flat(empty).items()} == {
        name: tuple(t.shape[1:]) for name, t in flat(full_detections()).items()
    }


def test_splitting_is_the_inverse_of_cat():
    parts = split_detections(full_detections(), [0, 2, 0, 3])
    assert [len(p) for p in parts] == [0, 2, 0, 3]
    assert same(Detections.cat(parts), full_detections())


def test_candidates_of_several_networks_are_joined_with_their_fields():
    one = CONTAINERS["predictions"]
    joined = Predictions.join_candidates([one, one])
    assert joined.boxes.shape == (M, 14, 4)
    assert torch.equal(joined.fields["coefficients"][:, 7:], one.fields["coefficients"])
    assert torch.equal(joined.shared["prototypes"], one.shared["prototypes"])


def test_detections_on_the_host_are_in_float32():
    found = full_detections()
    (host,) = detections_on_host([found.replace(boxes=found.boxes.half(), scores=found.scores.half())])
    assert same(host, found)
    assert detections_on_host([]) == []


@pytest.mark.parametrize("counts", [(0, 0), (0, 3), (3, 0)])
def test_detections_of_a_gpu_come_to_the_host_also_where_there_are_none(monkeypatch, counts):
    expected = [full_detections()[:count] for count in counts]
    with fake_cuda(monkeypatch):
        on_device = [found.map(lambda t: t.to("cuda")) for found in expected]
        host = detections_on_host(on_device)
    assert all(same(a, b) for a, b in zip(host, expected, strict=True))
