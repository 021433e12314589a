"""YOLOv13: hypergraphs against their formulas, HyperACE at any sizes and scales, and checkpoints of its authors' repository."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models import build_model, load_model
from models.layers.attention.yolov13 import AdaHGComputation, AdaHGConv, AdaHyperedgeGen, DSConv
from models.necks.hyperace import FullPADTunnel, HyperACE, halve
from models.spec.parser import load_spec, read_spec
from models.spec.planning import plan_layers
from tests.foreign_models import convert_model, layout, randomize_
from tests.golden import fill_
from tests.unit.models.test_foreign_turbo import split_
from utils.errors import UserError

PIXELS, CHANNELS, HEADS, EDGES = 12, 8, 2, 3
# YOLOv13 with half of its widths, at the scale whose blocks are the larger ones
SMALL = {**load_spec("yolov13n").to_dict(), "nc": 2, "scales": {"l": [0.5, 0.25, 1024]}, "scale": "l"}


def participation_by_head(generator: AdaHyperedgeGen, pixels: torch.Tensor) -> torch.Tensor:
    """Section 3.2 with a loop: similarity of each head, their mean, a softmax over the pixels."""
    context = {"mean": [pixels.mean(1)], "max": [pixels.max(1).values]}
    context["both"] = context["mean"] + context["max"]
    offsets = generator.context_net(torch.cat(context[generator.context], 1)).view(len(pixels), EDGES, CHANNELS)
    prototypes, queries = generator.prototype_base + offsets, generator.pre_head_proj(pixels)
    size = CHANNELS // HEADS
    parts = [slice(head * size, (head + 1) * size) for head in range(HEADS)]
    by_head = [queries[..., part] @ prototypes[..., part].transpose(1, 2) / size**0.5 for part in parts]
    return torch.stack(by_head).mean(0).softmax(1)


@pytest.mark.parametrize("context", ["mean", "max", "both"])
@torch.no_grad()
def test_participation_is_the_mean_over_heads_softmaxed_over_pixels(context):
    generator = fill_(AdaHyperedgeGen(CHANNELS, EDGES, HEADS, context=context)).eval()
    pixels = torch.randn(2, PIXELS, CHANNELS, generator=torch.Generator().manual_seed(0))
    found = generator(pixels)
    torch.testing.assert_close(found, participation_by_head(generator, pixels))
    torch.testing.assert_close(found.sum(1), torch.ones(2, EDGES))


@torch.no_grad()
def test_hypergraph_convolution_gathers_and_spreads():
    conv = fill_(AdaHGConv(CHANNELS, EDGES, HEADS)).eval()
    pixels = torch.randn(1, PIXELS, CHANNELS, generator=torch.Generator().manual_seed(1))
    weights = conv.edge_generator(pixels)[0]
    edges = torch.stack([(weights[:, e, None] * pixels[0]).sum(0) for e in range(EDGES)])
    spread = torch.stack([(weights[n, :, None] * conv.edge_proj(edges)).sum(0) for n in range(PIXELS)])
    torch.testing.assert_close(conv(pixels), pixels + conv.node_proj(spread))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_heads": 3}, "3 heads should divide 8 channels"),
        ({"num_hyperedges": 0}, "num_hyperedges should be at least 1, not 0"),
        ({"context": "median"}, "context should be one of mean, max, both, not 'median'"),
    ],
)
def test_options_out_of_range_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        AdaHGComputation(CHANNELS, **options)


def test_similarities_are_dropped_in_training_only():
    module = fill_(AdaHGComputation(CHANNELS, EDGES, dropout=0.5))
    x = torch.randn(1, CHANNELS, 4, 4)
    assert not torch.equal(module.train()(x), module(x))
    assert torch.equal(module.eval()(x), module(x))


@pytest.mark.parametrize(
    ("scale", "edges", "coarse"), [("n", 4, (128, 256)), ("s", 8, (256, 512)), ("l", 8, (512, 512)), ("x", 12, (768, 768))]
)
def test_hyperedges_and_widths_follow_the_scale(scale, edges, coarse):
    plans = plan_layers(load_spec(f"yolov13{scale}"))
    assert plans[9].args[3] == edges
    assert plans[11].args == coarse
    assert plans[4].args[3] is (scale in "lx")
    assert plans[6].kwargs.get("mlp_ratio") == (1.5 if scale in "lx" else None)
    with torch.device("meta"):
        row = build_model(f"yolov13{scale}").model[9]
    assert row.branch1.m.hgnn.edge_generator.prototype_base.shape == (edges, coarse[0] // 2)


def test_a_number_of_hyperedges_given_by_name_is_taken_as_it_is():
    data = load_spec("yolov13n").to_dict()
    data["head"][0][3] = [512, {"num_hyperedges": 5}]
    plan = plan_layers(read_spec(data, origin="mine.yaml"))[9]
    assert plan.kwargs["num_hyperedges"] == 5


@torch.no_grad()
def test_levels_of_odd_sizes_are_joined():
    neck = fill_(HyperACE((4, 6, 8), 16, num_hyperedges=EDGES)).eval()
    maps = [torch.randn(2, c, h, w) for c, h, w in ((4, 13, 9), (6, 7, 5), (8, 4, 3))]
    assert neck(maps).shape == (2, 16, 7, 5)
    assert halve(maps[0]).shape == (2, 4, 7, 5)
    torch.testing.assert_close(halve(maps[0])[..., -1, -1], maps[0][..., -1, -1])  # the mean of the one pixel that is there
    torch.testing.assert_close(halve(maps[0])[..., 0, 0], maps[0][..., :2, :2].mean((2, 3)))


def test_levels_in_the_wrong_order_are_named():
    neck = HyperACE((4, 6, 8), 16, num_hyperedges=EDGES).eval()
    with pytest.raises(ValueError, match="reads its levels from fine to coarse, got 3x3, 7x5, 13x9"):
        neck([torch.zeros(1, c, h, w) for c, h, w in ((4, 3, 3), (6, 7, 5), (8, 13, 9))])


def test_what_hyperace_gives_is_added_by_a_gate_that_starts_closed():
    tunnel, own, other = FullPADTunnel(), torch.randn(1, 3, 2, 2), torch.randn(1, 3, 2, 2)
    assert torch.equal(tunnel([own, other]), own)
    nn.init.constant_(tunnel.gate, 0.5)
    torch.testing.assert_close(tunnel([own, other]), own + other / 2)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ([[0, 1], 1, "HyperACE", [32]], r"reads 3 levels, from fine to coarse, not 2"),
        ([[0, 1, 2], 1, "HyperACE", []], r"expects its output width as the first argument, not 'nothing'"),
        ([[0, 1], 1, "FullPAD_Tunnel", []], r"adds its inputs, whose widths differ"),
    ],
)
def test_rows_that_do_not_fit_are_named(row, says):
    backbone = [[-1, 1, "Conv", [8, 3, 8]], [-1, 1, "DSConv", [16, 3, 2]], [-1, 1, "DSConv", [32, 3, 2]]]
    data = {"nc": 2, "backbone": backbone, "head": [row, [[0, 1, 2], 1, "Detect", ["nc"]]]}
    with pytest.raises(UserError, match=rf"mine\.yaml: row 3 \[{row[2]}\]: {says}"):
        plan_layers(read_spec(data, origin="mine.yaml"))


@torch.no_grad()
def test_separable_convolutions_fold_their_batch_norm():
    conv = randomize_(DSConv(4, 6, 3, 2)).eval()
    x = torch.randn(2, 4, 9, 7)
    torch.testing.assert_close(conv.fused()(x), conv(x), rtol=1e-4, atol=1e-5)
    assert not [m for m in conv.fused().modules() if isinstance(m, nn.BatchNorm2d)]


@torch.no_grad()
def test_the_deployed_network_predicts_the_same():
    model = randomize_(build_model("yolov13n.yaml", nc=2)).eval()
    images = torch.rand(1, 3, 64, 96)
    lean = model.deploy()
    assert len(lean.model) == len(model.model)
    torch.testing.assert_close(lean.predict(images).scores, model.predict(images).scores, rtol=1e-3, atol=1e-4)


def test_every_parameter_learns_once_the_gates_are_open():
    model = build_model(SMALL)
    for layer in model.model:
        if isinstance(layer, FullPADTunnel):
            nn.init.ones_(layer.gate)
    features = model.train()(torch.rand(2, 3, 64, 64))
    sum(level.square().sum() for branch in features.branches for level in branch).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())] == []


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_a_checkpoint_of_its_authors_predicts_what_its_parts_give(tmp_path):
    """Theirs has queries and keys apart from values, and the form of A2C2f in code, where it stands in the rows here."""
    own = randomize_(build_model(SMALL))
    raw = {**SMALL, "backbone": [[*row[:3], [a for a in row[3] if not isinstance(a, dict)]] for row in SMALL["backbone"]]}
    with layout("ultralytics") as classes:
        model = convert_model(own, classes, names={0: "a", 1: "b"}, raw=raw)
        for name, module in list(model.named_modules()):
            if name.endswith(".attn"):
                split_(module)
        torch.save({"model": model}, tmp_path / "yolov13l.pt")
    loaded = load_model(tmp_path / "yolov13l.pt")
    assert loaded.plans[6].kwargs["mlp_ratio"] == 1.5
    assert loaded.model[6].m[0][0].attn.pe.conv.kernel_size == (5, 5)
    images = torch.rand(1, 3, 64, 96)
    assert torch.equal(loaded.predict(images).boxes, own.eval().predict(images).boxes)
