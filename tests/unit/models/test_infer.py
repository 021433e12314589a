"""A CPU infers few images of a batch at a time, and gives what the whole batch gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models import build_model
from models.model import PIXELS_A_THREAD, few_at_a_time

NETWORKS = (
    "yolov5n", "yolov7-tiny", "yolov8n", "yolov8n-seg", "yolov8n-pose", "yolov8n-obb", "yolov8n-cls", "yolov9-t-FocalModulation",
    "yolov9-t-dseg", "yolo26n-pose", "rtdetr-l",
)  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_parts_of_a_batch_give_the_maps_of_the_whole(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    network = build_model(f"{name}.yaml", nc=3).eval()
    images = torch.rand(4, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    whole = network.infer(images)
    seen: list[int] = []
    network.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    monkeypatch.setattr("models.model.PIXELS_A_THREAD", 3 * 64 * 96 / torch.get_num_threads())
    parts = network.infer(images)
    assert seen == [2, 2]
    for branch, of_parts in zip(whole.branches, parts.branches, strict=True):
        torch.testing.assert_close(branch, of_parts, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dict(whole.shared), dict(parts.shared), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tuple(map(dict, whole.fields)), tuple(map(dict, parts.fields)), rtol=1e-4, atol=1e-4)
    for expected, found in zip(network.head.decode(whole), network.head.decode(parts), strict=True):
        torch.testing.assert_close(expected, found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("batch", "hw", "sizes"),
    [
        (16, (640, 640), {2}),  # 3 would fit, and 16 is no multiple of it
        (16, (480, 640), {4}),
        (13, (640, 640), {1}),
        (32, (128, 128), {32}),
        (2, (2048, 2048), {1}),
        (1, (4096, 4096), {1}),
    ],
)
def test_parts_are_equal_and_no_larger_than_allowed(
    monkeypatch: pytest.MonkeyPatch, batch: int, hw: tuple[int, int], sizes: set[int]
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    images = torch.zeros(1, 3, 1, 1).expand(batch, 3, *hw)
    parts = few_at_a_time(images)
    assert {len(part) for part in parts} == sizes
    assert sum(map(len, parts)) == batch
    assert all(len(part) * hw[0] * hw[1] <= 2 * PIXELS_A_THREAD or len(part) == 1 for part in parts)


def test_more_threads_take_more_images(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.zeros(1, 3, 1, 1).expand(32, 3, 640, 640)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    assert {len(part) for part in few_at_a_time(images)} == {16}


def test_other_devices_take_a_batch_whole() -> None:
    images: Tensor = torch.zeros(16, 3, 640, 640, device="meta")
    assert len(few_at_a_time(images)) == 1
