"""Files of early releases: bottlenecks, activations and YAMLs as those programs had them; and which file is of another task or family."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models import build_model
from models.checkpoints.checkpoint import ForeignCheckpoint, load_checkpoint, model_from_checkpoint
from models.model import Model
from tests.foreign_models import Layout, convert_model, layout, randomize_, raw_yaml, save_stripped
from tests.tiny import tiny_cfg
from utils.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
NAMES = ["a", "b"]
ANCHORS = [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119], [116, 90, 156, 198, 373, 326]]
SCALE: dict[str, Any] = {"nc": 2, "depth_multiple": 0.33, "width_multiple": 0.125}
LEAKY = "nn.LeakyReLU(0.1)"


def csp(number: int, *args: Any) -> list[Any]:
    return [-1, number, "BottleneckCSP", list(args)]


def conv(*args: Any, source: int = -1) -> list[Any]:
    return [source, 1, "Conv", list(args)]


UP = [-1, 1, "nn.Upsample", ["None", 2, "nearest"]]
BACKBONE = [
    [-1, 1, "Focus", [64, 3]], conv(128, 3, 2), csp(3, 128), conv(256, 3, 2), csp(9, 256), conv(512, 3, 2), csp(9, 512), conv(1024, 3, 2),
    [-1, 1, "SPP", [1024, [5, 9, 13]]],
]  # fmt: skip
TOP_DOWN = [csp(3, 1024, False), conv(512, 1, 1), UP, [[-1, 6], 1, "Concat", [1]], csp(3, 512, False)]
TOP_DOWN += [conv(256, 1, 1), UP, [[-1, 4], 1, "Concat", [1]], csp(3, 256, False)]  # rows 9 to 17
LATER = {
    **SCALE,
    "anchors": ANCHORS,
    "backbone": BACKBONE,
    "head": [*TOP_DOWN, conv(256, 3, 2), [[-1, 14], 1, "Concat", [1]], csp(3, 512, False), conv(512, 3, 2)]
    + [[[-1, 10], 1, "Concat", [1]], csp(3, 1024, False), [[17, 20, 23], 1, "Detect", ["nc", "anchors"]]],
}
OUTPUT = [-1, 1, "nn.Conv2d", [21, 1, 1]]
FIRST = {
    **SCALE,
    "anchors": ANCHORS[::-1],
    "backbone": BACKBONE,
    "head": [*TOP_DOWN, OUTPUT, conv(256, 3, 2, source=-2), [[-1, 14], 1, "Concat", [1]], csp(3, 512, False), OUTPUT]
    + [conv(512, 3, 2, source=-2), [[-1, 10], 1, "Concat", [1]], csp(3, 1024, False), OUTPUT, [[], 1, "Detect", [2, ANCHORS]]],
}


def images() -> torch.Tensor:
    return torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def old_network(*, kernels: list[int], usual: str, common: str, levels: list[int]) -> Model:
    """What the file should become: the later rows, with the kernels and activations of the release."""
    cfg = copy.deepcopy(LATER) | {"activation": usual, "anchors": [ANCHORS[level] for level in levels]}
    for row in [*cfg["backbone"], *cfg["head"]]:
        if row[2] == "BottleneckCSP":
            row[3] = [*row[3], {"k": kernels, "act": common}]
    cfg["head"][-1][0] = [[17, 20, 23][level] for level in levels]
    model = build_model(cfg, names=NAMES)
    randomize_(model)
    return model.eval()


def written_as(model: Model, classes: Layout, raw: dict[str, Any]) -> nn.Module:
    return convert_model(model, classes, names=NAMES, raw=copy.deepcopy(raw))


def as_first_release(model: nn.Module) -> nn.Module:
    """Moves the output convolutions out of the head into rows, and the YAML to ``md``."""
    layers, outputs = list(model.model), list(model.model[-1].m)
    del layers[-1].m
    layers[-1].f = [-1, 22, 18]
    rows = [*layers[:18], outputs[2], *layers[18:21], outputs[1], *layers[21:24], outputs[0], layers[-1]]
    model.model = nn.Sequential(*rows)
    model.md = model.yaml
    del model.yaml
    return model


def loaded(path: Path) -> tuple[ForeignCheckpoint, Model]:
    checkpoint = load_checkpoint(path)
    assert isinstance(checkpoint, ForeignCheckpoint)
    return checkpoint, model_from_checkpoint(checkpoint, source=path)


def assert_same(path: Path, own: Model) -> ForeignCheckpoint:
    """The file's network has the weights and the outputs of ``own``, in the precision of the file."""
    checkpoint, model = loaded(path)
    reference = copy.deepcopy(own).half().float()
    assert set(model.state_dict()) == set(reference.state_dict())
    assert all(torch.equal(value, reference.state_dict()[name]) for name, value in model.state_dict().items())
    found, wanted = model.predict(images()), reference.predict(images())
    assert torch.equal(found.boxes, wanted.boxes)
    assert torch.equal(found.scores, wanted.scores)
    return checkpoint


