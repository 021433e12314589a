"""The variant YAMLs of the shelf: the network is the base network with one row more, at every scale; whole necks and backbones plan."""

from __future__ import annotations

from pathlib import Path

import pytest

import models
from models.spec.parser import load_spec
from models.spec.planning import plan_layers

CONFIGS = Path(models.__file__).parent / "configs"
FOLDER = CONFIGS / "attention"
# modules that stand in a row of their own, in YOLOv8 and in YOLOv9-t
MODULES = [
    "A2Attention", "A2C2f", "ACmix", "AIFI", "AreaAttention", "AxialAttention", "BAM", "CAA", "CBAM", "CPCA", "CoTAttention",
    "CoordAttention", "CrissCrossAttention", "DANet", "DAttention", "DLKA", "DilateBlock", "ECA", "ELA", "EMA", "EffectiveSE",
    "ExternalAttention", "GAM", "GC", "GE", "LKA", "LSKA", "LSKBlock", "MLCA", "MSCA", "MSCANBlock", "MSDA", "MobileViTAttention",
    "NAM", "PSA", "ParNetAttention", "ParallelPolarizedSelfAttention", "S2Attention", "SE", "SGE", "SK", "SOCA",
    "SequentialPolarizedSelfAttention", "ShuffleAttention", "SimAM", "SwinBlock", "TripletAttention", "iRMB",
]  # fmt: skip
ROW = 9  # of the module, in both families


def rows(path: Path) -> list[tuple]:
    return [(p.name, p.sources, p.args[1:] if p.out_channels else p.args, p.out_channels) for p in plan_layers(load_spec(path))]


def without(row: int, plans: list[tuple]) -> list[tuple]:
    """The rows without one of one input and output: its readers read what it read."""
    (before,) = plans[row][1]

    def moved(source: int) -> int:
        source = before if source == row else source
        return source - (source > row)

    return [(name, tuple(moved(s) for s in sources), args, out) for i, (name, sources, args, out) in enumerate(plans) if i != row]


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(("family", "base"), [("yolov8", "v8/yolov8"), ("yolov9-t", "v9/yolov9-t")])
def test_variant_is_its_base_with_one_inserted_row(module, family, base):
    variant = rows(FOLDER / f"{family}-{module}.yaml")
    assert variant[ROW][1] == (ROW - 1,)
    assert without(ROW, variant) == rows(CONFIGS / f"{base}.yaml")


@pytest.mark.parametrize("name", ["FasterNet", "ShuffleNetV2", "EfficientRep", "VanillaNet", "AFPN", "BiFPN"])
def test_backbones_and_necks_feed_three_levels(name):
    *_, head = plan_layers(load_spec(FOLDER / f"yolov8-{name}.yaml"))
    assert head.name == "Detect"
    assert len(head.sources) == 3


@pytest.mark.parametrize(("variant", "base", "plain"), [
    ("yolov8-C2f_EMA", "v8/yolov8", "C2f"), ("yolov8-C2f_iRMB", "v8/yolov8", "C2f"),
    ("yolov9-t-RepNCSPELAN4_EMA", "v9/yolov9-t", "RepNCSPELAN4"), ("yolov9-t-RepNCSPELAN4_iRMB", "v9/yolov9-t", "RepNCSPELAN4"),
])  # fmt: skip
def test_embedded_variants_differ_in_the_backbones_blocks_only(variant, base, plain):
    given, plans = rows(FOLDER / f"{variant}.yaml"), rows(CONFIGS / f"{base}.yaml")
    changed = [(a[0], b[0]) for a, b in zip(given, plans) if a != b]
    assert changed
    assert all(old == plain and new.startswith(f"{plain}_") for new, old in changed)
    assert [a[1:] for a in given] == [b[1:] for b in plans]
