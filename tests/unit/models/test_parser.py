"""The parser: dialects, widths, sources, literals, and one clear line for everything that can be wrong."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import yaml

from models import build_model
from models.spec import channel_rules as rules
from models.spec.config_files import find_config
from models.spec.parser import load_spec, read_spec
from models.spec.planning import plan_layers
from models.spec.registry import BLOCKS, KINDS, load_plugin
from utils.errors import UserError

TINY = {
    "nc": 2,
    "depth_multiple": 1.0,
    "width_multiple": 0.5,
    "anchors": 3,
    "backbone": [[-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [32, 3, 2]], [-1, 1, "Conv", [32, 3, 2]], [-1, 1, "Conv", [64, 3, 2]]],
    "head": [[[2, 3], 1, "DDetect", ["nc"]]],
}


def tiny(**changes):
    return {**copy.deepcopy(TINY), **changes}


def with_row(row, at=3):
    """TINY with one row inserted before row ``at``, later sources moved by one."""
    data = tiny()
    data["backbone"].insert(at, row)
    data["head"] = [[[at, at + 1], 1, "DDetect", ["nc"]]]
    return data


def plans_of(data):
    return plan_layers(read_spec(data, origin="tiny.yaml"))


def complaint(data) -> str:
    with pytest.raises(UserError) as caught:
        build_model(data)
    text = str(caught.value)
    assert "\n" not in text, text
    return text


def test_widths_are_scaled_to_multiples_of_eight():
    assert [p.out_channels for p in plans_of(tiny())] == [8, 16, 16, 32, 0]
    assert [p.out_channels for p in plans_of(tiny(width_multiple=0.6))][:2] == [16, 24]


def test_the_heads_own_output_width_is_not_scaled():
    data = tiny()
    data["backbone"][1][3][0] = 3 * (2 + 5)
    assert plans_of(data)[1].out_channels == 21


def test_v8_dialect_caps_before_scaling_and_reads_the_scale_letter():
    data = tiny(scales={"n": [0.33, 0.25, 1024], "s": [0.33, 0.5, 40]})
    del data["depth_multiple"], data["width_multiple"]
    assert [p.out_channels for p in plans_of(data)][:4] == [8, 8, 8, 16]
    assert [p.out_channels for p in plans_of({**data, "scale": "s"})][:4] == [8, 16, 16, 24]
    assert "no scale 'x'" in complaint({**data, "scale": "x"})


def test_first_scale_of_several_is_announced(caplog):
    only = {"n": [0.33, 0.25, 1024]}
    assert read_spec(tiny(scales=only), origin="mine.yaml").scale == "n"
    assert not caplog.text
    read_spec(tiny(scales={**only, "s": [0.33, 0.5, 1024]}), origin="mine.yaml")
    assert "mine.yaml" in caplog.text
    assert ": n" in caplog.text


def test_repeats_are_scaled_and_stacks_keep_them_inside():
    data = tiny(depth_multiple=0.34)
    data["backbone"][1] = [-1, 9, "Conv", [32, 3, 1]]
    plan = plans_of(data)[1]
    assert plan.repeats == 3
    assert plan.args[:2] == (8, 16)
    assert plan.repeat_args[:2] == (16, 16)


def test_sources_are_absolute():
    assert [p.sources for p in plans_of(tiny())] == [(-1,), (0,), (1,), (2,), (2, 3)]


@pytest.mark.parametrize(("source", "word"), [(7, "not before"), (3, "not before"), (-9, "before the first"), ([2, 9], "not before")])
def test_sources_out_of_range_and_cycles_are_refused(source, word):
    data = tiny()
    data["backbone"][3][0] = source
    text = complaint(data)
    assert "row 3" in text
    assert word in text


def test_unknown_module_names_the_nearest():
    data = tiny()
    data["backbone"][1][2] = "Convv"
    text = complaint(data)
    assert "row 1" in text
    assert "'Conv'" in text


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([-1, 1, "Conv"], ["row 1", "[from, number, module, args]"]),
        (["x", 1, "Conv", [8]], ["row 1", "from"]),
        ([-1, 0, "Conv", [8]], ["row 1", "number"]),
        ([-1, 1, 5, [8]], ["row 1", "module"]),
        ([-1, 1, "Conv", 8], ["row 1", "args"]),
        ([-1, 1, "Conv", []], ["row 1", "width"]),
        ([-1, 1, "Conv", ["wide"]], ["row 1", "'wide'"]),
        ([-1, 1, "Conv", [8, 3, 2, {"strid": 2}]], ["row 1", "strid"]),
        ([-1, 1, "Conv", [8, 3, 2, None, 1, 1, True, 5]], ["row 1", "too many"]),
    ],
)
def test_malformed_rows_are_refused(row, words):
    data = tiny()
    data["backbone"][1] = row
    text = complaint(data)
    for word in words:
        assert word in text


@pytest.mark.parametrize("text", ["__import__('os').system('true')", "lambda: 1", "nn.Sequential(nn.Linear(1,1))", "nn.__class__"])
def test_text_in_yaml_is_never_executed(text):
    data = tiny()
    data["backbone"][1][3] = [32, 3, 2, None, 1, 1, text]
    assert "row 1" in complaint(data)


def test_activation_text_builds_a_module():
    data = tiny()
    data["backbone"][1][3] = [32, 3, 2, None, 1, 1, "nn.LeakyReLU(0.1)"]
    act = build_model(data).model[1].act
    assert type(act).__name__ == "LeakyReLU"
    assert act.negative_slope == 0.1


def test_activation_of_a_file_holds_for_its_network_only():
    relu = build_model(tiny(activation="nn.ReLU()"))
    later = build_model(tiny())
    kinds = [{type(m.act).__name__ for m in net.modules() if hasattr(m, "act")} for net in (relu, later)]
    assert kinds == [{"ReLU"}, {"SiLU"}]


@pytest.mark.parametrize("first", [8, 16])  # as written before scaling, and after
def test_a_leading_integer_is_the_width_when_it_fits(first):
    assert plans_of(with_row([-1, 1, "FocalModulation", [first * 2]]))[3].args == (16,)


def test_a_wrong_width_names_both():
    text = complaint(with_row([-1, 1, "FocalModulation", [300]]))
    for word in ("row 3", "300", "152", "16"):
        assert word in text


def test_options_go_by_name():
    plan = plans_of(with_row([-1, 1, "FocalModulation", [{"focal_level": 3}]]))[3]
    assert plan.args == (16,)
    assert plan.kwargs == {"focal_level": 3}
    assert "focal_levels" in complaint(with_row([-1, 1, "FocalModulation", [{"focal_levels": 3}]]))


def test_identity_start_is_an_exact_no_op():
    import torch

    model = build_model(with_row([-1, 1, "FocalModulation", [{"init": "identity"}]])).eval()
    x = torch.randn(1, 16, 9, 7)
    assert torch.equal(model.model[3](x), x)
    assert "init" in complaint(with_row([-1, 1, "FocalModulation", [{"init": "zero"}]]))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"nc": 0}, "nc"),
        ({"nc": "two"}, "nc"),
        ({"width_multiple": -1}, "width_multiple"),
        ({"anchors": "many"}, "anchors"),
        ({"anchors": [[1, 2], [3]]}, "anchors"),
        ({"widthmultiple": 1}, "width_multiple"),
        ({"backbone": "Conv"}, "backbone"),
        ({"backbone": [], "head": []}, "rows"),
        ({"head": []}, "head"),
        ({"scales": {}}, "scales"),
        ({"scales": {"n": [1, 2]}}, "scale n"),
    ],
)
def test_unknown_keys_are_refused(changes, word):
    assert word in complaint(tiny(**changes))


def test_configs_are_found_by_bare_name_and_by_last_part():
    bare, _ = find_config("yolov9-c.yaml")
    assert find_config("models/detect/yolov9-c.yaml")[0] == bare
    assert find_config("yolov9-c")[0] == bare
    assert find_config("cfg/deploy/yolov7.yaml")[0].name == "yolov7-deploy.yaml"
    assert find_config("cfg/training/yolov7.yaml")[0].name == "yolov7.yaml"


def test_missing_config_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'yolov9-c'"):
        find_config("yolov9-cc.yaml")
    with pytest.raises(UserError) as caught:
        find_config("nothing-like-it.yaml")
    assert "did you mean" not in str(caught.value)


def test_two_files_of_one_name_are_both_listed(tmp_path, monkeypatch):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.yaml").write_text("nc: 1")
    monkeypatch.setattr("models.spec.config_files.CONFIGS", tmp_path)
    with pytest.raises(UserError) as caught:
        find_config("same.yaml")
    assert all(f"{folder}/same.yaml" in str(caught.value) for folder in "ab")


def test_path_with_a_scale_letter_is_found(tmp_path):
    data = tiny(scales={"n": [0.33, 0.25, 1024], "s": [0.33, 0.5, 1024]})
    (tmp_path / "mine8.yaml").write_text(yaml.safe_dump(data))
    assert load_spec(tmp_path / "mine8s.yaml").width == 0.5


def test_not_yaml_is_one_line(tmp_path):
    (tmp_path / "broken.yaml").write_text("nc: [1, 2\nhead: }")
    with pytest.raises(UserError, match=r"broken\.yaml: not valid YAML"):
        load_spec(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UserError, match=r"list\.yaml"):
        load_spec(tmp_path / "list.yaml")


def test_spec_round_trips():
    for data in (tiny(), tiny(anchors=[[1, 2, 3, 4]] * 2, activation="nn.ReLU()"), tiny(scales={"n": [0.33, 0.25, 1024]}, scale="n")):
        spec = read_spec(data, origin="a.yaml")
        again = read_spec(yaml.safe_load(yaml.safe_dump(spec.to_dict())), origin="a.yaml")
        assert again.to_dict() == spec.to_dict()
        assert again.rows == spec.rows or [tuple(r.args) for r in again.rows] == [tuple(r.args) for r in spec.rows]


def test_registry_resolves_aliases_to_one_block():
    assert BLOCKS["FocalModulationBlock"].cls is BLOCKS["FocalNetBlock"].cls
    assert "FocalModulation" in BLOCKS
    assert BLOCKS["FocalModulation"].cls.__name__ == "FocalModulation"


def test_a_taken_name_is_refused():
    from models.spec import channel_rules as rules
    from models.spec.registry import register

    with pytest.raises(UserError, match="Conv"):
        register("Conv", channels=rules.out_width)(type("Mine", (), {}))


PLUGIN = """
from torch import nn
from models.spec import channel_rules as rules
from models.spec.registry import register

