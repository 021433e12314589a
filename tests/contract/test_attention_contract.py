"""What every attention module promises, checked for every registered name: a new module is covered by being in the registry.

``--plugins my_blocks.py -k MyBlock`` checks a module of your own.
"""

from __future__ import annotations

import copy
import inspect
import io
import warnings
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.analysis.catalogue import build_same_width, same_width_names
from models.layers.attention.nonlocal_block import MODES, NLBlockND
from models.spec import channel_rules as rules
from models.spec.registry import BLOCKS
from tests.cuda_casts import CudaCasts
from tests.fake_cuda import DeviceRecord, fake_cuda
from tests.golden import assert_close, fill_

CHANNELS = 32
HALF_MAX = 65504.0
SIZES = ((7, 5), (13, 20), (20, 20), (1, 1))
PART_A = ("FocalModulation", "FocalModulationBlock", "BiLevelRoutingAttention", "nchwBRA", "BiFormerBlock", "BiFormerBlockNCHW",
          "CloAttention", "ConvFFN", "CloBlock", "NLBlockND", "MHSA", "BottleneckTransformer", "BoT3", "BoTPaperAttention")  # fmt: skip


def build(name: str, channels: int = CHANNELS) -> nn.Module:
    """The block as a YAML row with no arguments (or only its width) builds it, with filled weights."""
    torch.manual_seed(0)
    return fill_(build_same_width(name, channels)).eval()


def sample(height: int, width: int, *, batch: int = 1, channels: int = CHANNELS, seed: int = 0) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))


def each_block(only: Callable[[str], bool] = lambda name: True) -> pytest.MarkDecorator:
    """Runs a test over all names."""
    return pytest.mark.parametrize("name", list(filter(only, same_width_names())))


def compiled_cases() -> pytest.MarkDecorator:
    """As each_block; the costly checks run with ``-m slow``, except for part A and for blocks of the user's own."""
    cases = [name if _always(name) else pytest.param(name, marks=pytest.mark.slow) for name in same_width_names()]
    return pytest.mark.parametrize("name", cases)


def _always(name: str) -> bool:
    return name in PART_A or not BLOCKS[name].built_in


def step(module: nn.Module, x: Tensor) -> Tensor:
    """One plain training step; returns the loss."""
    x = x.requires_grad_()  # a module without parameters has something to differentiate, too
    optimizer = torch.optim.SGD([*module.parameters(), x], lr=1e-4)
    loss = module(x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def test_registry_contains_attention_modules():
    assert {"FocalModulation", "FocalModulationBlock"} <= set(same_width_names())


@each_block()
def test_any_size_gives_the_same_shape_dtype_and_finite_values(name):
    module = build(name)
    for height, width in SIZES:
        x = sample(height, width)
        with torch.no_grad():
            y = module(x)
        assert y.shape == x.shape
        assert y.dtype == x.dtype
        assert y.device == x.device
        assert torch.isfinite(y).all(), f"{height}x{width}"


@each_block()
def test_runs_on_the_meta_device(name):
    """Built, run and differentiated on the meta device, as dry runs and counts of operations do."""
    with torch.device("meta"):
        module = build_same_width(name, CHANNELS)
        for is_training in (True, False):
            for height, width in SIZES[:3]:
                x = torch.empty(2, CHANNELS, height, width, requires_grad=True)
                y = module.train(is_training)(x)
                assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
                y.sum().backward()
                assert x.grad is not None
                assert x.grad.shape == x.shape
                assert all(p.grad is not None for p in module.parameters())


@each_block()
def test_calls_keep_no_state(name):
    module = build(name)
    before = [(k, sorted(vars(m))) for k, m in module.named_modules()]
    weights = copy.deepcopy(module.state_dict())
    x = sample(13, 20)
    with torch.no_grad():
        first = module(x)
        module(sample(20, 20, batch=2, seed=1))
        again = module(x)
    assert torch.equal(first, again)
    assert [(k, sorted(vars(m))) for k, m in module.named_modules()] == before
    assert all(torch.equal(v, weights[k]) for k, v in module.state_dict().items())


@each_block()
def test_images_of_a_batch_are_independent(name):
    module = build(name)
    x = sample(13, 20, batch=2)
    with torch.no_grad():
        both, second = module(x), module(x[1:])
    assert_close(both[1:], second, 1e-5, name)


@each_block()
def test_every_parameter_and_the_input_get_a_gradient(name):
    module = build(name).train()
    x = sample(13, 20, batch=2).requires_grad_()
    kept = x.detach().clone()
    module(x).square().mean().backward()
    assert torch.equal(x.detach(), kept), "the input was overwritten"
    missing = [k for k, p in module.named_parameters() if p.grad is None]
    assert not missing, f"no gradient for {missing}"
    broken = [k for k, p in module.named_parameters() if not torch.isfinite(p.grad).all()]
    assert not broken, f"non-finite gradient for {broken}"
    assert x.grad is not None
    assert x.grad.abs().max() > 0


@each_block()
def test_batch_of_one_through_batch_norm_gives_the_gradients_of_two_equal_images(name):
    """torch's batch norm on CPUs is silently wrong where one image's gradient has a stride of the batch that its view made up."""
    net = nn.Sequential(fill_(nn.BatchNorm2d(CHANNELS)), build(name)).eval()
    image, weight = sample(9, 7), sample(9, 7, seed=1)
    grads = []
    for batch in (1, 2):
        x = image.repeat(batch, 1, 1, 1).requires_grad_()
        of_x, *others = torch.autograd.grad((net(x) * weight).sum() / batch, [x, *net.parameters()])
        grads.append([of_x.sum(0, keepdim=True), *others])
    for one, two in zip(*grads):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3 * max(1.0, float(two.abs().max())))


