"""README.zh-CN.md and docs/zh: commands have flags and networks that there are, links lead somewhere, and no page is left out."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from models import list_models
from utils.cli import detect_arguments, explain_arguments, export_arguments, study_arguments, train_arguments, val_arguments

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.zh-CN.md", *sorted((ROOT / "docs" / "zh").glob("*.md"))]
PARSERS = {
    "train.py": train_arguments, "val.py": val_arguments, "detect.py": detect_arguments, "export.py": export_arguments,
    "study.py": study_arguments, "explain.py": explain_arguments,
}  # fmt: skip
ENGLISH = {ROOT / "docs" / page.name for page in PAGES[1:]}  # which there are in Chinese, too
TUTORIALS = sorted((ROOT / "docs" / "zh" / "tutorials").glob("*.md"))
OWN_FILES = re.compile(r"(mydata|mine|STUDY|Gate|my_)")


def commands(page: Path) -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_understood(page: Path) -> None:
    english = "".join(p.read_text(encoding="utf-8") for p in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    known = set(list_models())
    for words in commands(page):
        script = next((w for w in words if w in PARSERS), "")
        if script and "STUDY.yaml" not in words:  # which would be read
            PARSERS[script].parse_arguments(words[words.index(script) + 1 :])  # type: ignore[attr-defined]
        else:
            assert all(w in english for w in words if w.startswith("--")), words
        for word in words:
            if word.endswith(".yaml") and "/" not in word and not OWN_FILES.search(word) and word != "coco.yaml":
                assert word.removesuffix(".yaml") in known, word


@pytest.mark.parametrize("page", [*PAGES, *TUTORIALS], ids=lambda page: f"{page.parent.name}/{page.name}")
def test_links_lead_somewhere(page: Path) -> None:
    """A page that is called by its file name is the Chinese one, where there is one."""
    for text, link in re.findall(r"\[([^\]]*)\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert link.startswith("https://") or (page.parent / link).exists(), link
        assert text != Path(link).name or (page.parent / link).resolve() not in ENGLISH, link


def test_every_page_is_listed() -> None:
    index = (ROOT / "docs" / "zh" / "README.md").read_text(encoding="utf-8")
    assert all(f"({page.name})" in index for page in PAGES if page.name not in ("README.md", "README.zh-CN.md"))
