"""Checkpoints of YOLOv5, v7, v9 and ultralytics, in their own pickle layouts: every tensor comes out, and the network computes the same."""

from __future__ import annotations

import copy
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from models import build_model, load_model
from models.checkpoints import recognition
from models.checkpoints.checkpoint import ForeignCheckpoint, load_checkpoint, model_from_checkpoint, save_checkpoint
from models.model import Model
from models.spec.parser import load_spec
from tests.foreign_models import convert_model, foreign_model, layout, randomize_, raw_yaml, save_stripped
from tests.golden import find
from tests.tiny import DUAL_HEAD, NAMES, tiny_cfg, tiny_model
from utils.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
# Program, config, its golden's name where that is kept; the published keys prove that the stand-ins are what the program would save.
SOURCES = [
    ("yolov5", "yolov5n.yaml", ""),
    pytest.param("yolov5", "yolov5s.yaml", "", marks=pytest.mark.slow),
    ("yolov5-old", "yolov5s-ghost.yaml", "hub-v5-yolov5s-ghost"),
    ("yolov9", "yolov9-t.yaml", "yolov9-t"),
    ("yolov9", "gelan-t.yaml", "gelan-t"),
    ("ultralytics", "yolov5nu.yaml", "ultralytics-yolov5nu"),
    ("ultralytics", "yolov8n.yaml", ""),
    pytest.param("ultralytics", "yolov9t.yaml", "", marks=pytest.mark.slow),
    pytest.param("yolov9", "yolov9-c.yaml", "", marks=pytest.mark.slow),
    pytest.param("yolov7", "yolov7-w6.yaml", "yolov7-w6", marks=pytest.mark.slow),
]


PLAIN = tiny_cfg(attention=("ECA", [])) | {"nc": 3}  # those programs cannot hold FocalModulation, which has a layer called f


def plain_model() -> Model:
    return tiny_model(attention=("ECA", []))


STREAMED = ("yolov5n.yaml", "gelan-t.yaml", "yolov8n.yaml")  # also written in the layout before torch 1.6


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("foreign")


def images() -> torch.Tensor:
    return torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def assert_all_placed(path: Path, expected: dict[str, torch.Tensor]) -> ForeignCheckpoint:
    """Every tensor of the file is in the checkpoint and in the network built for it, bit for bit."""
    checkpoint = load_checkpoint(path)
    assert isinstance(checkpoint, ForeignCheckpoint)
    assert list(checkpoint.weights) == list(expected)
    placed = model_from_checkpoint(checkpoint, source=path).state_dict()
    assert set(placed) == set(expected)
    for name, value in expected.items():
        assert torch.equal(checkpoint.weights[name], value), name
        assert torch.equal(placed[name], value), name
    return checkpoint


@pytest.mark.parametrize(("program", "config", "golden"), SOURCES, ids=lambda v: v.removesuffix(".yaml") if v else "-")
def test_every_tensor_of_every_source_is_loaded(folder, program, config, golden):
    zipped, older = folder / f"{program}-{config}.pt", folder / f"{program}-{config}-old.pt"
    with layout(program) as classes:
        model = foreign_model(config, classes, nc=80)
        expected = save_stripped(model, zipped, ema=True)
        if config in STREAMED:
            save_stripped(model, older, zipped=False)
    if golden:
        assert list(expected) == [key for key, _ in find("models", golden).meta["keys"]]
    checkpoint = assert_all_placed(zipped, expected)
    if config in STREAMED:
        assert_all_placed(older, expected)
    assert (checkpoint.nc, checkpoint.names[7], checkpoint.strides[:3]) == (80, "thing 7", (8.0, 16.0, 32.0))


def test_loaded_network_equals_the_one_built_from_its_config(folder):
    cfg = tiny_cfg(attention=("ECA", []), head=DUAL_HEAD) | {"nc": 3}
    with layout("yolov9") as classes:
        model = convert_model(build_model(cfg), classes, names=list(NAMES), raw=cfg)
        expected = save_stripped(model, folder / "dual.pt")
    model, reference = load_model(folder / "dual.pt"), build_model(cfg)
    reference.load_state_dict(expected)
    for found, wanted in zip(model.predict(images()), reference.predict(images())):
        assert torch.equal(found, wanted)
    assert model.deploy().spec.rows[-1].module == "DDetect"


def test_every_tensor_of_yolov7_is_loaded_with_its_row_activations(folder):
    raw = raw_yaml("yolov7-tiny.yaml", 4)
    del raw["activation"]
    for section in ("backbone", "head"):
        raw[section] = [
            [f, n, m, [*a, *[1, 1][len(a) - 1 :], "None", 1, "nn.LeakyReLU(0.1)"] if m == "Conv" else a] for f, n, m, a in raw[section]
        ]
    with layout("yolov7") as classes:
        expected = save_stripped(foreign_model("yolov7-tiny.yaml", classes, nc=4, names=list("abcd"), raw=raw), folder / "v7.pt")
    checkpoint = assert_all_placed(folder / "v7.pt", expected)
    assert checkpoint.names == ("a", "b", "c", "d")


