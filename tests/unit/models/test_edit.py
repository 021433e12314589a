"""Editing rows: readers and numbers follow, published variants come out, and wrong requests are one line each."""

from __future__ import annotations

import inspect
import random

import pytest
import torch
import yaml

from models import build_model
from models.edit.__main__ import main
from models.edit.graph_table import graph_table, spec_yaml
from models.edit.requests import read_insertion
from models.edit.rows import Edited, edit
from models.heads.base import Head
from models.model import Model
from models.spec import channel_rules as rules
from models.spec.config_files import CONFIGS
from models.spec.parser import ModelSpec, load_spec, read_spec
from models.spec.planning import plan_layers
from models.spec.registry import BLOCKS
from tests.golden import fill_
from tests.tiny import DUAL_HEAD, tiny_cfg
from utils.errors import UserError

VARIANTS = CONFIGS / "attention"
SINGLE = sorted(
    path.stem
    for path in VARIANTS.glob("*.yaml")
    if path.stem.startswith(("yolov8-", "yolov9-t-", "yolo11-", "yolo12-", "yolo26-"))
    and path.stem.split("-")[-1] in BLOCKS
    and BLOCKS[path.stem.split("-")[-1]].channels is rules.same_width
)
IN_THE_HEAD = {
    "yolov8-BRA-head": ("yolov8", "BRA", "identity"), "yolov8-NLBlockND-head": ("yolov8", "NLBlockND", ""),
    "yolov5-CloAttention-head": ("yolov5n", "CloAttention", "identity"),
    **{f"{family}-{module}-head": (family, module, init) for family in ("yolo11", "yolo12", "yolo26")
       for module, init in (("BRA", "identity"), ("CloAttention", "identity"), ("NLBlockND", ""))},
}  # fmt: skip
NETWORKS = ("yolov5s", "yolov8n", "yolov9-t", "yolov9-c", "yolo11n", "yolo26n")


def graph(spec: ModelSpec) -> list[tuple]:
    """All that decides a network: modules, arguments, widths and edges."""
    return [(p.name, p.args, p.kwargs, p.repeats, p.out_channels, p.sources, p.section, p.identity_start) for p in plan_layers(spec)]


def tiny(**cfg) -> ModelSpec:
    return read_spec(tiny_cfg(**cfg), origin="tiny.yaml")


def sources(spec: ModelSpec) -> list[tuple[int, ...]]:
    return [plan.sources for plan in plan_layers(spec)]


def test_insertion_gives_the_published_variant_of_yolov9_c():
    with torch.device("meta"):
        edited = build_model("yolov9-c.yaml", attention=["FocalModulation@9"])
        published = build_model("yolov9-c-FocalModulation.yaml")
    assert graph(edited.spec) == graph(published.spec)
    assert [(k, v.shape) for k, v in edited.state_dict().items()] == [(k, v.shape) for k, v in published.state_dict().items()]


@pytest.mark.parametrize("name", SINGLE)
def test_insertion_gives_every_single_row_variant(name):
    base, module = name.rsplit("-", 1)
    variant = load_spec(f"{name}.yaml")
    (block,) = [p for p in plan_layers(variant) if p.name == BLOCKS[module].name]
    options = ", ".join(f"{key}={value!r}" for key, value in block.kwargs.items())
    assert graph(edit(load_spec(base), insert=f"{module}@{block.index - 1}({options})").spec) == graph(variant)


@pytest.mark.parametrize("name", IN_THE_HEAD)
def test_detect_position_inserts_before_each_head_input(name):
    base, module, init = IN_THE_HEAD[name]
    assert graph(edit(load_spec(base), insert=[f"{module}@detect"], init=init).spec) == graph(load_spec(f"{name}.yaml"))


