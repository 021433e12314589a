"""The cost table: agrees with torch's counter and with formulas, nothing that is a matrix product is free, memory is autograd's own."""

from __future__ import annotations

import csv

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models import build_model
from models.analysis.operations import OperationCounter, multiply_adds
from models.analysis.profiling import SORT_KEYS, main, profile
from models.spec.registry import BLOCKS
from tests.tiny import tiny_cfg

CHANNELS, HEIGHT, WIDTH = 48, 6, 10
PIXELS = HEIGHT * WIDTH


def flops_by_torch(model: nn.Module, x: torch.Tensor) -> int:
    plain = sdpa_kernel(SDPBackend.MATH)  # before 2.7 torch's counter did not know the CPU's fused attention
    with torch.no_grad(), plain, FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


@pytest.mark.parametrize("attention", ["Silence", "MHSA", "NLBlockND", "BiLevelRoutingAttention", "PSA", "DANet", "CloAttention"])
def test_row_costs_sum_to_the_count_of_torch(attention):
    model = build_model(tiny_cfg(attention=(attention, []))).eval()
    costs = profile(model, imgsz=(64, 96), repeats=1)
    total = flops_by_torch(model, torch.zeros(1, 3, 64, 96))
    assert total > 0
    assert 2 * sum(cost.multiply_adds for cost in costs) == total
    assert [cost.row for cost in costs] == list(range(len(model.plans)))
    assert sum(cost.parameters for cost in costs) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["yolov8-BoT3.yaml", "yolov8.yaml"])
def test_whole_networks_agree_with_torch(name):
    model = build_model(name).eval()
    images = torch.zeros(1, 3, 64, 64)
    assert 2 * multiply_adds(model, images) == flops_by_torch(model, images)


@pytest.mark.parametrize(("name", "direct", "written_out"), [
    ("MSDA", 4 * CHANNELS**2 * PIXELS, 2 * 9 * CHANNELS * PIXELS),  # four projections; logits and sum over nine neighbours
    ("AxialAttention", None, 0),
    ("DeformableLKA", (2 * 25 * 25 + 2 * 49 * 49 + 25 + 49 + CHANNELS) * CHANNELS * PIXELS, 0),  # offsets, taps, 1x1
])  # fmt: skip
def test_matrix_products_missed_by_torch_are_counted(name, direct, written_out):
    block, x = BLOCKS[name].cls(CHANNELS).eval(), torch.zeros(1, CHANNELS, HEIGHT, WIDTH)
    with torch.no_grad(), OperationCounter() as counter:
        block(x)
    assert direct is None or counter.direct == direct
    assert counter.written_out == written_out
    assert counter.total == counter.direct + counter.written_out


def test_fused_attention_is_counted_by_its_formula():
    q = torch.zeros(2, 3, 7, 16)
    k = torch.zeros(2, 3, 11, 16)
    count = multiply_adds(lambda: nn.functional.scaled_dot_product_attention(q, k, k))
    assert count == 2 * 3 * 7 * 11 * (16 + 16)


def test_gates_and_norms_cost_nothing():
    x = torch.ones(1, 8, 4, 4)
    assert multiply_adds(nn.Sequential(nn.BatchNorm2d(8), nn.SiLU(), nn.AvgPool2d(2)).eval(), x) == 0
    assert multiply_adds(lambda: x * torch.sigmoid(x) + x * 2.0) == 0


def test_kept_memory_equals_what_autograd_saves():
    model = build_model(tiny_cfg()).eval()
    images, kept = torch.zeros(1, 3, 64, 96), {}
    free = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), images)}

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in free:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        held = model(images)
    rows = sum(cost.activation_bytes for cost in profile(model, imgsz=(64, 96), repeats=1))
    assert held is not None
    assert rows == pytest.approx(sum(kept.values()), rel=0.01)


def test_command_prints_sorts_and_writes_csv(tmp_path, capsys):
    file = tmp_path / "cost.csv"
    assert main(["yolov9-t-FocalModulation", "--imgsz", "90", "--sort", "parameters", "--csv", str(file)]) == 0
    out = capsys.readouterr().out
    assert out.count("96 is used") == 1
    assert "total" in out
    rows = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
    parameters = [int(row["parameters"]) for row in rows]
    assert parameters == sorted(parameters, reverse=True)
    assert set(SORT_KEYS.values()) <= set(rows[0])
    assert sum(parameters) == sum(p.numel() for p in build_model("yolov9-t-FocalModulation").parameters())


@pytest.mark.parametrize(("arguments", "message"), [
    (["yolov8-Fokal"], "no such model YAML"),
    (["yolov9-t", "--imgsz", "64", "--csv", "no/such/folder/a.csv"], "cannot be written"),
    (["yolov9-t", "--imgsz", "1", "2", "3"], "--imgsz 1 2 3"),
    (["yolov9-t", "--batch-size", "0"], "--batch-size 0"),
    (["yolov9-t", "--device", "tpu"], "--device tpu"),
    (["runs/exp/weights/best.pt"], "holds weights"),
])  # fmt: skip
def test_invalid_arguments_give_one_line(arguments, message, capsys):
    assert main(arguments) == 1
    assert message in capsys.readouterr().err