def test_activation_missing_from_the_yaml_is_read_from_the_layers(folder):
    raw = raw_yaml("yolov5n.yaml", 2)
    with layout("yolov5-old") as classes:
        own = build_model({**raw, "activation": "nn.Hardswish()"}, nc=2)
        expected = save_stripped(convert_model(own, classes, names=["a", "b"], raw=raw), folder / "hardswish.pt")
    checkpoint = assert_all_placed(folder / "hardswish.pt", expected)
    assert checkpoint.cfg["activation"] == "nn.Hardswish()"


def test_anchors_given_as_a_count_come_from_the_head(folder):
    raw = raw_yaml("yolov5n.yaml", 2)
    own = build_model(raw, nc=2)
    own.head.set_anchors(own.head.anchors_px * 1.5)
    with layout("yolov5") as classes:
        save_stripped(convert_model(own, classes, names=["a", "b"], raw={**raw, "anchors": 3}), folder / "counted.pt")
    model = load_model(folder / "counted.pt")
    assert torch.allclose(model.head.anchors_px, own.head.anchors_px, rtol=1e-3)


def test_layer_with_a_different_computation_is_refused(folder):
    raw = raw_yaml("yolov5n.yaml", 2)
    with layout("yolov5") as classes:
        model = convert_model(build_model(raw, nc=2), classes, names=["a", "b"], raw=raw)
        model.model[3].conv.padding = (0, 0)
        save_stripped(model, folder / "padding.pt")
        model.model[3].conv.padding = (1, 1)
        model.model[-1].stride = torch.tensor([4.0, 8.0, 16.0])
        save_stripped(model, folder / "strides.pt")
    with pytest.raises(
        UserError, match=r"padding\.pt: would not compute what it did .*model\.3\.conv\.padding is 0 in the file and 1 here"
    ):
        load_model(folder / "padding.pt")
    with pytest.raises(UserError, match=r"its strides are \[4\.0, 8\.0, 16\.0\], its architecture gives"):
        load_model(folder / "strides.pt")


@pytest.mark.parametrize(("program", "config"), [("yolov5", "yolov5n.yaml"), ("ultralytics", "yolov8n.yaml")])
def test_fused_files_load(folder, program, config):
    path = folder / f"fused-{config}.pt"
    own = build_model(config, nc=2)
    randomize_(own)
    fused = own.fuse()
    with layout(program) as classes:
        conv = classes.of("Conv")
        conv.forward_fuse = lambda self, x: x
        model = convert_model(fused, classes, names={0: "a", 1: "b"}, raw=raw_yaml(config, 2))
        model.model[0].forward = model.model[0].forward_fuse
        torch.save({"model": model}, path)
    loaded = load_model(path)
    assert set(loaded.state_dict()) == set(fused.state_dict())
    assert torch.equal(loaded.predict(images()).boxes, fused.eval().predict(images()).boxes)


def test_fused_yolov7_has_no_implicit_layers(folder):
    own = build_model("yolov7-tiny.yaml", nc=2)
    randomize_(own)
    lean = own.deploy()
    with layout("yolov7") as classes:
        model = convert_model(own.fuse(), classes, names=["a", "b"], raw=raw_yaml("yolov7-tiny.yaml", 2))
        head = model.model[-1]
        head.m = copy.deepcopy(lean.head.m)  # folded, while ia and im stay where they were
        type(head).fuseforward = lambda self, x: x
        head.forward = head.fuseforward
        torch.save({"model": model}, folder / "v7-fused.pt")
    loaded = load_model(folder / "v7-fused.pt")
    assert loaded.spec.rows[-1].module == "Detect"
    assert torch.equal(loaded.predict(images()).scores, lean.predict(images()).scores)


@pytest.mark.parametrize("wrapper", [nn.DataParallel, "DistributedDataParallel", "OptimizedModule"])
def test_wrapped_networks_and_averages_are_found(folder, wrapper):
    with layout("yolov9") as classes:
        model = convert_model(plain_model(), classes, names=list(NAMES), raw=PLAIN)
        if wrapper is nn.DataParallel:
            outer = nn.DataParallel(model)
        else:  # these two cannot be made here without a process group or a compiler
            outer = nn.DataParallel.__new__(nn.DataParallel)
            nn.Module.__init__(outer)
            outer.add_module("module" if wrapper == "DistributedDataParallel" else "_orig_mod", model)
        torch.save({"model": outer, "ema": (model, 100)}, folder / "wrapped.pt")
        torch.save({"model": outer}, folder / "outer.pt")
        torch.save(model, folder / "bare.pt")
    for name in ("wrapped.pt", "outer.pt", "bare.pt"):
        assert_all_placed(folder / name, plain_model().state_dict())