class RangeCheck(TorchDispatchMode):
    """Remembers the largest finite magnitude that any operator gave; -inf (a mask) fits every type."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.operator = 0.0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
                largest = float(value.detach().masked_fill(value == -torch.inf, 0).abs().max())
                if not largest <= self.largest:
                    self.largest, self.operator = largest, str(func)
        return result


@each_block()
def test_activations_stay_within_half_precision_range(name):
    module = build(name)
    with torch.no_grad(), RangeCheck() as seen:
        module(4 * sample(24, 24))
    assert seen.largest < HALF_MAX, f"{seen.operator} gives {seen.largest:.3g}"


@each_block()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_finite(name, dtype):
    """float16 with the casts of a GPU, where it is used."""
    module = build(name).train()
    x = sample(13, 20, batch=2).requires_grad_()
    with CudaCasts() if dtype is torch.float16 else nullcontext(), torch.autocast("cpu", dtype=dtype):
        y = module(x)
    assert torch.isfinite(y).all()
    y.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("mode", MODES)
def test_a_non_local_block_holds_features_in_the_hundreds(mode):
    """Under float16, with the batch norm that follows the sum; as published, ``dot`` multiplies three features."""
    module = fill_(NLBlockND(64, mode=mode)).train()
    x = (200 * sample(16, 16, batch=2, channels=64)).requires_grad_()
    with CudaCasts(), torch.autocast("cpu", dtype=torch.float16):
        y = module(x.half())
    y.float().square().mean().backward()
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())


@each_block()
def test_half_weights_and_input_give_half_output(name):
    module = build(name)
    x = sample(13, 20)
    with torch.no_grad():
        y = copy.deepcopy(module).half()(x.half())
    assert y.dtype == torch.float16
    assert torch.isfinite(y).all()


@each_block()
def test_can_be_copied_and_saved_after_a_training_step(name):
    module = build(name).train()
    fresh = io.BytesIO()
    torch.save(module.state_dict(), fresh)
    step(module, sample(13, 20, batch=2))
    twin = copy.deepcopy(module).eval()
    whole, weights = io.BytesIO(), io.BytesIO()
    torch.save(module, whole)
    torch.save(module.state_dict(), weights)
    assert weights.tell() == fresh.tell()
    weights.seek(0)
    other = build(name)
    other.load_state_dict(torch.load(weights, weights_only=True))
    x = sample(13, 20)
    with torch.no_grad():
        expected = module.eval()(x)
        assert torch.equal(twin(x), expected)
        assert torch.equal(other(x), expected)


@each_block()
def test_trains_with_deterministic_algorithms(name):
    grads = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            module = build(name).train()
            x = sample(13, 20, batch=2).requires_grad_()
            torch.manual_seed(1)
            module(x).square().mean().backward()
            grads.append([x.grad, *(p.grad for p in module.parameters())])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@each_block()
def test_runs_on_the_fake_cuda_device_without_sync(name, monkeypatch):
    """Values equal the CPU's, no tensor stays on the CPU, nothing synchronises, and every kernel is deterministic on CUDA."""
    module, far = build(name).train(), build(name).train()
    x = sample(13, 20, batch=2).requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        torch.manual_seed(1)
        expected = module(x)
        expected.square().mean().backward()
        with fake_cuda(monkeypatch) as seen:
            far, x_far = far.to("cuda"), x.detach().to("cuda").requires_grad_()
            torch.manual_seed(1)
            y = far(x_far)
            y.square().mean().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == DeviceRecord()
    assert_close(y.host, expected, 1e-5, name)
    assert_close(x_far.grad.host, x.grad, 1e-4, name)
    noise = 1e-6 * max((p.grad.abs().max() for p in module.parameters()), default=0.0)  # a bias before a softmax has no gradient
    for (key, parameter), other in zip(module.named_parameters(), far.parameters()):
        torch.testing.assert_close(other.grad.host, parameter.grad, rtol=1e-4, atol=float(noise), msg=key)


