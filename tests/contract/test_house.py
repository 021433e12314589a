"""Imports point down: scripts -> engine -> {models, data} -> tasks -> utils, without cycles; an import inside a function counts as well."""

from __future__ import annotations

import ast
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "engine": {"engine", "models", "data", "tasks", "utils"},
    "models": {"models", "tasks", "utils"},
    "data": {"data", "tasks", "utils"},
    "tasks": {"tasks", "utils"},
    "utils": {"utils"},
}
GRAPH = ("models.build", "models.model", "models.spec.parser", "models.edit", "models.export", "models.checkpoints", "models.transfer")
NOT_ABOVE = {
    "models.layers": ("models.backbones", "models.necks", "models.heads", "models.losses", "models.assigners", *GRAPH),
    "models.backbones": ("models.necks", "models.heads", "models.losses", "models.assigners", *GRAPH),
    "models.necks": ("models.heads", "models.losses", "models.assigners", *GRAPH),
    "models.assigners": ("models.heads", "models.losses", *GRAPH),
    "models.losses": ("models.heads", *GRAPH),
    "models.heads": GRAPH,
}
HEAVY = {"matplotlib", "tensorboard", "onnx", "onnxruntime", "pycocotools"}
MOST_FILES = 20  # Python files in a folder; layers/attention has one for each paper


def find_modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file of every library module and every script of a tree."""
    files = [*root.glob("*.py"), *(p for folder in MAY_IMPORT for p in (root / folder).rglob("*.py"))]
    return {".".join(p.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): p for p in files}


def imports_of(path: Path, modules: dict[str, Path], *, lazy: bool = True) -> set[str]:
    """Dotted names that a file imports; ``from package import module`` gives the module, imports for type checking only are left out.

    Args:
        path: the file.
        modules: of the tree, to tell a package's modules from its other names.
        lazy: whether imports inside functions count.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_typing = [node.body for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    hints = {id(node) for body in for_typing for statement in body for node in ast.walk(statement)}
    names: set[str] = set()
    for node in ast.walk(tree) if lazy else tree.body:
        if isinstance(node, ast.Import) and id(node) not in hints:
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and id(node) not in hints:
            if not node.module or node.level:
                raise ValueError(f"{path}:{node.lineno}: write the whole name in place of a relative import")
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in modules else node.module for name in inner}
    return names


def upward_imports(name: str, imported: set[str], modules: dict[str, Path]) -> list[str]:
    """Those of a module's imports that its place does not allow."""
    scripts = {m for m in modules if "." not in m} - set(MAY_IMPORT)
    allowed = MAY_IMPORT.get(name.split(".")[0], {*MAY_IMPORT, *scripts})  # demo.py runs the other scripts
    above = tuple(a for folder, names in NOT_ABOVE.items() if f"{name}.".startswith(f"{folder}.") for a in names)
    project = {i for i in imported if i.split(".")[0] in scripts | set(MAY_IMPORT)}
    return sorted(i for i in project if i.split(".")[0] not in allowed or f"{i}.".startswith(tuple(f"{a}." for a in above)))


def find_cycle(modules: dict[str, Path]) -> list[str]:
    """The modules of a circular import, the first again at the end; empty if there is none."""
    graph = {name: {i for i in imports_of(path, modules) if i in modules and i != name} for name, path in modules.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


MODULES = find_modules(ROOT)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_down(name):
    wrong = upward_imports(name, imports_of(MODULES[name], MODULES), MODULES)
    assert not wrong, f"{name} imports {wrong}"


def test_no_module_imports_itself_by_way_of_others():
    assert not (cycle := find_cycle(MODULES)), " > ".join(cycle)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_optional_packages_are_imported_where_they_are_used(name):
    heavy = {i for i in imports_of(MODULES[name], MODULES, lazy=False) if i.split(".")[0] in HEAVY}
    assert not heavy, f"{name} imports {sorted(heavy)} at import"


def test_every_file_begins_with_its_docstring():
    texts = {name: path.read_text(encoding="utf-8") for name, path in MODULES.items()}
    without = [name for name, text in texts.items() if text and not text.startswith(('"""', 'r"""'))]
    assert not without, f"no docstring on the first line of {without}"


def test_folders_stay_small_enough_to_read():
    counts = Counter(p.parent.relative_to(ROOT).as_posix() for p in MODULES.values() if p.name != "__init__.py")
    crowded = {folder: n for folder, n in counts.items() if n > MOST_FILES and folder != "models/layers/attention"}
    assert not crowded, f"folders of more than {MOST_FILES} files: {crowded}"


@pytest.fixture
def tree(tmp_path):
    """A small tree that keeps the rules, as a function that writes one more file and finds the modules."""

    def write(name: str, text: str) -> dict[str, Path]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return find_modules(tmp_path)

    write("train.py", "import engine.run\n")
    write("engine/run.py", "from models import build\n")
    write("models/__init__.py", "")
    write("models/build.py", "from utils.boxes import area\n")
    write("data/labels.py", "import utils.boxes\n")
    write("utils/boxes.py", "import math\n")
    return write


def wrong_in(modules: dict[str, Path]) -> list[str]:
    return [f"{name} > {i}" for name, path in modules.items() for i in upward_imports(name, imports_of(path, modules), modules)]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("utils/files.py", "def f():\n    from engine import run\n", "utils.files > engine.run"),
        ("models/cost.py", "def f():\n    import data.labels\n", "models.cost > data.labels"),
        ("data/check.py", "def f():\n    if True:\n        import train\n", "data.check > train"),
        ("models/layers/conv.py", "def f():\n    from models import build\n", "models.layers.conv > models.build"),
        ("tasks/detect.py", "from models.build import Model\n", "tasks.detect > models.build"),
    ],
)
def test_a_lazy_upward_import_is_found(tree, name, text, expected):
    assert wrong_in(tree(name, text)) == [expected]


def test_a_cycle_of_lazy_imports_is_found(tree):
    tree("models/model.py", "import models.build\n")
    assert not find_cycle(tree("utils/files.py", "import utils.boxes\n"))
    cycle = find_cycle(tree("models/build.py", "def f():\n    from models import model\n"))
    assert set(cycle) == {"models.build", "models.model"}
    assert cycle[0] == cycle[-1]


def test_imports_for_type_checking_do_not_count(tree):
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import engine.run\nelse:\n    import data.labels\n"
    assert wrong_in(tree("utils/boxes.py", text)) == ["utils.boxes > data.labels"]
    assert not find_cycle(tree("utils/boxes.py", "if TYPE_CHECKING:\n    import engine.run\n"))
