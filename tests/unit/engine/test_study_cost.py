"""What the networks of a study cost, and that one which does not run costs the others nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

import study
from engine.study.cost import LATENCY_FILE, count_costs
from engine.study.plan import make_plans
from engine.study.records import Status
from engine.study.run_files import METRICS_FILE, Job, read_json, write_json
from models.spec import registry
from tests.tiny_training import make_world
from utils.cli.study_arguments import parse_arguments
from utils.errors import UserError

METRIC = "metrics/mAP_0.5:0.95"
PLUGIN = """
from torch import nn
from models.spec import channel_rules as rules
from models.spec.registry import register

class Adding(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + self.conv(x)

@register("PickyForTests", channels=rules.same_width)
class PickyForTests(Adding):
    def forward(self, x):
        if x.shape[-1] == 12:
            raise RuntimeError("sizes do not fit:\\n12 % 8")
        return super().forward(x)

@register("BatchyForTests", channels=rules.same_width)
class BatchyForTests(Adding):
    def forward(self, x):
        if len(x) == 32:
            raise RuntimeError("view size is not compatible")
        return super().forward(x)
"""


class Training:
    """Ends at once: well, or badly where the network does not run."""

    def __init__(self, job: Job, device: str) -> None:
        self.fails = "Picky" in job.variant
        if not self.fails:
            write_json(job.folder / METRICS_FILE, {"compare": job.compare, "metrics": {METRIC: 0.1}})

    def poll(self) -> int:
        return int(self.fails)

    def reason(self) -> str:
        return "sizes do not fit"


@pytest.fixture
def flags(tmp_path):
    """A study of a network, one that does not run at its size, and one that does not run in large batches."""
    world = make_world(tmp_path / "world")
    plugin = world / "mine.py"
    plugin.write_text(PLUGIN)
    return [
        "--cfg", str(world / "tiny-v9.yaml"), "--data", str(world / "data.yaml"), "--plugins", str(plugin), "--imgsz", "96", "--seeds", "0",
        "--attention", "none", "PickyForTests@3", "BatchyForTests@3", "--devices", "cpu", "--latency", "2", "--project", str(tmp_path),
    ]  # fmt: skip


def test_networks_that_do_not_run_cost_the_others_nothing(flags, monkeypatch, capsys):
    reported = []
    monkeypatch.setattr(study, "report", lambda found, folder: reported.append(found))
    (found,) = study.study(parse_arguments(flags), start=Training)
    assert reported == [found]
    by_name = {record.variant: record for record in found.records}
    plain, picky, batchy = by_name["none"], by_name["PickyForTests@3"], by_name["BatchyForTests@3"]
    assert (plain.status, picky.status, batchy.status) == (Status.FINISHED, Status.FAILED, Status.FINISHED)
    assert picky.reason == "sizes do not fit"
    assert picky.cost.parameters == batchy.cost.parameters > plain.cost.parameters  # they can be counted without an image
    assert (picky.cost.gflops, picky.cost.customary_gflops) == (None, None)
    assert batchy.cost.gflops > plain.cost.gflops
    assert [set(record.cost.latency_ms) for record in (plain, picky, batchy)] == [{1, 32}, set(), {1}]
    notes = [
        "PickyForTests@3: GFLOPs were not counted (RuntimeError: sizes do not fit: 12 % 8)",
        "PickyForTests@3: latency at batch 1 and 32 was not measured (RuntimeError: sizes do not fit: 12 % 8)",
        "BatchyForTests@3: latency at batch 32 was not measured (RuntimeError: view size is not compatible)",
    ]
    assert [note for note in found.notes if "ForTests" in note] == notes
    assert f"note      {notes[0]}" in capsys.readouterr().out
    (again,) = study.study(parse_arguments(flags), start=None)  # nothing is trained or measured again, and the notes are the same
    assert again.notes == found.notes
    assert "measures latency" not in capsys.readouterr().out


def test_costs_that_could_not_be_counted_are_counted_again(flags):
    (plan,) = make_plans(parse_arguments(flags))
    plan.folder.mkdir()
    notes: list[str] = []
    count_costs(plan.folder, plan.variants, notes)
    assert len(read_json(plan.folder / "costs.json")) == 2
    count_costs(plan.folder, plan.variants, notes)
    assert notes[0] == notes[1]
    assert not (plan.folder / LATENCY_FILE).exists()


def test_module_that_does_not_run_has_no_control(flags):
    (plan,) = make_plans(parse_arguments([*flags, "--control", "params"]))
    assert [v.name for v in plan.variants] == ["none", "PickyForTests@3", "BatchyForTests@3", "BatchyForTests@3 control"]
    assert "PickyForTests@3 has no control: its modules do not run (RuntimeError: sizes do not fit: 12 % 8)" in plan.notes


@pytest.fixture
def forgetting(monkeypatch):
    """A function after which plugins can be loaded anew, as in another process."""
    state, plugins = registry.BLOCKS.snapshot(), dict(registry._PLUGINS)

    def forget() -> None:
        registry.BLOCKS.restore(state)
        monkeypatch.setattr(registry, "_PLUGINS", dict(plugins))

    yield forget
    forget()


def test_edited_plugin_is_another_network_of_those_that_use_it(flags, forgetting, monkeypatch):
    monkeypatch.setattr(study, "report", lambda found, folder: None)
    flags = [*flags, "--attention", "none", "BatchyForTests@3", "--latency", "0"]
    plugin = Path(flags[flags.index("--plugins") + 1])
    text = PLUGIN.replace("ForTests", "EditedForTests")
    flags = [flag.replace("ForTests", "EditedForTests") for flag in flags]

    def run(*more: str):
        forgetting()
        return study.study(parse_arguments([*flags, *more]), start=Training)[0]

    plugin.write_text(text)
    parameters = {r.variant: r.cost.parameters for r in run().records}
    plugin.write_text(text.replace("channels, channels, 3, padding=1", "channels, channels, 1"))
    with pytest.raises(UserError, match=r"BatchyEditedForTests@3-seed0: was trained with another version of mine\.py; give another --name"):
        run("--seeds", "0", "1")
    found = run("--attention", "none", "--seeds", "0", "1")  # does not use it
    assert [r.status for r in found.records] == [Status.FINISHED] * 2
    (folder := found.records[0].folder.parent / "BatchyEditedForTests@3-seed0" / METRICS_FILE).unlink()
    assert folder.parent.is_dir()
    edited = {r.variant: r.cost.parameters for r in run().records}  # nothing is trained there any more
    assert edited["none"] == parameters["none"]
    assert edited["BatchyEditedForTests@3"] < parameters["BatchyEditedForTests@3"]
