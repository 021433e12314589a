"""docs/distributed.md: its scripts are scripts, its manifests are YAML, and torchrun and this project know every flag in them."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from utils.cli import train_arguments, val_arguments

PAGE = (Path(__file__).parents[3] / "docs" / "distributed.md").read_text(encoding="utf-8")
PARSERS = {"train.py": train_arguments.COMMAND.build_parser, "val.py": val_arguments.COMMAND.build_parser}


def fences(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def manifests() -> list[dict]:
    return [document for text in fences("yaml") for document in yaml.safe_load_all(text)]


def job() -> dict:
    (found,) = (m for m in manifests() if m["kind"] == "Job")
    return found["spec"]


def container() -> dict:
    (only,) = job()["template"]["spec"]["containers"]
    return only


def scripts() -> list[str]:
    return [*fences("bash"), *container()["args"]]


def commands() -> list[list[str]]:
    """Every torchrun command of the page, in words, from behind the word torchrun on."""
    joined = [line for script in scripts() for line in script.replace("\\\n", " ").splitlines()]
    return [shlex.split(line.split("torchrun", 1)[1]) for line in joined if "torchrun" in line]


@pytest.mark.parametrize("script", scripts(), ids=lambda text: text.splitlines()[0][:40])
def test_shell_scripts_of_the_page_parse(script):
    shell = "sh" if script in container()["args"] else "bash"
    checked = subprocess.run([shell, "-n"], input=script, capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_every_flag_of_the_page_exists():
    found = commands()
    assert len(found) == 5
    for words in found:
        launch = get_args_parser().parse_args(words)
        assert launch.training_script in PARSERS, words
        given = [w for w in launch.training_script_args if w != "$@"]
        PARSERS[launch.training_script]().parse_args(given)  # exits on a flag that is not known
    for given in re.findall(r"set -- (.*?)(?:;|$)", container()["args"][0], flags=re.MULTILINE):
        train_arguments.COMMAND.build_parser().parse_args(shlex.split(given))


def test_unknown_flag_is_detected():
    with pytest.raises(SystemExit):
        get_args_parser().parse_args(["--nproc_per_machine", "2", "train.py"])
    with pytest.raises(SystemExit):
        train_arguments.COMMAND.build_parser().parse_args(["--save-stepz", "5"])


def test_kubernetes_manifests_are_consistent():
    """The rendezvous is the first pod by the name that the headless Service gives it, and there are as many nodes as pods."""
    (service,) = (m for m in manifests() if m["kind"] == "Service")
    name = service["metadata"]["name"]
    (words,) = (w for w in commands() if "yolo" in w)
    launch = get_args_parser().parse_args(words)
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": name}
    assert job()["template"]["spec"]["subdomain"] == name
    assert launch.rdzv_endpoint.split(":")[0] == f"{name}-0.{name}"
    assert int(launch.nnodes) == job()["completions"] == job()["parallelism"]
    assert int(launch.nproc_per_node) == container()["resources"]["limits"]["nvidia.com/gpu"]
    assert {m["name"] for m in container()["volumeMounts"]} == {v["name"] for v in job()["template"]["spec"]["volumes"]}
