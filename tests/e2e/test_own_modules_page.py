"""docs/own_modules.md, literally: the file is written, and every command of the page is run as it stands there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "own_modules.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.S)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the project lies, and the page's file."""
    folder = tmp_path_factory.mktemp("clone")
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name != "runs":
            (folder / entry.name).symlink_to(entry)
    code = blocks("python")[0]
    (folder / "my_blocks.py").write_text(code, encoding="utf-8")
    return folder


@pytest.mark.parametrize(("block", "proof"), [(0, "1 of 1 pass"), (1, " passed")])
def test_commands_of_the_page_run(clone, block, proof):
    for line in blocks("bash")[block].splitlines():
        command = line.replace("python ", f"{shlex.quote(sys.executable)} ", 1) if line.startswith("python ") else line
        environment = {**os.environ, "PYTHONPATH": "", "PYTEST_ADDOPTS": "-p no:cacheprovider"}
        done = subprocess.run(["bash", "-c", command], cwd=clone, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert proof in done.stdout
    assert "failed" not in done.stdout
