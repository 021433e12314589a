"""Imports point down: scripts -> engine -> {models, data} -> utils, and within models layers -> heads -> detector."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = {"train", "val", "detect", "export", "demo", "doctor", "hubconf"}
MAY_IMPORT = {"engine": {"engine", "models", "data", "utils"}, "models": {"models", "utils"}, "data": {"data", "utils"}, "utils": {"utils"}}
NOT_ABOVE = {
    "models/layers": ("models.heads", "models.losses", "models.assigners", "models.model", "models.spec.parser"),
    "models/losses": ("models.heads.anchor", "models.heads.multi_branch", "models.model", "models.spec.parser"),
    "models/assigners": ("models.heads", "models.losses", "models.model", "models.spec.parser"),
    "models/heads": ("models.model", "models.spec.parser"),
}
HEAVY = {"matplotlib", "tensorboard", "onnx", "onnxruntime", "pycocotools"}
FILES = sorted(p for folder in MAY_IMPORT for p in (ROOT / folder).rglob("*.py"))


def imported(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Dotted names that a file imports; those only for type checking are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {id(n) for i in ast.walk(tree) if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.dump(i.test) for n in ast.walk(i)}
    nodes = tree.body if top_level_only else ast.walk(tree)
    names: set[str] = set()
    for node in nodes:
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    name = path.relative_to(ROOT).as_posix()
    project = {i for i in imported(path) if i.split(".")[0] in SCRIPTS | set(MAY_IMPORT)}
    wrong = {i for i in project if i.split(".")[0] not in MAY_IMPORT[name.split("/")[0]]}
    wrong |= {i for i in project for folder, above in NOT_ABOVE.items() if name.startswith(folder + "/") and i.startswith(above)}
    assert not wrong, f"{name} imports {sorted(wrong)}"


SCRIPT_FILES = [ROOT / f"{name}.py" for name in ("train", "val", "detect", "export", "doctor")]


@pytest.mark.parametrize("path", [*FILES, *SCRIPT_FILES], ids=lambda p: p.stem)
def test_optional_packages_are_imported_where_they_are_used(path):
    heavy = {i for i in imported(path, top_level_only=True) if i.split(".")[0] in HEAVY}
    assert not heavy, f"{path.name} imports {sorted(heavy)} at import"