@register("Doubled_{tag}", channels=rules.same_width)
class Doubled(nn.Module):
    def __init__(self, channels, factor=2):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor
"""


def test_a_plugin_adds_a_module(tmp_path):
    (tmp_path / "mine.py").write_text(PLUGIN.format(tag="a"))
    model = build_model(with_row([-1, 1, "Doubled_a", [3]]), plugins=[tmp_path / "mine.py"])
    assert model.model[3].factor == 3
    assert build_model(with_row([-1, 1, "Doubled_a", []]), plugins=[tmp_path / "mine.py"]).model[3].factor == 2


def test_plugins_of_one_name_in_different_folders_are_separate_modules(tmp_path):
    paths = [tmp_path / folder / "mine.py" for folder in ("one", "two")]
    for path, tag in zip(paths, ("one", "two")):
        path.parent.mkdir()
        path.write_text(PLUGIN.format(tag=tag))
    classes = [type(build_model(with_row([-1, 1, f"Doubled_{tag}", []]), plugins=paths).model[3]) for tag in ("one", "two")]
    assert classes[0].__module__ != classes[1].__module__
    assert all(sys.modules[c.__module__].Doubled is c for c in classes)


@pytest.mark.parametrize(
    ("text", "word"), [("raise OSError('no')", "OSError"), ("def (", "line 1: invalid syntax"), (None, "no such file")]
)
def test_a_bad_plugin_is_one_line(tmp_path, text, word):
    path = tmp_path / "bad.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=word) as caught:
        build_model(tiny(), plugins=[path])
    assert "bad.py" in str(caught.value)


@pytest.mark.parametrize(("old", "new"), rules.FORMER_NAMES.items())
@pytest.mark.parametrize("importing", ["models", "models.spec"])
def test_plugin_with_a_renamed_rule_names_the_new_rule(tmp_path, old, new, importing):
    path = tmp_path / "older.py"
    path.write_text(
        PLUGIN.format(tag="old").replace("rules.same_width", f"rules.{old}").replace("from models.spec import", f"from {importing} import")
    )
    with pytest.raises(UserError) as caught:
        load_plugin(path)
    assert str(caught.value) == f"--plugins {path}: line 6: channel rule {old!r} is now called {new!r}: write rules.{new}"
    assert callable(getattr(rules, new))
    path.write_text(f"from {importing}.channel_rules import {old}")
    with pytest.raises(UserError, match=f"older.py: .* write rules.{new}$"):
        load_plugin(path)


def test_plugins_can_import_from_the_former_modules(tmp_path):
    text = (
        PLUGIN.format(tag="former")
        .replace("from models.spec import", "from models import")
        .replace("models.spec.registry", "models.registry")
    )
    (tmp_path / "mine.py").write_text(text)
    load_plugin(tmp_path / "mine.py")
    assert BLOCKS["Doubled_former"].channels is rules.same_width
    assert not hasattr(rules, "no_such_rule")


def test_the_kind_is_that_of_the_registration(tmp_path):
    (tmp_path / "mine.py").write_text(
        PLUGIN.format(tag="k1").replace("same_width)", 'same_width, kind="neck")')
        + PLUGIN.format(tag="k2")
        + PLUGIN.format(tag="k3").replace("same_width", "out_width")
    )
    load_plugin(tmp_path / "mine.py")
    assert [BLOCKS[f"Doubled_k{i}"].kind for i in (1, 2, 3)] == ["neck", "attention", "block"]
    assert not BLOCKS["Doubled_k1"].built_in
    (tmp_path / "wrong.py").write_text(PLUGIN.format(tag="k4").replace("same_width)", 'same_width, kind="atention")'))
    with pytest.raises(UserError, match=r"wrong.py: line 6: block 'Doubled_k4': unknown kind 'atention'; did you mean 'attention'\?"):
        load_plugin(tmp_path / "wrong.py")
    assert {spec.kind for spec in BLOCKS.values() if spec.built_in} == set(KINDS)


def test_rule_with_a_wrong_output_width_is_named(tmp_path):
    (tmp_path / "wide.py").write_text(PLUGIN.format(tag="b").replace("return x * self.factor", "return x.repeat(1, 2, 1, 1)"))
    with pytest.raises(UserError, match=r"row 3 \[Doubled_b\]: gives 32 channels"):
        build_model(with_row([-1, 1, "Doubled_b", []]), plugins=[tmp_path / "wide.py"])


def test_anchor_based_head_without_anchors_is_refused():
    without = {k: v for k, v in tiny(head=[[[2, 3], 1, "Detect", ["nc", "anchors"]]]).items() if k != "anchors"}
    text = complaint(without)
    assert "row 4 [Detect]" in text
    assert "no anchors: key" in text
    assert "needs anchors" in complaint(tiny(head=[[[2, 3], 1, "IDetect", ["nc"]]]))
    assert "at least 1" in complaint(tiny(anchors=0))


@pytest.mark.parametrize(("head", "branches"), [("Detect", 1), ("IDetect", 1), ("IAuxDetect", 2)])
@pytest.mark.parametrize("args", [["nc", "anchors"], ["nc", 2]])
def test_anchors_may_be_counted_instead_of_listed(head, branches, args):
    """``anchors: 2``: the head begins with sizes made from its strides; the spec says so again when it is read back."""
    model = build_model(tiny(anchors=2, head=[[[2, 3] * branches, 1, head, args]]), nc=5)
    wanted = [[[3.0, 3.0], [3.0, 6.0]]] * 2  # strides: 3² and (3 √2)², the second half as wide as high
    torch.testing.assert_close(model.head.anchors, torch.tensor(wanted))
    assert model.head.only_counted
    again = build_model(model.spec.to_dict())
    assert torch.equal(again.head.anchors, model.head.anchors)


BEFORE = "nc: 3\nbackbone:\n  - [-1, 1, Conv, [16, 3, 2]]\n  - [-1, 1, Conv, [32, 3, 2]]\nhead:\n  - [[0, 1], 1, Detect, [nc]]\n"


@pytest.mark.parametrize("row", ["-1, 1, Conv, [32, 3, 2]", "-1, 1, EMA, []", "[1, -1], 1, Concat, [1]", "-1, 1, nn.Upsample, [None, 2]"])
def test_a_row_that_reads_the_head_is_told_so(tmp_path, row):
    path = tmp_path / "behind.yaml"
    path.write_text(f"{BEFORE}  - [{row}]\n")
    with pytest.raises(UserError, match=r"behind\.yaml: row 3 \[.*\]: reads row 2, the head, .* should be the last row"):
        plan_layers(load_spec(path))


SPELLINGS = {
    "ECAAttention": "ECA", "SKAttention": "SK", "NAMAttention": "NAM", "GAM_Attention": "GAM", "LSKblock": "LSK", "MSCAAttention": "MSCA",
    "deformable_LKA": "DeformableLKA", "EMAttention": "EMA", "MultiDilatelocalAttention": "MSDA", "SE_Block": "SE", "CBAMBlock": "CBAM",
    "C3SE": "C3_SE", "C2fCBAM": "C2f_CBAM", "C2f-EMA": "C2f_EMA", "C2f_GAM_Attention": "C2f_GAM",
}  # fmt: skip


@pytest.mark.parametrize(("written", "meant"), SPELLINGS.items())
def test_spellings_of_other_projects_mean_our_modules(written, meant):
    found, own = BLOCKS[written], BLOCKS[meant]
    assert (getattr(found.cls, "inner", found.cls), found.channels) == (getattr(own.cls, "inner", own.cls), own.channels)
    assert getattr(found.cls, "outer", None) == getattr(own.cls, "outer", None)


SWAPS = (("C2f_EAM", "C2f_EMA"), ("CMBA", "CBAM"), ("BCAM", "CBAM"), ("Cf2", "C2f"), ("Conact", "Concat"))


@pytest.mark.parametrize(("written", "meant"), SWAPS)
def test_a_permuted_word_is_guessed_before_a_similar_one(written, meant):
    with pytest.raises(KeyError, match=f"did you mean '{meant}'"):
        BLOCKS[written]


def test_a_name_without_a_word_of_its_own_is_no_spelling():
    for name in ("", "Attention", "Block", "_", "C2f_", "C2f_Module", "Zzz_Attention"):
        assert name not in BLOCKS
