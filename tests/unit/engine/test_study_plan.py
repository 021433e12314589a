"""From a study file to variants: every combination, controls, and errors that name file and key."""

from __future__ import annotations

import json

import pytest
import torch

from engine.study.cost import count_costs, median_and_range
from engine.study.diff import difference, write_differences
from engine.study.folder import jobs_of, write_variants
from engine.study.plan import make_plans
from engine.study.processes import arguments
from models.analysis.comparison import counted_gflops
from models.build import build_model
from tests.tiny_training import make_world
from utils.cli.study_arguments import parse_arguments
from utils.cli.train_arguments import parse_arguments as train_arguments
from utils.errors import UserError
from utils.hyperparameters import Hyperparameters


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def plan_of(world, tmp_path):
    """A function from the text of a study file, and flags, to its plans."""

    def make(text: str, *flags: str):
        path = tmp_path / "s.yaml"
        path.write_text(text.replace("TINY", str(world / "tiny-v9.yaml")).replace("DATA", str(world / "data.yaml")))
        return make_plans(parse_arguments([str(path), "--project", str(tmp_path), *flags]))

    return make


def names(plans) -> list[str]:
    return [v.name for v in plans[0].variants]


def test_every_combination_is_a_variant(plan_of):
    text = "cfg: TINY\ndata: DATA\nattention: [none, SE@3, [SE@3, ECA@2]]\nhyp_change: {iou_loss: [CIoU, SIoU], box: 5}\nimgsz: [64, 96]\n"
    plans = plan_of(text)
    assert len(names(plans)) == len(set(names(plans))) == 12
    assert names(plans)[0] == plans[0].baseline == "none, iou_loss=CIoU box=5, 64 px"
    last = plans[0].variants[-1]
    assert last.name == "SE@3+ECA@2, iou_loss=SIoU box=5, 96 px"
    assert last.variant.attention == ("SE@3", "ECA@2")
    assert (last.hyp.iou_loss, last.hyp.box, last.variant.imgsz) == ("SIoU", 5.0, 96)
    assert [row.module for row in last.spec.rows[3:6]] == ["ECA", "Conv", "SE"]
    assert plans[0].variants[0].hyp.iou_loss == "CIoU"


def test_the_metric_is_named_as_users_name_it(plan_of):
    assert plan_of("cfg: TINY\ndata: DATA\nmetric: mAP50-95\n")[0].config.metric == "metrics/mAP_0.5:0.95"


def test_named_variants_join_and_take_the_rest_from_the_base(plan_of):
    text = """
cfg: TINY
data: DATA
attention_init: identity
control: params
variants:
  wide: {imgsz: 96}
  loss: {hyp_change: {iou_loss: SIoU}, attention: MHSA@3}
"""
    plan = plan_of(text)[0]
    assert names([plan]) == ["baseline", "wide", "loss", "loss control"]
    control = plan.variants[-1]
    assert control.variant.control_of == ("loss",)
    assert control.hyp.iou_loss == "SIoU"
    assert control.spec.rows[4].module == "ConvControl"
    assert control.spec.rows[4].args[-1]["init"] == "identity"
    assert plan.variants[2].spec.rows[4].args == ({"init": "identity"},)


def test_control_of_the_same_network_is_trained_once(plan_of):
    plan = plan_of("cfg: TINY\ndata: DATA\ncontrol: params\nattention: [none, MHSA@3, MHSA@3(heads=2), ECA@3]\n")[0]
    assert names([plan]) == ["none", "MHSA@3", "MHSA@3 control", "MHSA@3(heads=2)", "ECA@3"]
    assert plan.variants[2].variant.control_of == ("MHSA@3", "MHSA@3(heads=2)")
    assert any("MHSA@3 control is the control of MHSA@3(heads=2) too" in note for note in plan.notes)
    assert any("ECA@3 adds 3 parameters" in note for note in plan.notes)


def test_flags_take_the_place_of_keys_and_each_data_set_is_a_study(plan_of, world):
    other = world / "other.yaml"
    other.write_text((world / "data.yaml").read_text())
    plans = plan_of("cfg: TINY\ndata: DATA\nepochs: 7\nseeds: [4]\n", "--data", str(world / "data.yaml"), str(other), "--epochs", "3")
    assert [plan.folder.name for plan in plans] == ["data", "other"]
    assert [plan.folder.parent.name for plan in plans] == ["s", "s"]
    assert [(job.seed, job.epochs, job.flags["data"]) for plan in plans for job in jobs_of(plan)] == [
        (4, 3, str(world / "data.yaml")), (4, 3, str(other))
    ]  # fmt: skip