# release, and its activations: of convolutions, and behind the common norm of BottleneckCSP
RELEASES = [("2.0", LEAKY, LEAKY), ("3.0", "nn.Hardswish()", LEAKY), ("5.0", "nn.SiLU()", LEAKY), ("6.0", "nn.SiLU()", "nn.SiLU()")]


@pytest.mark.parametrize(("release", "usual", "common"), RELEASES, ids=[release[0] for release in RELEASES])
@pytest.mark.parametrize("fused", [False, True], ids=["trained", "fused"])
def test_files_of_early_releases_compute_what_they_did(tmp_path, release, usual, common, fused):
    own = old_network(kernels=[1, 3], usual=usual, common=common, levels=[0, 1, 2])
    network = own.fuse() if fused else own
    with layout("yolov5-old") as classes:
        save_stripped(written_as(network, classes, LATER), tmp_path / f"{release}.pt")
    assert_same(tmp_path / f"{release}.pt", network)


def test_yolov9s_bottlenecks_stay_its_own(tmp_path):
    own = old_network(kernels=[3, 3], usual="nn.SiLU()", common="nn.SiLU()", levels=[0, 1, 2])
    with layout("yolov9") as classes:
        save_stripped(written_as(own, classes, LATER), tmp_path / "k33.pt")
    assert_same(tmp_path / "k33.pt", own)


def test_files_of_the_first_release_load(tmp_path):
    own = old_network(kernels=[1, 3], usual=LEAKY, common=LEAKY, levels=[2, 1, 0])
    with layout("yolov5-old") as classes:
        save_stripped(as_first_release(written_as(own, classes, FIRST)), tmp_path / "first.pt", zipped=False)
    checkpoint = assert_same(tmp_path / "first.pt", own)
    assert checkpoint.strides == (32.0, 16.0, 8.0)
    assert checkpoint.names == ("a", "b")
    assert checkpoint.cfg["head"][-1][:3] == [[23, 20, 17], 1, "Detect"]


@pytest.mark.parametrize(("config", "program"), [("yolov3", "yolov5"), ("yolov4-csp", "yolov7"), ("yolor-csp", "yolov7")])
def test_networks_of_earlier_papers_load(tmp_path, config, program):
    raw = raw_yaml(f"{config}.yaml", 2) | {"width_multiple": 0.125, "depth_multiple": 0.33}
    own = build_model(raw, names=NAMES)
    randomize_(own)
    with layout(program) as classes:
        save_stripped(written_as(own.eval(), classes, raw), tmp_path / "file.pt")
    assert_same(tmp_path / "file.pt", own.eval())


@pytest.mark.parametrize("source", [18, -40, "x", [3, 99]])
def test_rows_of_a_first_release_that_cannot_be_followed_are_one_line(tmp_path, source):
    own = old_network(kernels=[1, 3], usual=LEAKY, common=LEAKY, levels=[2, 1, 0])
    raw = copy.deepcopy(FIRST)
    raw["backbone"][1][0] = source
    with layout("yolov5-old") as classes:
        save_stripped(as_first_release(written_as(own, classes, raw)), tmp_path / "first.pt")
    with pytest.raises(UserError, match=r"first\.pt: its YAML has a row that reads") as caught:
        load_checkpoint(tmp_path / "first.pt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("program", "head", "says"),
    [
        ("yolov9", "Panoptic", "segments things and areas"),
    ],
)
def test_files_that_keep_a_heads_function_are_refused_by_their_task(tmp_path, program, head, says):
    with layout(program) as classes:
        model = convert_model(build_model(tiny_cfg(attention=("ECA", [])), nc=2), classes, names=NAMES, raw=tiny_cfg())
        plain = classes.of("Detect")
        plain.forward = lambda self, x: x
        plain.forward.__qualname__, plain.forward.__module__ = "Detect.forward", plain.__module__
        model.model[-1].__class__ = classes.of(head)
        model.model[-1].detect = plain.forward
        torch.save({"model": model}, tmp_path / "task.pt")
    with pytest.raises(UserError, match=rf"task\.pt: a DetectionModel that {says} \(its head is {head}\); tasks here are"):
        load_checkpoint(tmp_path / "task.pt")
