"""The choice of a GPU's kernels."""

from __future__ import annotations

import pytest
import torch

from utils.precision import choose_kernels


@pytest.fixture(autouse=True)
def _kernels_as_before():
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    yield
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


@pytest.mark.parametrize(("deterministic", "sizes_vary", "wanted"), [(False, False, (True, True, True)), (False, True, (True, True, False)),
                                                                     (True, False, (False, False, False))])  # fmt: skip
def test_kernels_follow_determinism_and_sizes(deterministic, sizes_vary, wanted):
    choose_kernels(deterministic=deterministic, sizes_vary=sizes_vary)
    cudnn = torch.backends.cudnn
    assert (torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark) == wanted
