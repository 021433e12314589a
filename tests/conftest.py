"""``--plugins my_blocks.py`` registers a user's own blocks, so that the contract tests over the registry cover them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from models.spec.registry import load_plugin


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--plugins", dest="own_blocks", nargs="+", default=[], metavar="FILE", help="Python files with blocks of your own")


def pytest_configure(config: pytest.Config) -> None:
    for path in config.getoption("own_blocks"):
        load_plugin(path)


@pytest.fixture
def exact_float32() -> Iterator[None]:
    """No TensorFloat-32 (10 bits of mantissa) on a GPU, which torch allows in convolutions by default."""
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield
    for backend, allowed in zip(backends, before):
        backend.allow_tf32 = allowed


@pytest.fixture
def same_kernels(monkeypatch):
    """Trainings on the processor run torch's own choice of kernels, as those on a pretended GPU do, so that their results are equal."""
    monkeypatch.setattr("engine.training.setup.network.prefer_onednn", lambda network: None)
