"""Which file a --cfg means: a file beside the path comes before ours, ours is reported, and a folder that does not exist is an error."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from engine.training.recipes import find_hyp
from models.checkpoints.published import missing_weights
from models.spec.config_files import CONFIGS, bundled_names, find_config
from models.spec.families import family_of
from models.spec.names import absent_network
from models.spec.parser import load_spec, named_channels, read_spec
from models.spec.planning import plan_layers
from utils.errors import UserError

SCALED = "nc: 2\nscales: {n: [1.0, 0.5, 64]}\nbackbone: [[-1, 1, Conv, [32, 3, 8]]]\nhead: [[[0], 1, Detect, [nc]]]\n"


PAGES = (
    "ultralytics/cfg/models/v8/yolov8s.yaml", "ultralytics/cfg/models/11/yolo11s.yaml", "ultralytics/cfg/models/26/yolo26n-p2.yaml",
    "models/hub/yolov5-p6.yaml", "cfg/deploy/yolov7.yaml",
)  # fmt: skip


def reports(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("name", ["yolov5n.yaml", "yolov5n", "yolov8n.yaml"])
def test_a_file_beside_the_path_with_scales_comes_before_ours(tmp_path, name, caplog):
    base = tmp_path / f"{name.removesuffix('.yaml')[:-1]}.yaml"
    base.write_text(SCALED)
    with caplog.at_level(logging.WARNING):
        assert find_config(tmp_path / name) == (base, "n")
        spec = load_spec(tmp_path / name)
    assert (spec.nc, spec.width, spec.scale) == (2, 0.5, "n")
    assert not reports(caplog)


def test_a_bare_name_reads_the_file_beside_it_too(tmp_path, monkeypatch):
    (tmp_path / "yolov5.yaml").write_text(SCALED)
    monkeypatch.chdir(tmp_path)
    assert find_config("yolov5n.yaml") == (Path("yolov5.yaml"), "n")


def test_a_file_beside_the_path_without_scales_is_not_meant(tmp_path, caplog):
    (tmp_path / "yolov5.yaml").write_text("nc: 2\n")
    with caplog.at_level(logging.WARNING):
        assert find_config(tmp_path / "yolov5n.yaml") == (CONFIGS / "v5/yolov5n.yaml", "")
    assert reports(caplog) == [f"{tmp_path / 'yolov5n.yaml'}: no such file, so {CONFIGS / 'v5/yolov5n.yaml'} is read"]
    (tmp_path / "mine1.yaml").write_text("nc: 2\n")
    with pytest.raises(UserError, match=r"mine1s\.yaml: no such model YAML, .*mine1\.yaml has no scales"):
        find_config(tmp_path / "mine1s.yaml")


def test_ours_in_place_of_a_path_is_reported_once_a_reading(caplog):
    with caplog.at_level(logging.WARNING):
        assert named_channels("models/detect/yolov9-c.yaml") is None
        load_spec("models/detect/yolov9-c.yaml")
        load_spec("yolov9-c.yaml")
    assert reports(caplog) == [f"models/detect/yolov9-c.yaml: no such file, so {CONFIGS / 'v9/yolov9-c.yaml'} is read"]


@pytest.mark.parametrize("folder", ["nosuchdir", "../nosuchdir", "/nosuchdir/models", "models/nosuchdir"])
def test_a_folder_that_does_not_exist_is_an_error(folder):
    with pytest.raises(UserError, match=rf"{folder}/yolov9-c\.yaml: the folder {folder} does not exist; .*bare name yolov9-c\.yaml"):
        find_config(f"{folder}/yolov9-c.yaml")


@pytest.mark.parametrize("path", PAGES)
def test_commands_of_published_pages_work_as_they_stand(path):
    assert CONFIGS in find_config(path)[0].parents


def test_a_recipe_is_found_by_the_same_rule(tmp_path, capsys):
    recipe = tmp_path / "hyp.a.yaml"
    recipe.write_text("")
    assert find_hyp("hyp.a.yaml", tmp_path) == recipe
    assert not capsys.readouterr().out
    assert find_hyp("data/hyps/hyp.a.yaml", tmp_path) == recipe
    assert capsys.readouterr().out == f"data/hyps/hyp.a.yaml: no such file, so {recipe} is read\n"
    with pytest.raises(UserError, match="the folder nosuchdir does not exist"):
        find_hyp("nosuchdir/hyp.a.yaml", tmp_path)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("yolov6n", "YOLOv6 is not here"),
        ("yolox", "YOLOX is not here"),
        ("yolox-s", "YOLOX is not here"),
        ("yolov4", "YOLOv4 is not here"),
        ("yolo_nas_s", "YOLO-NAS is not here"),
        ("rtdetr-r50", "RTDETR-R50 is not here"),
        ("rtdetr-resnet50", "RT-DETR on ResNet is not here; here are"),
        ("yolov8s-worldv2", "YOLO-World is not here"),
        ("yolov8n-cls-resnet50", "YOLO on ResNet is not here"),
        ("yolov8-rtdetr", "YOLOv8 with the decoder of RT-DETR is not here"),
        ("yolo26n-depth", "a network for depth maps by its name; tasks here are"),
        ("yolo26n-sem", "a network for semantic segmentation by its name; tasks here are"),
        ("gelan-c-pan", "a network for panoptic segmentation"),
        ("yolo12n-seg", "YOLO12 has no network for segmentation here; YOLOv5, YOLOv8, YOLOv9, YOLO11 and YOLO26 have one"),
        ("yolo12s-cls", "YOLO12 has no network for classification here; YOLOv5, YOLOv8, YOLO11 and YOLO26 have one"),
        ("yolov12x-obb", "YOLO12 has no network for rotated boxes here; YOLOv8, YOLO11 and YOLO26 have one"),
        ("yolo12n-segm", "YOLO12 has no network for segmentation here"),
        ("yolov10n-seg", "YOLOv10 has no network for segmentation here"),
        ("yolo12n-p2", "YOLO12 has no -p2 network here; YOLOv5, YOLOv8, YOLOv9 and YOLO26 have one"),
        ("yolo11n-p2", "YOLO11 has no -p2 network here"),
        ("yolo11-p6", "YOLO11 has no -p6 network here"),
        ("yolov8n-seg-p6", "YOLOv8 has no -p6 network for segmentation here"),
        ("yolov5n-p7-pose", "YOLOv5 has no network for keypoints here; YOLOv8, YOLO11 and YOLO26 have one"),
        ("yolo14n", "YOLO14 is not here; here are YOLOv3, v5"),
        ("yolov14n", "YOLOv14 is not here; here are YOLOv3, v5"),
        ("yolo27n", "YOLO27 is not here"),
    ],
)
def test_a_family_or_task_that_is_not_here_is_named(name, says):
    with pytest.raises(UserError) as caught:
        find_config(name)
    assert says in str(caught.value)
    assert "did you mean" not in str(caught.value)
    assert says in missing_weights(Path(f"{name}.pt"))


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_no_config_of_ours_bears_an_absent_name(path):
    assert not absent_network(path.stem, bundled_names())


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("yolo8n", "yolov8n"), ("yolov11n", "yolo11n"), ("YOLOv11s.yaml", "yolo11s"), ("yolo10b", "yolov10b"), ("yolov12x", "yolo12x"),
        ("yolov26m-p6", "yolo26m-p6"), ("yolo5s6", "yolov5s6"),
    ],
)  # fmt: skip
def test_a_family_spelled_otherwise_gets_the_published_spelling(name, meant):
    with pytest.raises(UserError, match=f"did you mean '{meant}'"):
        find_config(name)
    assert find_config(meant)


def test_names_close_to_ours_keep_their_hint():
    assert "did you mean 'yolov7x'" in missing_weights(Path("yolov7xx.pt")).replace(".pt", "")
    with pytest.raises(UserError, match="did you mean 'yolov8"):
        find_config("yolov8nn")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("yolov8nn-seg", "yolov8-seg"), ("yolo26nn-pose", "yolo26-pose"), ("yolo11-segment", "yolo11-seg"),
        ("yolov9-cc-dseg", "yolov9-c-dseg"), ("yolo26n-p22", ""),
        ("yolov8n-ghots-p6", "yolov8-ghost-p6"), ("yolo11-obb-CloAtention", "yolo11-obb-CloAttention"), ("yolo2024-run", ""),
    ],
)  # fmt: skip
def test_a_hint_has_the_family_task_and_form_of_the_name(name, meant):
    with pytest.raises(UserError) as caught:
        find_config(name)
    assert (f"did you mean '{meant}'?" if meant else "under models/configs") in str(caught.value)
    assert meant or "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("modules", "family"),
    [
        (["Conv", "C2fAttn", "Detect"], "YOLO-World or YOLOE"),
        (["ResNetLayer", "Conv", "AIFI", "RTDETRDecoder"], "network on ResNet (as RT-DETR-ResNet50)"),
        (["Conv", "DSC3k2", "A2C2f", "Detect"], ""),
        (["Conv", "C3k2", "SPPF", "C2PSA", "Detect"], ""),
        (["Conv", "C2f", "Detect"], ""),
    ],
)
def test_rows_show_their_family(modules, family):
    assert family_of(modules) == family


@pytest.mark.parametrize(
    ("module", "args", "says"),
    [
        ("C2fAttn", [16], r"a YOLO-World or YOLOE, a family that is not here \(row 2 is C2fAttn\)"),
        (
            "ResNetLayer",
            [16, 16, 1, True, 1],
            r"a network on ResNet \(as RT-DETR-ResNet50\), a family that is not here \(row 2 is ResNetLayer",
        ),
    ],
)
def test_files_of_families_that_are_not_here_are_named(module, args, says):
    rows = [[-1, 1, "Conv", [16, 3, 8]], [-1, 1, "A2C2f", [16, False]], [-1, 1, module, args]]
    data = {"nc": 2, "backbone": rows, "head": [[[-1], 1, "Detect", ["nc"]]]}
    with pytest.raises(UserError, match=rf"mine\.yaml: {says}") as caught:
        plan_layers(read_spec(data, origin="mine.yaml"))
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(("head", "does"), [("ISegment", "segments"), ("Depth", "estimates depth maps")])
def test_a_head_of_another_task_is_named(head, does):
    data = {"nc": 2, "backbone": [[-1, 1, "Conv", [16, 3, 8]]], "head": [[[-1], 1, head, ["nc", 32, 256]]]}
    with pytest.raises(UserError, match=rf"a network that {does} \(its head is {head}\); tasks here are"):
        plan_layers(read_spec(data, origin="mine.yaml"))


def test_a_folder_a_pipe_or_a_device_is_named_as_such(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").mkdir()
    (tmp_path / "yolov8n").mkdir()  # a run folder that is called like the network
    os.mkfifo(tmp_path / "pipe.yaml")
    folders, others = ("mine.yaml", str(tmp_path)), ("pipe.yaml", "/dev/zero")
    for name, kind in [*((f, "a folder") for f in folders), *((o, "a device or a pipe") for o in others)]:
        with pytest.raises(UserError, match=f"{name}: is {kind}"):
            find_config(name)
    assert find_config("yolov8n")[0].name == "yolov8.yaml"