@compiled_cases()
def test_compiles_without_graph_breaks(name):
    torch._dynamo.reset()
    module = build(name)
    x = sample(13, 20)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(x), module(x), 1e-4, name)


@compiled_cases()
@pytest.mark.filterwarnings("ignore")
def test_traces_for_other_sizes(name):
    module = build(name)
    with torch.no_grad():
        traced = torch.jit.trace(module, sample(13, 20), check_trace=False)
        for height, width in ((13, 20), (20, 20), (7, 9)):
            x = sample(height, width, batch=2)
            assert_close(traced(x), module(x), 1e-4, f"{name} {height}x{width}")


class ReadsSize(nn.Module):
    """The module where it stands in a network: what follows reads its output's height and width, as heads and up-sampling do.

    An exporter that takes these for constants gives a file that is right for the module alone, and fails in every network.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        y = self.module(x)
        return y + torch.arange(y.shape[2])[:, None] + torch.arange(y.shape[3])


@compiled_cases()
@pytest.mark.filterwarnings("ignore")
def test_exports_to_onnx_with_dynamic_size(name):
    onnxruntime = pytest.importorskip("onnxruntime")
    module, file = ReadsSize(build(name)).eval(), io.BytesIO()
    axes = {"x": {0: "batch", 2: "height", 3: "width"}, "y": {0: "batch", 2: "height", 3: "width"}}
    torch.onnx.export(
        module, (sample(13, 20),), file, opset_version=17, input_names=["x"], output_names=["y"], dynamic_axes=axes, dynamo=False
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    for height, width in ((13, 20), (20, 20), (7, 9)):
        x = sample(height, width, batch=2)
        (got,) = session.run(None, {"x": x.numpy()})
        with torch.no_grad():
            assert_close(np.asarray(got), module(x), 1e-4, f"{name} {height}x{width}")


@each_block()
def test_every_option_has_a_default(name):
    """A row needs no more than its width: every constructor argument after the channels has a default."""
    spec = BLOCKS[name]
    positional = 1 if spec.channels is rules.same_width else 2
    parameters = list(inspect.signature(spec.cls).parameters.values())[positional:]
    assert all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


@pytest.mark.gpu
@pytest.mark.usefixtures("exact_float32")
@each_block()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_and_trains_in_half_precision(name):
    module = build(name)
    x = sample(20, 20, batch=2)
    expected = module(x)
    module = module.cuda()
    assert_close(module(x.cuda()).cpu(), expected, 1e-3, name)
    module.train()
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cuda", dtype=dtype):
            loss = module(x.cuda()).square().mean()
        loss.backward()
        assert torch.isfinite(loss)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in same_width_names() if name in PART_A])
def test_inductor_agrees(name):
    torch._dynamo.reset()
    module = build(name)
    x = sample(13, 20)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        assert_close(torch.compile(module, fullgraph=True)(x), module(x), 1e-3, name)
