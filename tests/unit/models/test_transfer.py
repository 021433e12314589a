"""Weights across architectures: where each tensor lands, what a head keeps, and what the report says."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from models import Model, build_model
from models.edit.rows import Edited, edit
from models.spec.parser import load_spec
from models.transfer.report import KEPT, MOVED, TransferReport
from models.transfer.transfer import Source, transfer
from tests.golden import fill_, fill_value
from tests.tiny import DUAL_HEAD, tiny_cfg, tiny_model
from utils.errors import UserError

MODULES = ("CBAM", "SE", "ECA", "FocalModulation", "EMA", "CoordAttention", "SimAM", "TripletAttention")
V5 = {
    "nc": 3, "anchors": [[10, 13, 16, 30], [30, 61, 62, 45]],
    "backbone": [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [16, 3, 2]], [-1, 3, "C3", [16]], [-1, 1, "Conv", [16, 3, 2]]],
    "head": [[[2, 3], 1, "Detect", ["nc", "anchors"]]],
}  # fmt: skip


def source(model: Model, *, cfg: bool = True, names: bool = True) -> Source:
    return Source(model.state_dict(), model.spec.to_dict() if cfg else None, model.names if names else None, "old.pt")


def filled(cfg: str | Mapping[str, Any], names: Sequence[str] | None = None) -> Model:
    return fill_(build_model(cfg, names=names), 1.35).eval()


def outputs(model: Model, px: int = 64) -> list[Tensor]:
    images = torch.rand(1, model.ch, px, px, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return [level for branch in model.eval()(images).branches for level in branch]


def lands_where_it_belongs(old: Model, change: Edited, *, same_outputs: bool) -> TransferReport:
    """Transfers into the edited network and compares every tensor with the edit's own map of rows."""
    new = Model(change.spec, names=old.names)
    report = transfer(new, source(old))
    state = new.state_dict()
    expected = {k: v for k, v in change.renamed(old.state_dict()).items() if k in state and int(k.split(".")[1]) not in change.replaced}
    assert all(torch.equal(state[key], value) for key, value in expected.items())
    assert expected.keys() <= report.filled
    if same_outputs:
        for before, after in zip(outputs(old), outputs(new)):
            assert (before - after).abs().max() < 1e-5 * max(1.0, before.abs().max())
    return report


def random_insertion(name: str, choose: random.Random) -> Edited:
    spec = load_spec(name)
    while True:
        try:
            return edit(spec, insert=f"{choose.choice(MODULES)}@{choose.randrange(len(spec.rows) - 1)}", init="identity")
        except UserError:  # a row that no module can follow (CBLinear gives several maps)
            continue


@pytest.mark.parametrize(
    ("name", "seed"), [("yolov8n.yaml", 0), ("yolov8n.yaml", 1), ("yolov8n.yaml", 2), ("yolo11n.yaml", 0), ("yolo26n.yaml", 0)]
)
def test_random_insertion_keeps_every_tensor(name, seed):
    old = filled(name)
    report = lands_where_it_belongs(old, random_insertion(name, random.Random(seed)), same_outputs=True)
    assert report.of_source == 1.0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [
    ("yolov5s.yaml", 10), ("yolov8n.yaml", 10), ("yolov9-t.yaml", 10), ("yolov9-c.yaml", 10), ("yolo11n.yaml", 40), ("yolo26n.yaml", 40),
])  # fmt: skip
def test_random_insertions_keep_every_tensor(name, count):
    old, choose = filled(name), random.Random(5)
    for _ in range(count):
        report = lands_where_it_belongs(old, random_insertion(name, choose), same_outputs=True)
        assert report.of_source == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yolov5s.yaml", "yolov8n.yaml", "yolov9-t.yaml", "yolov9-c.yaml", "yolo11n.yaml", "yolo26n.yaml"])
def test_replacements_and_removals_keep_all_other_rows(name):
    spec, old, choose = load_spec(name), filled(name), random.Random(6)
    kind = {"yolov5s.yaml": "C3", "yolov8n.yaml": "C2f", "yolo11n.yaml": "C3k2", "yolo26n.yaml": "C3k2"}.get(name, "RepNCSPELAN4")
    rows = [i for i, row in enumerate(spec.rows) if row.module == kind]
    for _ in range(4):
        row = choose.choice(rows)
        lands_where_it_belongs(old, edit(spec, replace=f"{kind}={kind}_{choose.choice(['EMA', 'CBAM', 'SE'])}@{row}"), same_outputs=False)
        with_two = edit(spec, insert=[f"CBAM@{choose.choice(rows)}", f"SE@{rows[-1]}"], init="identity")
        grown = fill_(Model(with_two.spec), 1.35)
        lands_where_it_belongs(grown, edit(with_two.spec, remove=[with_two.inserted[0]]), same_outputs=False)


