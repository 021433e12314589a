"""The fake CUDA device refuses what a real one refuses, and records synchronisations and nondeterministic kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.fake_cuda import GPU, FakeCudaTensor, fake_cuda
from utils.types import Targets


@pytest.fixture
def gpu(monkeypatch):
    with fake_cuda(monkeypatch) as seen:
        yield seen


def two_targets() -> Targets:
    return Targets(torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.long), torch.rand(2, 4))


def there(*size: int) -> torch.Tensor:
    return torch.ones(size, device="cuda")


def test_tensors_move_to_and_from_the_device(gpu):
    x = torch.arange(6.0).to("cuda:0")
    assert isinstance(x, FakeCudaTensor)
    assert (x.device, x.is_cuda, x.new_zeros(2).device, x.new_tensor([1]).device, (x + 1).device) == (GPU, True, GPU, GPU, GPU)
    assert not isinstance(x.cpu(), FakeCudaTensor)
    assert x.tolist() == list(range(6))
    assert len(gpu.syncs) == 2


@pytest.mark.parametrize(
    "mixed",
    [
        lambda: there(2) + torch.ones(2),
        lambda: torch.cat((there(2), torch.ones(2))),
        lambda: there(2, 2) @ torch.ones(2, 2),
        lambda: torch.ones(3)[torch.zeros(1, dtype=torch.long, device="cuda")],
        lambda: there(3).index_put((torch.tensor([0]),), torch.ones(1)),
        lambda: nn.Linear(2, 2)(there(1, 2)),
    ],
)
def test_operands_on_two_devices_are_refused(gpu, mixed):
    with pytest.raises(RuntimeError, match="on cuda:0 and on the CPU"):
        mixed()


def test_numbers_and_indices_may_come_from_the_cpu(gpu):
    assert (there(3) * torch.tensor(2.0))[torch.tensor([1])].tolist() == [2.0]


def test_numpy_is_refused(gpu):
    with pytest.raises(TypeError, match="numpy"):
        there(2).numpy()
    with pytest.raises(TypeError, match="numpy"):
        np.asarray(there(2))


@pytest.mark.parametrize(
    "waiting",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: bool((x > 0).all()),
        lambda x: x.unique(),
        lambda x: x.repeat_interleave(torch.ones(4, dtype=torch.long, device="cuda")),
        lambda x: x.index_put_((x > 0,), there(4)),
    ],
)
def test_synchronisation_is_recorded(gpu, waiting):
    x = there(4)
    assert not gpu.syncs
    waiting(x)
    assert len(gpu.syncs) == 1
    assert "test_fake_cuda.py" in gpu.syncs[0]


@pytest.mark.parametrize(
    "copying",
    [
        lambda x: torch.tensor([1.0, 2.0], device="cuda"),
        lambda x: torch.as_tensor(3, device=x.device),
        lambda x: x.new_tensor([1, 2]),
        lambda x: x.__setitem__([0, 2], 1.0),
        lambda x: two_targets().to("cuda", non_blocking=False),
    ],
)
def test_copies_from_the_host_that_wait_are_recorded(gpu, copying):
    x = there(4)
    copying(x)
    assert len(gpu.copies) >= 1
    assert "test_fake_cuda.py" in gpu.copies[0]


def test_asynchronous_copies_and_filled_tensors_are_not_recorded(gpu):
    x = there(4)
    x.new_full((2,), 3.0) + torch.full((2,), 2.0, device="cuda")
    two_targets().to("cuda", non_blocking=True)
    assert not gpu.copies


def test_asynchronous_work_is_not_recorded_as_synchronisation(gpu):
    x = there(4).requires_grad_()
    y = torch.where(x > 0, x, 0.0).index_select(0, torch.arange(3, device="cuda"))
    y[y > 5] = 0.0
    y.sum().backward()
    assert not gpu.syncs


@pytest.mark.parametrize(
    "unordered",
    [
        lambda x: F.adaptive_avg_pool2d(x, 2),
        lambda x: F.adaptive_max_pool2d(x, 2),
        lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
        lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
        lambda x: F.grid_sample(x, torch.zeros(1, 2, 2, 2, device="cuda"), align_corners=False),
    ],
)
def test_nondeterministic_kernels_are_recorded(gpu, unordered):
    unordered(there(1, 1, 4, 4).requires_grad_()).sum().backward()
    assert len(gpu.nondeterministic) == 1


def test_backward_of_a_custom_function_is_recorded(gpu):
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return grad * torch.full((2,), 2.0, device=grad.device)

    x = there(2).requires_grad_()
    Twice.apply(x).sum().backward()
    assert x.grad.tolist() == [2.0, 2.0]
