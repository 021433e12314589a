"""doctor.py: sound networks pass, each defect is one line that names file and check, a stopped run is resumed, memory has a limit."""

from __future__ import annotations

import csv

import pytest
import yaml

import doctor
from engine.doctor.checkup import CHECKS, Case, run_checks
from engine.doctor.pool import Limits, Settings, check_all
from models.spec.config_files import CONFIGS
from models.spec.registry import load_plugin
from tests.tiny import tiny_cfg
from utils.memory import is_out_of_memory

PLUGIN = """
import os
import signal

import torch
from torch import nn
from models.spec import channel_rules as rules
from models.spec.registry import register

class Scale(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.unused = nn.Parameter(torch.ones(1)) if self.spare else None
        self.norm = nn.BatchNorm2d(channels)

    spare = False

    def forward(self, x):
        return self.norm(x * self.weight)

@register("DoctorSpare", channels=rules.same_width)
class Spare(Scale):
    spare = True

@register("DoctorWrongFold", channels=rules.same_width)
class WrongFold(Scale):
    def fused(self):
        return nn.Identity()

@register("DoctorFixedSize", channels=rules.same_width)
class FixedSize(Scale):
    def forward(self, x):
        return super().forward(x) + (torch.zeros(1, 1, 2, 2) if x.shape[2:] == (2, 2) else torch.zeros(1, 1, 8, 8))

@register("DoctorGreedy", channels=rules.same_width)
class Greedy(Scale):
    def forward(self, x):
        if len(x) == 2:  # as in training, not in the dry run
            raise MemoryError("std::bad_alloc\\nin two lines")
        return super().forward(x)

@register("DoctorKilled", channels=rules.same_width)
class Killed(Scale):
    def forward(self, x):
        if len(x) == 2 and not self.training:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)

@register("DoctorContiguous", channels=rules.same_width)
class Contiguous(Scale):
    def forward(self, x):
        return super().forward(x.view(-1).view(x.shape))
"""


def write(folder, name, **cfg):
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tiny_cfg(**cfg)), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    path = tmp_path_factory.mktemp("plugin") / "doctor_blocks.py"
    path.write_text(PLUGIN, encoding="utf-8")
    return str(path)


def test_valid_networks_pass_and_a_stopped_run_resumes(tmp_path, capsys):
    plain, attending = write(tmp_path, "plain", attention=("Silence", [])), write(tmp_path, "focal")
    out = ["--out", str(tmp_path / "out"), "--jobs", "1"]
    assert doctor.main([plain, *out]) == 0
    assert "1 of 1 pass" in capsys.readouterr().out
    assert doctor.main([plain, attending, "--resume", *out]) == 0
    assert "2 networks, 1 passed before" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "out" / "doctor.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["result"] for row in rows] == ["pass", "pass"]
    assert all(row[check] == "pass" for row in rows for check in CHECKS)
    assert all(int(row["width"]) > int(row["height"]) for row in rows)
    assert (tmp_path / "out" / "doctor.md").read_text(encoding="utf-8").startswith("2 of 2 pass")
    write(tmp_path, "plain", attention=("SE", []))
    assert doctor.main([plain, "--resume", *out]) == 0
    assert "1 network, 0 passed before" in capsys.readouterr().out


def test_failures_give_a_line_with_file_and_reason(tmp_path, plugin, capsys):
    names = [write(tmp_path, "unknown", attention=("Atention", [])), write(tmp_path, "spare", attention=("DoctorSpare", []))]
    assert doctor.main([*names, "--plugins", plugin, "--jobs", "2", "--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert f"FAILED {names[0]}: build:" in out
    assert "'Atention'" in out
    assert f"FAILED {names[1]}: train: no gradient reaches model.7.unused" in out
    assert "0 of 2 pass" in out


@pytest.mark.parametrize(("block", "failing"), [
    ("DoctorWrongFold", ["fuse", "deploy"]),
    ("DoctorFixedSize", ["val", "fuse", "deploy", "onnx"]),  # takes the sizes of the dry run and of training, but no rectangle
])  # fmt: skip
def test_each_check_can_fail(block, failing, tmp_path, plugin):
    load_plugin(plugin)
    write(tmp_path, block, attention=(block, []))
    report = run_checks(Case(tmp_path / f"{block}.yaml"))
    assert [check for check, reason in report.reasons.items() if reason] == failing, report.reasons


def test_process_out_of_memory_gives_a_line(tmp_path):
    write(tmp_path, "plain")
    (report,) = check_all([Case(tmp_path / "plain.yaml")], Settings(64), Limits(jobs=2, memory=2**27))
    assert not report.passed
    assert report.out_of_memory
    assert ": out of memory (--memory 0.125): " in report.failure or "(out of memory?)" in report.failure


def test_out_of_memory_is_named_in_the_table(tmp_path, plugin, capsys):
    greedy, killed = (write(tmp_path, name, attention=(f"Doctor{name}", [])) for name in ("Greedy", "Killed"))
    assert doctor.main([greedy, killed, "--plugins", plugin, "--jobs", "2", "--memory", "2.5", "--out", str(tmp_path)]) == 1
    rows = {row["cfg"]: row for row in csv.DictReader((tmp_path / "doctor.csv").read_text(encoding="utf-8").splitlines())}
    assert rows[greedy]["reason"] == "train: out of memory (--memory 2.5): MemoryError: std::bad_alloc in two lines"
    assert rows[killed]["reason"] == "val: the process was killed by SIGKILL (out of memory?)"
    assert (rows[killed]["train"], rows[killed]["val"], rows[killed]["fuse"]) == ("-", "FAIL", "-")
    assert f"FAILED {greedy}: {rows[greedy]['reason']}\n" in capsys.readouterr().out


def test_out_of_memory_is_recognised_by_its_cause():
    error = ValueError("model.onnx: not written")
    error.__cause__ = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
    assert is_out_of_memory(error)
    assert not is_out_of_memory(ValueError("model.onnx: not written"))


def test_the_training_step_has_channels_last_as_training_has(tmp_path, plugin):
    load_plugin(plugin)
    write(tmp_path, "contiguous", attention=("DoctorContiguous", []))
    report = run_checks(Case(tmp_path / "contiguous.yaml"))
    assert report.reasons["train"].startswith("doctor_blocks.py, line ")
    assert "view size is not compatible" in report.reasons["train"]


def test_every_yaml_of_the_repository_is_examined_at_its_smallest_scale():
    cases = doctor.find_cases([], only=[], all_scales=False)
    assert len(cases) == len(list(CONFIGS.rglob("*.yaml"))) > 200
    assert {case.scale for case in cases if case.cfg.name == "yolov8.yaml"} == {"n"}
    every = doctor.find_cases([], only=["yolov8"], all_scales=True)
    assert [case.scale for case in every] == ["n", "s", "m", "l", "x"]


def test_pattern_without_a_match_is_refused(capsys):
    assert doctor.main(["--only", "yolov99*"]) == 1
    assert "--only yolov99*" in capsys.readouterr().err