def test_moving_average_is_preferred(folder):
    with layout("yolov9") as classes:
        model = convert_model(plain_model(), classes, names=list(NAMES), raw=PLAIN)
        other = copy.deepcopy(model)
        other.model[0].conv.weight.data.zero_()
        torch.save({"model": other, "ema": model, "updates": 7}, folder / "both.pt")
    assert torch.equal(
        load_checkpoint(folder / "both.pt").weights["model.0.conv.weight"], plain_model().state_dict()["model.0.conv.weight"]
    )


@pytest.mark.parametrize(
    ("head", "says"),
    [("IKeypoint", "keypoints"), ("Panoptic", "segments things"), ("SemanticSegment", "segments"), ("YOLOEDetect", "what a text names")],
)
def test_checkpoints_of_other_tasks_are_refused_by_name(folder, head, says):
    with layout("ultralytics") as classes:
        model = convert_model(plain_model(), classes, names=list(NAMES), raw=PLAIN)
        model.model[-1].__class__ = classes.of(head)
        torch.save({"model": model}, folder / "task.pt")
    with pytest.raises(UserError, match=rf"task\.pt: a DetectionModel that .*{says}.*head is {head}\); tasks here are") as caught:
        load_checkpoint(folder / "task.pt")
    assert "\n" not in str(caught.value)


def plain_files(folder: Path) -> dict[str, Path]:
    """Weights in the ways people keep them without an architecture."""
    weights = {k: v.clone() for k, v in plain_model().state_dict().items()}
    contents = {
        "state_dict": {"state_dict": {f"module.{k}": v for k, v in weights.items()}, "epoch": 3},
        "model": {"model": {f"_orig_mod.{k}": v for k, v in weights.items()}, "optimizer": {"state": {}}},
        "rows": {k.removeprefix("model."): v for k, v in weights.items()},
        "twice": {"model_state_dict": {f"model.{k}": v for k, v in weights.items()}},
        "half": {k: v.half() if v.is_floating_point() else v for k, v in weights.items()},
    }
    for name, content in contents.items():
        torch.save(content, folder / f"{name}.pt")
    save_file(weights, folder / "plain.safetensors")
    return {**{name: folder / f"{name}.pt" for name in contents}, "safetensors": folder / "plain.safetensors"}


def test_bare_weights_are_found_in_whatever_holds_them(folder, monkeypatch):
    monkeypatch.setattr(recognition, "published_names", lambda: ("plain.yaml",))
    monkeypatch.setattr(recognition, "_spec", lambda name: load_spec(PLAIN))
    wanted = plain_model().state_dict()
    for kind, path in plain_files(folder).items():
        checkpoint = load_checkpoint(path)
        assert (checkpoint.cfg_name, checkpoint.nc) == ("plain.yaml", 3), kind
        assert set(checkpoint.weights) == set(wanted), kind
        for name, value in wanted.items():
            assert torch.equal(checkpoint.weights[name], value.half().float() if kind == "half" and value.is_floating_point() else value)
    assert torch.equal(load_model(path).predict(images()).boxes, plain_model().predict(images()).boxes)


def test_bare_weights_of_a_published_network_are_recognised(folder):
    weights = randomize_(build_model("gelan-t.yaml", nc=5)).state_dict()
    torch.save(weights, folder / "anything.pt")
    checkpoint = load_checkpoint(folder / "anything.pt")
    assert (checkpoint.cfg_name, checkpoint.nc) == ("gelan-t.yaml", 5)
    assert list(checkpoint.weights) == list(weights)


def test_safetensors_may_carry_their_architecture(folder):
    import json

    notes = {"cfg": json.dumps(PLAIN), "names": json.dumps(NAMES), "cfg_name": "tiny.yaml"}
    save_file(plain_model().state_dict(), folder / "tiny.safetensors", metadata=notes)
    model = load_model(folder / "tiny.safetensors")
    assert model.names == NAMES
    assert torch.equal(model.predict(images()).scores, plain_model().predict(images()).scores)


def test_weights_that_fit_two_networks_are_not_guessed(folder, capsys, monkeypatch):
    rows = tiny_cfg(attention=("ECA", []))
    specs = {f"{name}.yaml": load_spec(rows | {"activation": act}) for name, act in (("a", "nn.SiLU()"), ("b", "nn.ReLU()"))}
    monkeypatch.setattr(recognition, "published_names", lambda: ("a.yaml", "b.yaml"))
    monkeypatch.setattr(recognition, "_spec", specs.__getitem__)
    torch.save(plain_model().state_dict(), folder / "mine.pt")
    assert not load_checkpoint(folder / "mine.pt").cfg
    assert "mine.pt: its tensors fit a.yaml as well as b.yaml; give --cfg" in capsys.readouterr().out
    monkeypatch.setattr(recognition, "published_names", lambda: ("b.yaml",))
    assert load_checkpoint(folder / "mine.pt").cfg["activation"] == "nn.ReLU()"