def test_all_runs_of_a_study_get_the_same_flags_apart_from_variant_and_seed(plan_of):
    plan = plan_of("cfg: TINY\ndata: DATA\nattention: [none, SE@3]\nseeds: [0, 5]\ntrain: {optimizer: AdamW, cos_lr: true}\n")[0]
    differing = {"cfg", "hyp", "seed", "name"}
    kept = [{k: v for k, v in job.flags.items() if k not in differing} for job in jobs_of(plan)]
    assert all(flags == kept[0] for flags in kept)
    assert [job.seed for job in jobs_of(plan)] == [0, 5, 0, 5]
    assert all(job.recipe == jobs_of(plan)[0].recipe for job in jobs_of(plan))


def test_runs_know_the_content_of_the_weights_that_they_start_from(plan_of, tmp_path):
    start, backbone = tmp_path / "start.pt", tmp_path / "backbone.pt"
    torch.save({"model.0.conv.weight": torch.zeros(8, 3, 3, 3)}, start)
    backbone.write_bytes(b"not read before it is trained")
    text = f"cfg: TINY\ndata: DATA\nweights: [none, {start}]\nseeds: [0]\ntrain: {{backbone_weights: {backbone}}}\n"
    before, after = [], []
    for found in (before, after):
        found += [job.files for job in jobs_of(plan_of(text)[0])]
        torch.save({"model.0.conv.weight": torch.ones(8, 3, 3, 3)}, start)
    assert [sorted(files.values()) for files in before] == [[str(backbone)], [str(backbone), str(start)]]
    assert before[0] == after[0]
    assert before[1].keys() & after[1].keys() == before[0].keys()


def test_written_network_and_flags_are_read_back_by_training(plan_of):
    plan = plan_of("cfg: TINY\ndata: DATA\nattention: [none, 'SE@3(reduction=4)']\ntrain: {optimizer: AdamW, cos_lr: true}\n")[0]
    write_variants(plan)
    job = jobs_of(plan)[-1]
    config = train_arguments(arguments({**job.flags, "device": "cpu"}))
    assert (config.optimizer, config.cos_lr, config.seed, config.device, config.exist_ok) == ("AdamW", True, 2, "cpu", True)
    assert build_model(config.cfg).spec.rows == plan.variants[1].spec.rows
    assert Hyperparameters.from_yaml(config.hyp).to_dict() == job.recipe


def test_differences_are_rows_cost_and_recipe(plan_of, tmp_path):
    text = "cfg: TINY\ndata: DATA\nvariants: {se: {attention: SE@3, hyp_change: {box: 5}, imgsz: 96}, same: {}}\n"
    plan = plan_of(text)[0]
    costs = count_costs(tmp_path, plan.variants)
    found = [difference(plan.variants[0], other, costs) for other in plan.variants[1:]]
    assert found[0].rows == ("+ row 4: SE []",)
    assert found[0].hyp == {"box": (plan.variants[0].hyp.box, 5.0)}
    assert found[0].other == {"imgsz": (640, 96)}
    assert found[0].parameters[1] - found[0].parameters[0] == 32
    assert (found[1].rows, found[1].hyp, found[1].other) == ((), {}, {})
    write_differences(tmp_path, found)
    assert json.loads((tmp_path / "diff.json").read_text())[0]["variant"] == "se"
    assert "+ row 4: SE []" in (tmp_path / "diff.md").read_text()


def test_costs_count_attention_once_and_are_kept(plan_of, tmp_path, monkeypatch):
    plan = plan_of("cfg: TINY\ndata: DATA\nimgsz: [64]\nattention: [none, MHSA@3]\n")[0]
    costs = count_costs(tmp_path, plan.variants)
    plain, attention = costs["none"], costs["MHSA@3"]
    assert plain.gflops == pytest.approx(plain.customary_gflops, rel=1e-9)  # nothing but convolutions
    tokens, channels = 64, 16
    products = 2e-9 * 2 * tokens**2 * channels  # of q kᵀ and the weights with v
    assert attention.gflops - attention.customary_gflops == pytest.approx(products, rel=1e-6)
    monkeypatch.setattr("engine.study.cost._counted", None)
    assert count_costs(tmp_path, plan.variants) == costs


def test_customary_gflops_of_yolov8n_are_the_published_ones():
    model = build_model("yolov8n.yaml").deploy()
    images = torch.zeros(1, 3, 64, 64)
    gflops, customary = counted_gflops(model, images)
    assert customary == gflops
    assert gflops * 100 == pytest.approx(8.7, abs=0.05)  # at 640 px


@pytest.mark.parametrize(("values", "expected"), [([], None), ([3.0], (3.0, 0.0)), ([1.0, 2.0, 3.0, 4.0, 5.0], (3.0, 2.0))])
def test_latency_is_median_and_interquartile_range(values, expected):
    middle, spread = median_and_range(values)
    assert (middle != middle and spread == 0.0) if expected is None else (middle, spread) == expected


