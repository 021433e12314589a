"""Packed convolutions give what the network gives, whatever follows whatever, and step aside where their kernel cannot be used."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

from engine.memory_format import channels_last, ready_to_infer
from models import build_model
from models.layers.conv import FusedConv
from models.layers.packed import PackedConv, can_pack, pack_convolutions

CPU = torch.device("cpu")
needs_kernels = pytest.mark.skipif(not can_pack(), reason="this torch has no packed convolutions")


def packed_conv(activation: nn.Module, **options: int) -> tuple[nn.Conv2d, PackedConv]:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, 3, padding=1, **options)
    return conv, PackedConv.of(conv, activation)


@needs_kernels
@pytest.mark.parametrize("cfg", ["yolov8n.yaml", "yolov9-t.yaml", "yolov7-tiny.yaml", "yolov8n-BRA.yaml"])
def test_a_packed_network_gives_the_same_maps(cfg: str) -> None:
    torch.manual_seed(0)
    plain = channels_last(build_model(cfg, nc=3).deploy())
    packed = ready_to_infer(copy.deepcopy(plain), CPU)
    assert any(isinstance(m, PackedConv) for m in packed.modules())
    with torch.no_grad():
        for shape in ((1, 3, 64, 96), (2, 3, 64, 64), (1, 3, 64, 96)):
            images = torch.rand(shape).contiguous(memory_format=torch.channels_last)
            for expected, got in zip(plain(images).main, packed(images).main, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize("activation", [nn.SiLU(), nn.ReLU(), nn.Identity()])
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"groups": 4}, {"groups": 8}, {"dilation": 2}])
def test_activation_inside_the_kernel(activation: nn.Module, options: dict[str, int]) -> None:
    conv, packed = packed_conv(activation, **options)
    x = torch.randn(2, 8, 9, 11)
    with torch.no_grad():
        assert packed._kernel_arguments(x) is not None
        for layout in (torch.contiguous_format, torch.channels_last):
            torch.testing.assert_close(packed(x.contiguous(memory_format=layout)), activation(conv(x)), rtol=1e-5, atol=1e-5)


@needs_kernels
def test_an_activation_that_the_kernel_lacks_stays_outside() -> None:
    unit = FusedConv(nn.Conv2d(8, 16, 1), nn.Hardswish())
    whole = nn.Sequential(copy.deepcopy(unit))
    pack_convolutions(whole)
    assert isinstance(whole[0].act, nn.Hardswish)
    assert isinstance(whole[0].conv, PackedConv)
    x = torch.randn(1, 8, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(whole(x), unit(x))


@needs_kernels
def test_changed_weights_are_packed_anew() -> None:
    conv, packed = packed_conv(nn.SiLU())
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        packed(x)
        conv.weight.mul_(2)  # the parameters are shared
        torch.testing.assert_close(packed(x), nn.functional.silu(conv(x)), rtol=1e-5, atol=1e-5)


@needs_kernels
def test_whatever_is_changed_after_packing_counts() -> None:
    conv, packed = packed_conv(nn.SiLU())
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        packed(x)
        packed.stride = (2, 2)
        assert packed(x).shape == (1, 16, 3, 3)
        for seed in range(20):  # fresh weights, often at the address of those before
            weight = torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(seed))
            expected = nn.functional.silu(nn.functional.conv2d(x, weight, conv.bias, 2, 1))
            got = torch.func.functional_call(packed, {"weight": weight}, (x,))
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        before = packed(x)
        torch.nn.utils.prune.identity(packed, "weight")  # the weight is a parameter no more
        torch.testing.assert_close(packed(x), before, rtol=1e-5, atol=1e-5)


@needs_kernels
def test_a_unit_that_stands_in_two_places_stays_right_in_both() -> None:
    unit = FusedConv(nn.Conv2d(8, 8, 3, padding=1), nn.SiLU())
    network = nn.ModuleDict({"one": unit, "many": nn.ModuleList([unit, unit])})
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        expected = unit(x)
        pack_convolutions(network)
        for place in (network["one"], *network["many"]):
            torch.testing.assert_close(place(x), expected, rtol=1e-5, atol=1e-5)


@needs_kernels
def test_modules_of_a_packed_unit_can_be_watched() -> None:
    network = nn.Sequential(FusedConv(nn.Conv2d(3, 8, 3), nn.SiLU()))
    pack_convolutions(network)
    seen: list[str] = []
    for name, module in network.named_modules():
        module.register_forward_hook(lambda module, inputs, output, name=name: seen.append(name))
    with torch.no_grad():
        network(torch.randn(1, 3, 8, 8))
    assert sorted(seen) == ["", "0", "0.conv"]


def test_gradients_and_other_types_run_as_they_were() -> None:
    conv, packed = packed_conv(nn.SiLU())
    x = torch.randn(1, 8, 6, 6)
    packed(x).sum().backward()
    assert conv.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert packed(x).dtype == torch.bfloat16
    with torch.no_grad():
        assert packed.double()(x.double()).dtype == torch.float64
        assert packed.float()(x[:0]).shape == (0, 16, 6, 6)


def test_a_packed_network_is_copied_saved_and_traced() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(FusedConv(nn.Conv2d(3, 8, 3), nn.SiLU()))
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        expected = network(x)
        before = network.state_dict().keys()
        pack_convolutions(network)
        network(x)
        assert network.state_dict().keys() == before
        stored = io.BytesIO()
        torch.save(network, stored)
        stored.seek(0)
        for other in (copy.deepcopy(network), torch.load(stored, weights_only=False), torch.jit.trace(network, x)):
            torch.testing.assert_close(other(x), expected, rtol=1e-5, atol=1e-5)


def test_a_watched_convolution_is_left_alone() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding="same"), nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"))
    network[0].register_forward_hook(lambda module, inputs, output: None)
    pack_convolutions(network)
    assert not any(isinstance(m, PackedConv) for m in network.modules())
