"""The task of docs/extending.md holds what every task has to hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.spec.registry import load_plugin
from tasks import Task, get_task
from tests.contract.test_task_contract import *  # noqa: F403
from tests.e2e.test_extending_page import section

pytestmark = []  # the tests take the fixture below in place of the registered tasks


@pytest.fixture
def task(tmp_path: Path) -> Task:
    (tmp_path / "my_points.py").write_text(section("A task").block("python"), encoding="utf-8")
    load_plugin(tmp_path / "my_points.py")
    return get_task("points")
