"""Checkpoints of YOLOv12's own repository: its later release holds queries and keys apart from the values, and has smaller kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import build_model, load_model
from models.checkpoints.turbo_release import with_joined_projections
from models.layers.attention.yolov12 import AreaAttention
from tests.foreign_models import convert_model, layout, randomize_
from utils.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
SCALES = {"n": [0.5, 0.25, 1024]}
TURBO = {
    "nc": 2, "scales": SCALES, "scale": "n",
    "backbone": [[-1, 1, "Conv", [64, 3, 2]], [-1, 1, "Conv", [128, 3, 2, 1, 2]], [-1, 1, "Conv", [256, 3, 2, 1, 4]],
                 [-1, 2, "A2C2f", [512, True, 4]], [-1, 1, "Conv", [512, 3, 2]], [-1, 2, "A2C2f", [512, True, 1]]],
    "head": [[[3, 5], 1, "Detect", ["nc"]]],
}  # fmt: skip


def own_form() -> dict:
    """The YAML with what the turbo release has in its code."""
    rows = [[*row[:3], [*row[3], {"position_kernel": 5}]] if row[2] == "A2C2f" else row for row in TURBO["backbone"]]
    return {**TURBO, "backbone": rows}


def split_(attention: nn.Module) -> None:
    """Puts ``qk`` and ``v`` in the place of ``qkv``, all queries first, then all keys, as the turbo release stores them."""
    joined = attention._modules.pop("qkv")
    rest = dict(attention._modules)
    attention._modules.clear()
    for name, kept in (("qk", (0, 1)), ("v", (2,))):
        part = type(joined)()
        part._modules["conv"] = nn.Conv2d(1, 1, 1, bias=False)
        part._modules["bn"] = nn.BatchNorm2d(1, eps=1e-3, momentum=0.03)
        for layer, old in (("conv", joined.conv), ("bn", joined.bn)):
            for key, value in old.state_dict().items():
                apart = value if value.dim() == 0 else torch.cat([value.unflatten(0, (-1, 3, 32))[:, i].flatten(0, 1) for i in kept])
                table = part._modules[layer]._parameters if key in part._modules[layer]._parameters else part._modules[layer]._buffers
                table[key] = nn.Parameter(apart) if table is part._modules[layer]._parameters else apart
        part._modules["act"] = nn.Identity()
        attention._modules[name] = part
    attention._modules.update(rest)


def test_a_turbo_checkpoint_predicts_what_its_parts_give(tmp_path):
    own = randomize_(build_model(own_form()))
    with layout("ultralytics") as classes:
        model = convert_model(own, classes, names={0: "a", 1: "b"}, raw=TURBO)
        for name, module in list(model.named_modules()):
            if name.endswith(".attn"):
                split_(module)
        assert "model.3.m.0.0.attn.qk.conv.weight" in model.state_dict()
        torch.save({"model": model}, tmp_path / "yolov12n.pt")
    loaded = load_model(tmp_path / "yolov12n.pt")
    assert loaded.model[3].m[0][0].attn.pe.conv.kernel_size == (5, 5)
    assert loaded.model[1].conv.groups == 2
    images = torch.rand(1, 3, 64, 96)
    assert torch.equal(loaded.predict(images).boxes, own.eval().predict(images).boxes)


@pytest.mark.parametrize("area", [1, 4])
@torch.no_grad()
def test_joined_projections_compute_what_the_two_convolutions_did(area):
    qk, v, x = torch.randn(128, 64, 1, 1), torch.randn(64, 64, 1, 1), torch.randn(2, 64, 4, 8)
    attention = AreaAttention(64, None, area, position_kernel=5).eval()
    joined = with_joined_projections({"m.attn.qk.conv.weight": qk, "m.attn.v.conv.weight": v})
    assert list(joined) == ["m.attn.qkv.conv.weight"]
    attention.qkv.conv.weight.copy_(joined["m.attn.qkv.conv.weight"])
    attention.qkv.bn, attention.proj, attention.pe = nn.Identity(), nn.Identity(), nn.Identity()

    def heads(maps: Tensor) -> Tensor:  # (B, C, H, W) -> (B area, 2, N, 32)
        return maps.flatten(2).mT.reshape(2 * area, 32 // area, 2, 32).transpose(1, 2)

    queries, keys = F.conv2d(x, qk).chunk(2, 1)
    values = F.conv2d(x, v)
    out = (heads(queries) @ heads(keys).mT / 32**0.5).softmax(-1) @ heads(values)
    out = out.transpose(1, 2).reshape(2, 32, 64).mT.reshape(2, 64, 4, 8)
    torch.testing.assert_close(attention(x), out + values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("values", [torch.zeros(48, 64, 1, 1), torch.zeros(64, 32, 1, 1), torch.zeros(())])
def test_projections_that_do_not_belong_together_are_refused(values):
    with pytest.raises(UserError, match=r"m\.attn\.qk\.conv\.weight: of shape .* expected twice as many channels"):
        with_joined_projections({"m.attn.qk.conv.weight": torch.zeros(128, 64, 1, 1), "m.attn.v.conv.weight": values})