def test_attention_inside_blocks_keeps_the_blocks():
    old, new = filled("yolov8n.yaml"), build_model("yolov8n-C2f_EMA.yaml")
    report = transfer(new, source(old))
    assert report.of_source == 1.0
    assert {name for name in new.state_dict() if ".attention." not in name} == report.filled


def test_removed_and_inserted_rows_are_named():
    old = tiny_model()
    new = build_model(tiny_cfg(attention=["CBAM", []]), names=old.names)
    report = transfer(new, source(old))
    text = str(report)
    assert "row 7 FocalModulation" in text.split("dropped")[1]
    assert "row 7 CBAM" in text.split("initialisation")[1].splitlines()[0]
    assert 0.5 < report.of_source < 1
    assert [row.outcome for row in report.rows if row.target == 8] == [KEPT]


def test_moved_rows_are_summarised_as_ranges():
    old = tiny_model()
    change = edit(old.spec, insert="CBAM@2", init="identity")
    report = transfer(Model(change.spec, names=old.names), source(old))
    assert "3-8 to 4-9" in str(report)
    assert report.having(MOVED)[0].source == 3


def test_identity_wrapped_and_plain_layers_exchange_weights():
    plain = tiny_model()
    wrapped = build_model(tiny_cfg(attention=["FocalModulation", [{"init": "identity"}]]), names=plain.names)
    report = transfer(wrapped, source(plain))
    assert float(wrapped.state_dict()["model.7.gamma"]) == 1.0  # it was at work before
    assert any("γ set to 1" in row.note for row in report.rows)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(outputs(plain), outputs(wrapped)))
    back = build_model(tiny_cfg(), names=plain.names)
    transfer(back, source(wrapped))
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in back.state_dict().items())


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 4)])
def test_repeats_are_matched_by_number(before, after):
    cfgs = [{**V5, "backbone": [*V5["backbone"][:2], [-1, n, "C3", [16]], V5["backbone"][3]]} for n in (before, after)]
    old, new = filled(cfgs[0]), build_model(cfgs[1])
    transfer(new, source(old))
    mine, theirs = new.state_dict(), old.state_dict()
    assert all(torch.equal(mine[k], theirs[k]) for k in mine if k in theirs)


def test_repeats_of_a_row_are_matched_by_number():
    first, second, _, last = V5["backbone"]
    cfgs = [{**V5, "backbone": [first, second, [-1, n, "Conv", [16, 3, 1]], last]} for n in (1, 3)]
    old, new = filled(cfgs[0]), build_model(cfgs[1])
    transfer(new, source(old))
    assert torch.equal(new.state_dict()["model.2.0.conv.weight"], old.state_dict()["model.2.conv.weight"])
    again = build_model(cfgs[0])
    transfer(again, source(new))
    assert torch.equal(again.state_dict()["model.2.conv.weight"], old.state_dict()["model.2.conv.weight"])


def test_classes_are_matched_by_name():
    old, new = filled("yolov8n.yaml", ["cat", "Dog ", "fish"]), build_model("yolov8n.yaml", names=["bird", "dog", "cat", "ant"])
    before = {k: v.clone() for k, v in new.state_dict().items()}
    report = transfer(new, source(old))
    for level in range(3):
        for part in ("weight", "bias"):
            key = f"model.22.cv3.{level}.2.{part}"
            mine, theirs = new.state_dict()[key], old.state_dict()[key]
            assert torch.equal(mine[1], theirs[1])
            assert torch.equal(mine[2], theirs[0])
            assert torch.equal(mine[0], before[key][0])
            assert torch.equal(mine[3], before[key][3])
    assert "2 of 4 classes, by name" in str(report)
    assert torch.equal(new.state_dict()["model.22.cv2.0.2.weight"], old.state_dict()["model.22.cv2.0.2.weight"])