def test_replacing_equals_the_variants_with_attention_inside_blocks():
    assert graph(edit(load_spec("yolov8n"), replace="C2f=C2f_EMA@2,4,6,8").spec) == graph(load_spec("yolov8n-C2f_EMA"))
    spec = load_spec("yolov8n")
    assert edit(spec, replace="SPPF=EMA@9()").spec.rows[9].args == ()
    assert edit(spec, replace="SPPF=SPPELAN@9(1024, 512, k=3)").spec.rows[9].args == (1024, 512, {"k": 3})
    assert edit(spec, replace="C2f=C2f_SE@2(reduction=8)").spec.rows[2].args == (128, True, {"reduction": 8})
    everywhere = edit(load_spec("yolov8n"), replace="C2f=C2f_EMA(factor=4)")
    assert [p.kwargs for p in plan_layers(everywhere.spec) if p.name == "C2f_EMA"] == [{"factor": 4}] * 8
    assert everywhere.replaced == (2, 4, 6, 8, 12, 15, 18, 21)


@pytest.mark.parametrize("name", [*(path.stem for path in sorted(CONFIGS.glob("v[57]/*.yaml")))])
def test_insertion_followed_by_removal_restores_the_network(name):
    """Over negative, absolute and listed sources of all families, auxiliary heads included."""
    spec = load_spec(name)
    plans = plan_layers(spec)
    rows = [p.index for p in plans if isinstance(p.out_channels, int) and p.out_channels][:: max(1, len(plans) // 6)]
    edited = edit(spec, insert="SimAM@" + ",".join(map(str, rows)))
    assert len(edited.inserted) == len(rows)
    back = edit(edited.spec, remove=edited.inserted)
    assert graph(back.spec) == graph(spec)
    assert {old: back.rows[new] for old, new in edited.rows.items()} == {i: i for i in range(len(plans))}


def test_main_branch_readers_follow_and_auxiliary_readers_do_not():
    """tiny: rows 3, 4 and 6 feed the auxiliary branch, 3, 4 and 7 the main one."""
    spec = tiny(head=DUAL_HEAD)
    plain = edit(spec, insert="SE@3")
    assert (plain.inserted, plain.rows) == ((4,), {0: 0, 1: 1, 2: 2, 3: 3, 4: 5, 5: 6, 6: 7, 7: 8, 8: 9})
    assert sources(plain.spec)[4:] == [(3,), (4,), (5,), (6,), (7,), (3, 5, 7, 4, 5, 8)]
    assert sources(edit(spec, insert="SE@3+aux").spec)[-1] == (4, 5, 7, 4, 5, 8)
    assert sources(edit(spec, insert="SE@detect").spec)[-1] == (3, 5, 8, 4, 6, 10)
    assert sources(edit(spec, insert="SE@detect+aux").spec)[-1] == (4, 6, 9, 4, 6, 11)


def test_auxiliary_branch_with_last_inputs_is_unchanged():
    """IAuxDetect of YOLOv7 reads its main branch first."""
    before = plan_layers(load_spec("yolov7-w6"))
    edited = edit(load_spec("yolov7-w6"), insert="SE@detect")
    after = plan_layers(edited.spec)
    assert edited.inserted == after[-1].sources[:4]
    assert after[-1].sources[4:] == tuple(edited.rows[s] for s in before[-1].sources[4:])
    assert [p.sources[0] for p in after if p.index in edited.inserted] == [edited.rows[s] for s in before[-1].sources[:4]]


def test_rows_read_only_by_the_auxiliary_branch_are_followed():
    spec = load_spec("yolov9-c")
    (aux,) = [p.index for p in plan_layers(spec) if p.sources == (5,) and p.name == "CBLinear"]
    row = plan_layers(spec)[-1].sources[0]  # of the auxiliary branch
    assert row > aux
    edited = edit(spec, insert=f"SE@{row}")
    assert edited.inserted[0] == plan_layers(edited.spec)[-1].sources[0]


def test_positions_of_several_edits_use_the_original_numbering():
    edited = edit(tiny(), insert=["EMA@7,4", "SE@4", "CBAM@backbone.last"])
    names = [(p.name, p.sources) for p in plan_layers(edited.spec)][4:]
    assert names == [
        ("ADown", (3,)), ("EMA", (4,)), ("SE", (5,)), ("ADown", (6,)), ("SPPELAN", (7,)), ("FocalModulation", (8,)), ("EMA", (9,)),
        ("CBAM", (10,)), ("DDetect", (3, 6, 11)),
    ]  # fmt: skip
    assert edited.inserted == (5, 6, 10, 11)


def test_edits_combine():
    edited = edit(tiny(), insert="SE@3", replace="ADown=AConv@5", remove=7, init="identity")
    plans = plan_layers(edited.spec)
    assert [p.name for p in plans] == ["Conv", "Conv", "RepNCSPELAN4", "ADown", "SE", "ADown", "AConv", "SPPELAN", "DDetect"]
    assert [p.identity_start for p in plans].index(True) == 4
    assert plans[-1].sources == (4, 5, 7)
    assert edited.rows == {0: 0, 1: 1, 2: 2, 3: 3, 4: 5, 5: 6, 6: 7, 8: 8}
    assert (edited.replaced, len(edited.changes)) == ((6,), 3)


@pytest.mark.parametrize(
    ("text", "module", "positions", "args"),
    [
        ("BiLevelRoutingAttention@9(n_win=8,topk=4)", "BiLevelRoutingAttention", ["9"], ({"n_win": 8, "topk": 4},)),
        ("EMA@4, 6,detect (8)", "EMA", ["4", "6", "detect"], (8,)),
        ("X@1(2, [3, (4, 5)], act=nn.LeakyReLU(0.1), on=True, none=None, s='a b', w=-1.5)", "X", ["1"],
         (2, [3, [4, 5]], {"act": "nn.LeakyReLU(0.1)", "on": True, "none": None, "s": "a b", "w": -1.5})),
        ("X@1()", "X", ["1"], ()),
    ],
)  # fmt: skip
def test_requests_are_read_as_literals(text, module, positions, args):
    read = read_insertion(text.replace("detect (", "detect("))
    assert (read.module, [p.name for p in read.positions], read.args) == (module, positions, args)


@pytest.mark.parametrize(
    ("edits", "says"),
    [
        ({"insert": "EMA"}, "'EMA': should be MODULE@ROW"),
        ({"insert": "EMMA@3"}, "tiny.yaml: EMMA@3: unknown module 'EMMA', did you mean 'EMA'?"),
        ({"insert": "EMA@8"}, "row 8 is the head"),
        ({"insert": "EMA@9"}, "tiny.yaml has 9 rows, 0 to 8 (the head); row 9 is not there"),
        ({"insert": "EMA@-1"}, "row -1 is not there"),
        ({"insert": "EMA@detct"}, "'detct' is no position; a row number, detect or backbone.last are; did you mean 'detect'?"),
        ({"insert": "EMA@detect.3"}, "detect.3 is not there"),
        ({"insert": "EMA@head.last"}, "row 8 is the head"),
        ({"insert": "EMA@3,3"}, "row 3 is named twice"),
        ({"insert": "EMA@3+what"}, "'3+what' is no position"),
        ({"insert": "Conv@3"}, "Conv chooses its own output (rule 'out_width')"),
        ({"insert": "Concat@3"}, "(rule 'concat')"),
        ({"insert": "nn.Upsample@3"}, "(rule 'keep_width')"),
        ({"insert": "BRA@3(nwin=2)"}, "BRA@3(nwin=2): after row 3 [ADown]: has no option 'nwin'; did you mean 'n_win'?"),
        ({"insert": "SE@3(512)"}, "width 512 (scaled 512) is not the input's 32"),
        ({"insert": "EMA@3(__import__('os').system('x'))"}, "is neither a number, a plain word nor a known activation"),
        ({"insert": "EMA@3(factor=1+1)"}, "'1 + 1' is neither a number, a word nor a list"),
        ({"insert": "EMA@3(**{})"}, "** is not understood"),
        ({"insert": "EMA@3(8"}, "should be MODULE@ROW"),
        ({"insert": "EMA@3(8))"}, "the arguments cannot be read"),
        ({"insert": "SE@3", "init": "zero"}, "init 'zero' is unknown"),
        ({"init": "identity"}, "none is inserted"),
        ({"init": "identity", "replace": "ADown=AConv@3"}, "none is inserted; the module inside a block that replaces"),
        ({"insert": "SE@3", "remove": 3}, "row 3 is to be removed"),
        ({"replace": "C2f=C2f_EMA@2"}, "row 2 is RepNCSPELAN4, not C2f, which is at no row"),
        ({"replace": "C2f=C2f_EMA"}, "no row is C2f"),
        ({"replace": "Cnov=Conv"}, "no row is 'Cnov'; did you mean 'Conv'?"),
        ({"replace": "Conv=Konv"}, "unknown module 'Konv', did you mean 'Conv'?"),
        ({"replace": "Conv=DWConv@3"}, "row 3 is ADown, not Conv, which is at 0, 1"),
        ({"replace": "Conv=ADown"}, "argument 3 is Conv's k, and ADown takes no such argument"),
        ({"replace": "SPPELAN=SPPF"}, "argument 16 is SPPELAN's c3, and SPPF takes k there; give the arguments in brackets"),
        ({"replace": "FocalModulation=Conv"}, "expects its output width"),
        ({"replace": "Conv->ADown"}, "should be OLD=NEW@ROWS"),
        ({"replace": ["ADown=AConv@3", "ADown=AConv@3"]}, "row 3 is removed or replaced by another edit"),
        ({"replace": "DDetect=Conv"}, "cannot be kept"),
        ({"remove": 8}, "row 8 [DDetect]: cannot be removed: it is the head"),
        ({"remove": "9"}, "row 9 is not there"),
        ({"remove": "x"}, "'x' is no row number"),
        ({"remove": "3,3"}, "row 3 is named twice"),
        ({"remove": 1}, "row 1 [Conv]: cannot be removed: it gives 16 channels where it reads 8; its readers would not fit"),
        ({"remove": 5}, "row 5 [ADown]: cannot be removed: it changes the scale by 2, and its readers would not fit"),
    ],
)  # fmt: skip
def test_invalid_requests_give_one_line(edits, says):
    with pytest.raises(UserError) as caught:
        edit(tiny(), **edits)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_removal_of_shared_or_joining_rows_is_correct_or_refused():
    spec = load_spec("yolov9-c")
    with pytest.raises(UserError, match="reads the image, and so would rows 1, 26; only row 0 can"):
        edit(spec, remove=0)
    with pytest.raises(UserError, match="it joins rows"):
        edit(spec, remove=12)
    with pytest.raises(UserError, match="several maps"):
        edit(spec, insert="SE@24")
    data = tiny_cfg()
    data["backbone"][0:0] = [[-1, 1, "Silence", []]]
    data["head"] = [[[4, 5, 8], 1, "DDetect", ["nc"]]]
    assert graph(edit(read_spec(data, origin="tiny.yaml"), remove=0).spec) == graph(tiny())


@pytest.mark.parametrize("name", [n for n, s in BLOCKS.items() if s.channels is rules.head])
def test_main_inputs_are_those_that_deploying_keeps(name):
    cls = BLOCKS[name].cls
    widths = (8, 16) * len(cls.branch_weights)
    head = (cls(2, [[10, 10], [20, 20]], widths) if cls.anchor_based else cls(2, widths)) if inspect.isclass(cls) else None
    assert isinstance(head, Head)
    head.set_strides((8, 16))
    assert list(cls.main_inputs(len(widths))) == list(head.deploy().inputs)


def test_a_written_file_builds_the_same_network(tmp_path, capsys):
    out = tmp_path / "mine.yaml"
    main(["yolov8.yaml", "--scale", "s", "--nc", "3", "--insert", "EMA@4", "BRA@8(topk=2)", "--replace", "C2f=C2f_SE@6", "--remove", "9",
          "--init", "identity", "--out", str(out)])  # fmt: skip
    assert "EMA inserted behind what was row 4, as row 5" in capsys.readouterr().out
    edited = edit(load_spec("yolov8s", nc=3), insert=["EMA@4", "BRA@8(topk=2)"], replace="C2f=C2f_SE@6", remove=9, init="identity")
    again = load_spec(out)
    assert (again.scale, again.nc) == ("s", 3)
    assert graph(again) == graph(edited.spec)
    assert out.read_text().startswith("# yolov8.yaml, edited")
    assert "yolov8.yaml" in again.origin  # tells the family's recipe
    assert yaml.safe_load(spec_yaml(again))["yaml_file"] == "yolov8.yaml"
    assert main(["yolov8n.yaml", "--insert", "SE@4", "--out", str(tmp_path / "no" / "folder.yaml")]) == 1
    assert "cannot be written" in capsys.readouterr().err
    assert main(["yolov8n.yaml", "--show", "--imgsz", "0"]) == 1
    assert "models.edit: --imgsz 0: a side from 1 to" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_spec_round_trips_through_yaml(path):
    spec = load_spec(path)
    again = read_spec(yaml.safe_load(spec_yaml(spec)), origin=spec.origin)
    assert again == spec or graph(again) == graph(spec)
    assert again.anchors == spec.anchors


def test_the_table_names_rows_shapes_and_readers(capsys):
    main(["yolov8n.yaml", "--insert", "SE@4", "--show", "--imgsz", "128"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["row", "from", "module", "args", "output", "parameters", "readers"]
    assert lines[6].split()[:5] == ["5", "-1", "SE", "[]", "64x16x16"]
    assert lines[6].split()[-2:] == ["6", "15"]
    assert graph_table(build_model("yolov8n"), imgsz=640).splitlines()[10].split()[-4:] == ["256x20x20", "164,608", "10", "20"]


def random_insertion(spec: ModelSpec, seed: int, least_stride: int) -> Edited:
    """One module that needs no arguments, after a row of at least 16 channels and of the given stride."""
    draw = random.Random(seed)
    modules = [n for n, s in BLOCKS.items() if s.channels is rules.same_width]
    shapes = Model(spec).shapes
    wide = [i for i, p in enumerate(plan_layers(spec)) if isinstance(p.out_channels, int) and p.out_channels >= 16]
    rows = [i for i in wide if 256 // shapes[i][-1] >= least_stride]
    return edit(spec, insert=f"{draw.choice(modules)}@{draw.choice(rows)}", init="identity")


def check_that_nothing_changes(name: str, seed: int, least_stride: int) -> None:
    spec = load_spec(name, nc=3)
    before = fill_(Model(spec), 1.35).eval()
    edited = random_insertion(spec, seed, least_stride)
    torch.manual_seed(seed)
    after = Model(edited.spec).eval()
    weights = edited.renamed(before.state_dict())
    assert len(weights) == len(before.state_dict())  # all that was there lands somewhere
    result = after.load_state_dict(weights, strict=False)
    assert not result.unexpected_keys
    (new,) = edited.inserted
    assert all(key.startswith(f"model.{new}.") for key in result.missing_keys)
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        ours, theirs = after(images), before(images)
    for branch, expected in zip(ours.branches, theirs.branches, strict=True):
        for got, want in zip(branch, expected, strict=True):
            assert (got - want).abs().max() <= 1e-5 * want.abs().max(), edited.changes


@pytest.mark.parametrize(("name", "seed"), [
    (n, s) for n, count in (("yolov5s", 3), ("yolov8n", 4), ("yolov9-t", 3), ("yolo11n", 2), ("yolo26n", 2)) for s in range(count)
])  # fmt: skip
def test_a_random_insertion_changes_no_output(name, seed):
    check_that_nothing_changes(name, 100 + seed, least_stride=8)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", NETWORKS)
def test_forty_random_insertions_change_no_output(name, seed):
    check_that_nothing_changes(name, seed, least_stride=4)