def safetensors_bytes(table: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(table) if length is None else length) + table + data


@pytest.mark.parametrize(
    "content",
    [
        safetensors_bytes(b"{}", length=1 << 60),
        safetensors_bytes(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', b"\0" * 4),
        safetensors_bytes(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0" * 3),
        safetensors_bytes(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0" * 8),
        safetensors_bytes(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,-4]}}'),
        safetensors_bytes(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-8,-4]}}', b"\0" * 4),
        safetensors_bytes(b'{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4),
        safetensors_bytes(
            b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}', b"\0" * 6
        ),
        safetensors_bytes(b'{"__metadata__":{"cfg":7}}'),
        safetensors_bytes(b"[" * 100_000),
        safetensors_bytes(b'{"a":3}'),
        safetensors_bytes(b'{"a":'),
    ],
    ids=range(12),
)
def test_damaged_safetensors_are_one_line(folder, content):
    (folder / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.safetensors: .*(damaged|not a checkpoint)") as caught:
        load_checkpoint(folder / "x.safetensors")
    assert "\n" not in str(caught.value)


def test_foreign_file_saves_in_the_own_format(folder):
    with layout("yolov9") as classes:
        torch.save({"model": convert_model(plain_model(), classes, names=list(NAMES), raw=PLAIN)}, folder / "theirs.pt")
    save_checkpoint(folder / "ours.pt", load_checkpoint(folder / "theirs.pt"))
    theirs, ours = load_model(folder / "theirs.pt"), load_model(folder / "ours.pt")
    assert torch.equal(theirs.predict(images()).boxes, ours.predict(images()).boxes)
    assert ours.names == NAMES


PEER = """
import sys, torch
from ultralytics import YOLO
for cfg in ("yolov8n.yaml", "yolov9t.yaml", "yolov5n.yaml"):
    torch.manual_seed(0)
    model = YOLO(cfg).model.eval()
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1); m.running_var.uniform_(0.5, 1.5); m.weight.data.uniform_(0.8, 1.2)
    x = torch.rand(1, 3, 64, 96)
    for zipped in (True, False):
        kind = "zip" if zipped else "stream"
        torch.save({"epoch": -1, "model": model, "ema": None, "train_args": {}}, f"{cfg}-{kind}.pt", _use_new_zipfile_serialization=zipped)
    torch.save({"x": x, "out": model(x)[0], "n": len(model.state_dict())}, f"{cfg}-expected.pt")
"""


@pytest.mark.skipif(not os.environ.get("YOLO_PEER_PYTHON"), reason="YOLO_PEER_PYTHON names no Python that has ultralytics")
def test_files_of_the_ultralytics_package_give_its_outputs(tmp_path):
    environment = {**os.environ, "YOLO_OFFLINE": "1", "YOLO_CONFIG_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [os.environ["YOLO_PEER_PYTHON"], "-c", PEER], cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=300
    )
    for config in ("yolov8n", "yolov9t", "yolov5n"):
        expected = torch.load(tmp_path / f"{config}.yaml-expected.pt", weights_only=True)
        out = expected["out"].detach().transpose(1, 2)  # (B, N, 4 + nc), xywh px
        corners = torch.cat((out[..., :2] - out[..., 2:4] / 2, out[..., :2] + out[..., 2:4] / 2), dim=2)
        for kind in ("zip", "stream"):
            checkpoint = load_checkpoint(tmp_path / f"{config}.yaml-{kind}.pt")
            assert len(checkpoint.weights) == expected["n"]
            boxes, scores = model_from_checkpoint(checkpoint).predict(expected["x"])
            off_px, off_score = float((boxes - corners).abs().max()), float((scores - out[..., 4:]).abs().max())
            print(f"{config} {kind}: boxes differ by {off_px:.1e} px, scores by {off_score:.1e}")
            assert off_px < 1e-3
            assert off_score < 1e-6


def test_foreign_packages_are_never_imported(folder):
    with layout("ultralytics") as classes:
        torch.save({"model": convert_model(plain_model(), classes, names=list(NAMES), raw=PLAIN)}, folder / "u.pt")
    assert not any(name.startswith("ultralytics") or name == "models.yolo" for name in sys.modules)
    load_checkpoint(folder / "u.pt")
    assert not any(name.startswith("ultralytics") or name == "models.yolo" for name in sys.modules)