@pytest.mark.parametrize(
    ("theirs", "ours", "keep"),
    [
        (["a", "b"], ["a", "b"], [0, 1]),
        (["a", "b"], ["b", "a"], [1, 0]),
        (["a", "b"], ["x", "y"], [0, 1]),  # renamed: as many, none in common
        (["a", "b"], ["x", "y", "z"], [None] * 3),
        (["a", "b"], None, [0, 1]),
        (None, ["a", "b"], [0, 1]),
    ],
)
def test_class_names_are_compared_without_case_and_spaces(theirs, ours, keep):
    old, new = filled({**V5, "nc": len(theirs or "ab")}, theirs), build_model({**V5, "nc": len(ours or "ab")}, names=ours)
    before = new.state_dict()["model.4.m.0.weight"].clone()
    transfer(new, source(old))
    a, b = (m.state_dict()["model.4.m.0.weight"].unflatten(0, (2, -1)) for m in (new, old))
    assert torch.equal(a[:, :5], b[:, :5])  # box and objectness of both anchors
    for i, j in enumerate(keep):
        assert torch.equal(a[:, 5 + i], before.unflatten(0, (2, -1))[:, 5 + i] if j is None else b[:, 5 + j])


def test_anchors_are_transferred_unless_the_yaml_lists_its_own():
    old = filled(V5)
    old.head.anchors.mul_(1.5)  # as autoanchor leaves them
    same, other = build_model(V5), build_model({**V5, "anchors": [[8, 8, 16, 16], [32, 32, 64, 64]]})
    own = other.head.anchors.clone()
    for model in (same, other):
        transfer(model, source(old))
    assert torch.equal(same.head.anchors, old.head.anchors)
    assert torch.equal(other.head.anchors, own)
    bare = build_model(V5)
    transfer(bare, source(old, cfg=False))
    assert torch.equal(bare.head.anchors, old.head.anchors)


@pytest.mark.parametrize("cfg", [True, False])
def test_anchors_listed_in_a_given_yaml_are_kept_and_reported(cfg):
    old = filled(V5)
    same = build_model(V5)
    assert "anchors" not in str(transfer(same, source(old, cfg=cfg), own_anchors=True))
    old.half().float()
    assert "model.4.anchors" in transfer(same, source(old, cfg=cfg), own_anchors=True).filled  # only rounded: no others
    old.head.anchors.mul_(1.5)  # as autoanchor leaves them
    given = build_model(V5)
    own = given.head.anchors.clone()
    report = transfer(given, source(old, cfg=cfg), own_anchors=True)
    assert torch.equal(given.head.anchors, own)
    assert torch.equal(given.head.m[0].weight, old.head.m[0].weight)
    assert str(report).splitlines()[-1] == f"  anchors        those that {given.spec.origin} lists stay; the checkpoint has others"
    counted = build_model({**V5, "anchors": 2})
    assert "anchors" not in str(transfer(counted, source(old, cfg=False), own_anchors=True))
    assert torch.equal(counted.head.anchors, old.head.anchors)


def test_different_anchor_count_keeps_all_other_tensors():
    old, new = filled(V5), build_model({**V5, "anchors": [[8, 8], [32, 32]]})
    report = transfer(new, source(old))
    assert not any(name.startswith("model.4.") for name in report.filled)
    assert "model.2.cv1.conv.weight" in report.filled


@pytest.mark.parametrize("cfg", [True, False])
def test_dual_main_branch_and_single_head_exchange_weights(cfg):
    dual = tiny_model(head=DUAL_HEAD)
    single = build_model(tiny_cfg(), names=dual.names)
    report = transfer(single, source(dual, cfg=cfg))
    assert report.of_target == 1.0
    assert all(torch.equal(a, b) for a, b in zip(outputs(dual.deploy(fuse=False)), outputs(single)))
    back = build_model(tiny_cfg(head=DUAL_HEAD), names=dual.names)
    report = transfer(back, source(single, cfg=cfg))
    assert report.of_source == 1.0
    assert torch.equal(back.state_dict()["model.8.cv4.0.0.conv.weight"], dual.state_dict()["model.8.cv4.0.0.conv.weight"])
    assert "model.8.cv2.0.0.conv.weight" not in report.filled


