"""Learning rates by part: every trainable parameter once, times the factor of the part it belongs to."""

from __future__ import annotations

import pytest

from engine.training.learning_rates import multipliers, rates_line
from engine.training.optim import apply_settings, build_optimizer, learning_rates, parameter_groups
from engine.training.schedule import StepSettings
from models import build_model
from tests.tiny import tiny_cfg
from utils.config import Hyperparameters, TrainConfig
from utils.errors import UserError
from utils.lr_multipliers import format_lr_multipliers, parse_lr_multipliers


@pytest.fixture
def model():
    """Rows 0-6 backbone, 7 FocalModulation, 8 an inserted SE, 9 a neck row, 10 the head; row 2 has EMA inside."""
    cfg = tiny_cfg()
    cfg["backbone"][2] = [-1, 1, "RepNCSPELAN4_EMA", [16, 16, 8, 1]]
    cfg["head"] = [[-1, 1, "Conv", [32]], [[3, 4, 8], 1, "DDetect", ["nc"]]]
    return build_model(cfg, nc=2, attention="SE@7", attention_init="identity")


def parts_at(model, text: str) -> dict[float, set[str]]:
    found: dict[float, set[str]] = {}
    for name, factor in multipliers(model, text).items():
        found.setdefault(factor, set()).add(name)
    return found


def test_parts_are_rows_of_the_network(model):
    found = parts_at(model, "attention=2,backbone=0.1,neck=3,head=4")
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    inside = {n for n in names if n.startswith("model.2.") and ".attention." in n}
    assert inside
    assert found[2] == {n for n in names if n.startswith(("model.7.", "model.8."))} | inside
    assert "model.8.gamma" in found[2]
    assert found[0.1] == {n for n in names if int(n.split(".")[1]) < 7} - inside
    assert found[3] == {n for n in names if n.startswith("model.9.")}
    assert found[4] == {n for n in names if n.startswith("model.10.")}


def test_rows_take_precedence_over_parts(model):
    found = multipliers(model, "7=5,attention=2,0-1=0.5,backbone=0.1")
    assert {factor for name, factor in found.items() if name.startswith("model.7.")} == {5.0}
    assert {factor for name, factor in found.items() if name.startswith(("model.0.", "model.1."))} == {0.5}
    assert found["model.8.gamma"] == 2.0
    assert not any(name.startswith(("model.9.", "model.10.")) for name in found)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "LION"])
def test_every_trainable_parameter_is_in_one_group_and_gets_its_rate(model, name):
    model.model[0].requires_grad_(False)
    factors = multipliers(model, "attention=2,backbone=0.1")
    hyp = Hyperparameters(weight_decay=0.001)
    optimizer = build_optimizer(model, hyp, name=name, batch_size=16, accumulate=4, multipliers=factors)
    apply_settings(optimizer, StepSettings(lr_bias=0.3, lr=0.2, momentum=0.1, accumulate=1))
    assert learning_rates(optimizer) == (0.3, 0.2, 0.2)
    by_id = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(by_id)
    assert by_id.keys() == {id(p) for p in model.parameters() if p.requires_grad}
    kinds = {id(p): kind for kind, parameters in parameter_groups(model).items() for p in parameters}
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = by_id[id(parameter)]
            assert group["name"] == kinds[id(parameter)]
            assert group["weight_decay"] == (0.001 if group["name"] == "decay" else 0.0)
            assert group["lr"] == pytest.approx((0.3 if group["name"] == "bias" else 0.2) * factors.get(parameter_name, 1.0))


def test_the_three_groups_stay_first_even_if_everything_is_multiplied(model):
    factors = multipliers(model, "0-10=0.5")
    optimizer = build_optimizer(model, Hyperparameters(), batch_size=16, accumulate=4, multipliers=factors)
    assert [(g["name"], len(g["params"]) > 0) for g in optimizer.param_groups] == [
        ("bias", False), ("decay", False), ("no_decay", False), ("bias", True), ("decay", True), ("no_decay", True),
    ]  # fmt: skip
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    apply_settings(optimizer, StepSettings(lr_bias=0.3, lr=0.2, momentum=0.1, accumulate=1))
    optimizer.step()
    assert learning_rates(optimizer) == (0.3, 0.2, 0.2)


def test_state_loads_only_into_an_optimizer_with_equal_parts(model):
    given = {"batch_size": 16, "accumulate": 4, "multipliers": multipliers(model, "attention=2")}
    state = build_optimizer(model, Hyperparameters(), **given).state_dict()
    again = build_optimizer(model, Hyperparameters(), **given)
    again.load_state_dict(state)
    assert [g["lr_mult"] for g in again.param_groups] == [1.0] * 3 + [2.0] * (len(again.param_groups) - 3)
    with pytest.raises(ValueError, match="param"):
        build_optimizer(model, Hyperparameters(), batch_size=16, accumulate=4).load_state_dict(state)


def test_recipe_reports_the_multipliers(model):
    inside = sum(1 for n, _ in model.named_parameters() if n.startswith(("model.7.", "model.8.")) or ".attention." in n)
    rest = sum(p.requires_grad for p in model.parameters()) - inside
    assert rates_line(model, "attention=2") == f"attention x 2 ({inside} tensors), x 1 ({rest} tensors)"


def test_text_and_mapping_forms_are_equal():
    assert format_lr_multipliers({"attention": 2, 10: 0.5}) == "attention=2,10=0.5"
    assert TrainConfig(cfg="a.yaml", lr_mult={"head": 3}) == TrainConfig(cfg="a.yaml", lr_mult="head = 3")
    assert parse_lr_multipliers("attention=2,0-9=1e-1") == {"attention": 2.0, "0-9": 0.1}
    assert format_lr_multipliers(None) == ""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("attention", "should be PART=FACTOR"),
        ("atention=2", "did you mean 'attention'?"),
        ("tail=2", "rows such as 0-9"),
        ("head=0", "--freeze"),
        ("head=x", "above 0"),
        ("head=nan", "above 0"),
        ("head=1,head=2", "given twice"),
        ("5-4=2", "'5-4' is no part"),
    ],
)
def test_wrong_text_is_refused(text, says):
    with pytest.raises(UserError, match=says):
        TrainConfig(lr_mult=text)


def test_unknown_parts_are_refused(model):
    with pytest.raises(UserError, match="row 11 is not there"):
        multipliers(model, "8-11=2")
    with pytest.raises(UserError, match=r"attention: nothing that is trained"):
        multipliers(build_model(tiny_cfg(attention=("Conv", [32]))), "attention=2")