WRONG = [
    ("cgf: TINY", "s.yaml: unknown key 'cgf'; did you mean 'cfg'"),
    ("cfg: TINY\nseeds: 5", "s.yaml: seeds: a list such as [0, 1, 2] is expected, not 5"),
    ("cfg: TINY\nseeds: [1, 1]", "s.yaml: seeds 1 1: 1 is given twice"),
    ("cfg: TINY\nepochs: 0", "s.yaml: epochs 0: a whole number of at least 1 is needed"),
    ("cfg: TINY\ncontrol: parms", "s.yaml: control 'parms': one of params, flops is needed"),
    ("cfg: TINY\nattention: [EAM@3]", "s.yaml: variant 'tiny-v9': tiny-v9.yaml: EAM@3: unknown module 'EAM', did you mean 'EMA'?"),
    ("cfg: TINY\nattention: [none, SE@33]", "s.yaml: variant 'SE@33': tiny-v9.yaml: SE@33: tiny-v9.yaml has 6 rows"),
    ("cfg: TINY\nattention: [SE@3, SE@3]", "s.yaml: attention: 'SE@3' is given twice"),
    ("cfg: TINY\nhyp_change: {iou_los: SIoU}", "s.yaml: hyp_change: hyper-parameters: unknown hyper-parameter 'iou_los', did you mean"),
    ("cfg: TINY\nhyp_change: [SIoU]", "s.yaml: hyp_change: a mapping is expected, not ['SIoU']"),
    ("cfg: TINY\nbaseline: nono", "s.yaml: baseline 'nono' is no variant"),
    ("cfg: TINY\nmetric: mAP", "s.yaml: metric 'mAP' is no column of results.csv"),
    ("cfg: TINY\ntrain: {optimiser: SGD}", "s.yaml: train.optimiser: train.py has no such flag; did you mean 'optimizer'"),
    ("cfg: TINY\ntrain: {seed: 3}", "s.yaml: train.seed: the study decides it"),
    ("cfg: TINY\ntrain: {optimizer: SGDD}", "s.yaml: train: --optimizer 'SGDD'"),
    ("cfg: TINY\nvariants: {a: SE@3}", "s.yaml: variants.a: a mapping of keys such as attention is expected, not 'SE@3'"),
    ("cfg: TINY\nvariants: {a: {atention: SE@3}}", "s.yaml: variants.a: unknown key 'atention'; did you mean 'attention'?"),
    ("cfg: TINY\nvariants: {a: {imgsz: 3}}", "s.yaml: variants.a: --imgsz 3"),
    ("cfg: TINY\nvariants: {a: {attention: 3}}", "s.yaml: variants.a: attention: texts such as SE@9 are expected, not 3"),
    ("cfg: TINY\nvariants: {baseline: {imgsz: 64}}", "variants.baseline: the network without the changes of variants has this name"),
    ("cfg: TINY\nearly_stop: {after: [3]}\ntrain: {noval: true}", "s.yaml: early_stop needs the metrics and the save of every epoch"),
    ("attention: [none]", "s.yaml: cfg: give a model YAML, such as yolov8n.yaml, or weights"),
    ("cfg: nothing-here.yaml", "nothing-here.yaml"),
]


@pytest.mark.parametrize(("text", "message"), WRONG, ids=[text.replace("\n", " ") for text, _ in WRONG])
def test_errors_name_file_and_key(plan_of, text, message):
    with pytest.raises(UserError) as error:
        plan_of(text + "\ndata: DATA\n")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_command_line_asks_for_the_same_as_a_file(world, tmp_path):
    flags = ["--cfg", str(world / "tiny-v9.yaml"), "--data", str(world / "data.yaml"), "--attention", "none", "SE@3"]
    flags += ["--seeds", "0", "1", "--hyp-change", "iou_loss=CIoU,SIoU", "--train", "optimizer=AdamW", "cos-lr=true"]
    flags += ["--name", "x", "--project", str(tmp_path)]
    (plan,) = make_plans(parse_arguments(flags))
    assert names([plan]) == ["none, iou_loss=CIoU", "SE@3, iou_loss=CIoU", "none, iou_loss=SIoU", "SE@3, iou_loss=SIoU"]
    assert plan.train == {"optimizer": "AdamW", "cos_lr": True}
    assert plan.folder == tmp_path / "x"
    with pytest.raises(UserError, match="--hyp-change 'iou_loss': KEY=VALUE is expected"):
        parse_arguments(["--hyp-change", "iou_loss"])
    with pytest.raises(UserError, match="--resume: not needed"):
        parse_arguments(["--resume"])