def test_deployed_yolov9_receives_the_main_branch():
    dual, single = filled("yolov9-t.yaml"), build_model("gelan-t.yaml")
    report = transfer(single, source(dual))
    assert report.of_target == 1.0
    assert all(torch.equal(a, b) for a, b in zip(outputs(dual.deploy(fuse=False)), outputs(single)))
    assert [(r.source, r.module) for r in report.rows if r.target is None] == [(22, "SPPELAN"), (25, "RepNCSPELAN4"), (28, "RepNCSPELAN4")]


def test_different_head_keeps_the_backbone():
    old, new = filled("yolov5n.yaml"), build_model("yolov5nu.yaml")
    report = transfer(new, source(old))
    assert all(f"model.{i}." not in name for name in set(new.state_dict()) - report.filled for i in range(24))
    assert report.of_source > 0.9


def test_half_precision_weights_and_unreadable_yaml_are_handled():
    old = tiny_model()
    weights = {k: v.half() if v.is_floating_point() else v for k, v in old.state_dict().items()}
    new = build_model(tiny_cfg(), names=old.names)
    report = transfer(new, Source(weights, {"backbone": [[-1, 1, "NobodyKnowsThis", []]], "head": []}))
    assert report.of_source == report.of_target == 1.0
    assert new.state_dict()["model.0.conv.weight"].dtype == torch.float32
    assert torch.allclose(new.state_dict()["model.0.conv.weight"], old.state_dict()["model.0.conv.weight"], atol=1e-3)


def test_tensors_outside_rows_are_reported_as_dropped():
    old = tiny_model()
    report = transfer(build_model(tiny_cfg(), names=old.names), Source({**old.state_dict(), "extra.weight": torch.ones(7)}, None))
    assert "tensors of no row" in str(report)
    assert report.of_source < 1.0


@pytest.mark.parametrize("suffix", [".md", ".csv", ".json"])
def test_report_is_written_as_md_csv_and_json(tmp_path, suffix):
    old = tiny_model()
    report = transfer(build_model(tiny_cfg(attention=["CBAM", []]), names=old.names), source(old))
    path = tmp_path / f"report{suffix}"
    report.write(path)
    text = path.read_text(encoding="utf-8")
    if suffix == ".json":
        content = json.loads(text)
        assert content["of_source"] == pytest.approx(report.of_source)
        assert len(content["rows"]) == len(report.rows)
    elif suffix == ".csv":
        rows = list(csv.DictReader(text.splitlines()))
        assert sum(int(row["landed"]) for row in rows) == report.landed
    else:
        assert text.startswith("# Weights from old.pt")
        assert text.count("\n| ") == len(report.rows) + 2


def test_unknown_report_suffix_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"report\.txt: a file that ends in \.md, \.csv, \.json"):
        transfer(tiny_model(), source(tiny_model())).write(tmp_path / "report.txt")


def test_checkpoint_round_trips_through_yaml_and_network(tmp_path):
    from models.checkpoints.checkpoint import Checkpoint, load_checkpoint, model_from_checkpoint, save_checkpoint
    from models.edit.graph_table import write_spec

    model = tiny_model(head=DUAL_HEAD)
    first = Checkpoint(model.spec.to_dict(), "tiny.yaml", model.names, model.state_dict())
    save_checkpoint(tmp_path / "first.pt", first)
    loaded = load_checkpoint(tmp_path / "first.pt")
    write_spec(tmp_path / "tiny.yaml", model_from_checkpoint(loaded).spec)
    rebuilt = build_model(tmp_path / "tiny.yaml", names=loaded.names)
    report = transfer(rebuilt, Source(loaded.weights, loaded.cfg, loaded.names))
    assert report.of_source == report.of_target == 1.0
    assert report.filled == frozenset(loaded.weights)
    second = Checkpoint(rebuilt.spec.to_dict(), "tiny.yaml", rebuilt.names, rebuilt.state_dict())
    save_checkpoint(tmp_path / "second.pt", second)
    again = load_checkpoint(tmp_path / "second.pt")
    assert (again.cfg, again.names) == (loaded.cfg, loaded.names)
    assert all(torch.equal(again.weights[k], v) for k, v in loaded.weights.items())
    assert again.weights.keys() == loaded.weights.keys()


def test_transferred_values_equal_the_source():
    old = tiny_model()
    new = Model(edit(old.spec, insert="SE@detect").spec, names=old.names)
    transfer(new, source(old))
    key = "model.0.conv.weight"
    assert torch.equal(new.state_dict()[key], torch.from_numpy(fill_value(key, (8, 3, 3, 3), 1.35)))
