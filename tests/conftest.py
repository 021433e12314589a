"""``--plugins my_blocks.py`` registers a user's own blocks, so that the contract tests over the registry cover them."""

from __future__ import annotations

import pytest

from models.spec.registry import load_plugin


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--plugins", dest="own_blocks", nargs="+", default=[], metavar="FILE", help="Python files with blocks of your own")


def pytest_configure(config: pytest.Config) -> None:
    for path in config.getoption("own_blocks"):
        load_plugin(path)
