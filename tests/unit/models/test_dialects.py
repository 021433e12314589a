"""One block name, several programs: the dialect of a file decides, and the networks have the published sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml

from models import build_model
from models.model import Model
from models.spec.config_files import find_config
from models.spec.parser import load_spec
from utils.errors import UserError

ANCHORS = [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119], [116, 90, 156, 198, 373, 326]]
STEM = [[-1, 1, "Conv", [8, 3, 4]], [-1, 1, "Conv", [16, 3, 2]]]


def build(cfg: Any, **options: Any) -> Model:
    """The network with shapes but no memory."""
    with torch.device("meta"):
        return build_model(cfg, **options)


def count(cfg: Any, **options: Any) -> int:
    return sum(p.numel() for p in build(cfg, **options).parameters())


def raw(name: str, *without: str) -> dict[str, Any]:
    """The rows of a config, without some of its keys."""
    content = yaml.safe_load(find_config(name)[0].read_text(encoding="utf-8"))
    return {key: value for key, value in content.items() if key not in without}


def one_block(module: str, args: list[Any], head: list[Any], **keys: Any) -> dict[str, Any]:
    return {"nc": 2, "backbone": [*STEM, [-1, 2, module, args]], "head": [[[2], 1, *head]], **keys}


def kernels(cfg: Any) -> list[tuple[int, int]]:
    """Kernel sizes of the pair of convolutions in each bottleneck."""
    modules = dict(build_model(cfg).model[2].named_modules())
    firsts = [name for name in modules if name.endswith("cv1.conv") and name.replace("cv1", "cv2") in modules]
    inner = [name for name in firsts if name != "cv1.conv"]  # not those of the block around them
    return [(modules[name].kernel_size[0], modules[name.replace("cv1", "cv2")].kernel_size[0]) for name in inner]


@pytest.mark.parametrize(
    ("config", "published"),
    [
        ("yolov3", 61_949_149),
        ("yolov3-spp", 62_998_749),
        ("yolov4-csp", 52_921_437),
        ("yolor-csp", 52_923_994),
        ("yolor-csp-x", 96_943_410),
    ],
)
def test_networks_of_earlier_papers_have_their_published_size(config, published):
    assert count(config) == published


def test_the_older_panet_has_its_published_size():
    cfg = raw("yolov5-panet")
    for section in ("backbone", "head"):
        cfg[section] = [[f, n, m.replace("C3", "BottleneckCSP"), a] for f, n, m, a in cfg[section]]
    cfg["backbone"][0][2:] = ["Focus", [64, 3]]
    cfg["backbone"][4][1] = 9
    cfg["backbone"][8:] = [[-1, 1, "SPP", [1024, [5, 9, 13]]], [-1, 3, "BottleneckCSP", [1024, False]]]
    assert count(cfg) == 47_818_749


V5 = {"head": ["Detect", ["nc", "anchors"]], "anchors": [[10, 13, 16, 30]]}
COUNTED = {"head": ["Detect", ["nc", "anchors"]], "anchors": 3}
LISTED = {"head": ["Detect", ["nc"]], "anchors": [[10, 13, 16, 30]]}
V7 = {"head": ["IDetect", ["nc", "anchors"]], "anchors": 3}
V9 = {"head": ["DDetect", ["nc"]], "anchors": 3}
V9_BARE = {"head": ["DDetect", ["nc"]]}
V9_PLAIN = {"head": ["Detect", ["nc"]], "anchors": 3}
ULTRALYTICS = {"head": ["Detect", ["nc"]], "scales": {"n": [1.0, 1.0, 1024]}}
UNSCALED = {"head": ["Detect", ["nc"]], "depth_multiple": 1.0}
SAID = {"head": ["Detect", ["nc"]], "dialect": "v9"}


@pytest.mark.parametrize("module", ["Bottleneck", "BottleneckCSP"])
@pytest.mark.parametrize(
    ("keys", "dialect", "first"),
    [(V5, "v5", 1), (COUNTED, "v5", 1), (LISTED, "v5", 1), (V7, "v5", 1), (V9, "v9", 3), (V9_BARE, "v9", 3), (V9_PLAIN, "v9", 3)]
    + [(ULTRALYTICS, "v8", 3), (UNSCALED, "v8", 3), (SAID, "v9", 3)],
    ids=["v5", "counted", "listed", "v7", "v9", "bare", "plain", "ultralytics", "unscaled", "said"],
)
def test_the_dialect_chooses_the_kernels_of_bottlenecks(module, keys, dialect, first):
    cfg = one_block(module, [16], **keys)
    spec = load_spec(cfg)
    assert spec.dialect == dialect
    assert kernels(cfg) == [(first, 3)] * 2
    assert load_spec(spec.to_dict()).dialect == dialect


@pytest.mark.parametrize(
    ("module", "args"),
    [
        ("Bottleneck", [16, True, 1, [3, 5]]),
        ("Bottleneck", [16, {"k": [3, 5]}]),
        ("BottleneckCSP", [16, True, 1, 0.5, [3, 5]]),
        ("BottleneckCSP", [16, {"k": [3, 5]}]),
    ],
)
def test_kernels_that_a_row_gives_are_kept(module, args):
    assert kernels(one_block(module, args, **V5)) == [(3, 5)] * 2


def test_bottleneck_csp_takes_an_activation_of_its_own():
    block = build_model(one_block("BottleneckCSP", [16, {"act": "nn.LeakyReLU(0.1)"}], **V5)).model[2]
    assert isinstance(block.act, torch.nn.LeakyReLU)
    assert block.act.negative_slope == 0.1
    assert isinstance(block.cv1.act, torch.nn.SiLU)


@pytest.mark.parametrize(("config", "published"), [("yolov9t", 2_128_720), ("yolov9s", 7_318_368), ("yolov9c", 25_590_912)])
def test_files_of_ultralytics_without_scales_have_its_head(config, published):
    cfg = raw(config, "scales", "scale")
    assert count(cfg) == count(config) == published
    spec = load_spec(cfg)
    assert load_spec(spec.to_dict()).dialect == spec.dialect == "v8"


def test_yolov9s_files_keep_their_own_head():
    assert load_spec("gelan").dialect == load_spec("yolov7-af").dialect == "v9"
    cfg = raw("yolov7-af", "anchors")  # blocks that only YOLOv7 and YOLOv9 have
    assert load_spec(cfg).dialect == "v9"
    assert count(cfg) == count("yolov7-af")


def test_a_network_keeps_its_dialect_when_the_rows_that_showed_it_are_gone():
    rows = [*STEM, [-1, 1, "Bottleneck", [16]], [-1, 1, "Silence", []]]
    model = build_model({"nc": 2, "backbone": rows, "head": [[[2, 2], 1, "DualDetect", ["nc"]]]})
    assert model.spec.dialect == "v9"
    lean = model.deploy()
    written = lean.spec.to_dict()
    assert written["dialect"] == "v9"
    again = build_model(written)
    again.load_state_dict(lean.state_dict())


def test_an_unknown_dialect_is_refused():
    with pytest.raises(UserError, match=r"unknown dialect 'v7'; known are v5, v8, v9"):
        load_spec(one_block("Bottleneck", [16], ["Detect", ["nc"]], dialect="v7"))
