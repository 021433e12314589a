"""Rows of same-width modules as people write them: each builds what was meant, or one line says what the module takes."""

from __future__ import annotations

import pytest
import torch

from models import build_model
from models.edit.rows import edit
from models.model import Model
from models.spec.parser import load_spec
from models.spec.planning import plan_layers
from models.spec.registry import BLOCKS
from models.transfer.transfer import Source, transfer
from tests.tiny import tiny_cfg
from utils.errors import UserError


def complaint(row: tuple) -> str:
    with pytest.raises(UserError) as caught:
        build_model(tiny_cfg(attention=row))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def planned(module: str, args: list) -> tuple:
    spec = load_spec({"nc": 2, "backbone": [[-1, 1, "Conv", [256, 3, 2]], [-1, 1, module, args]], "head": [[[0, 1], 1, "Detect", ["nc"]]]})
    plan = plan_layers(spec)[1]
    return plan.args, dict(plan.kwargs)


@pytest.mark.parametrize(("module", "args", "built"), [
    ("EMA", [256, 256], (256,)),  # widths in and out
    ("CoordAtt", [256, 256, 16], (256, 16)),
    ("GAM", [256, 256], (256,)),
    ("SimAM", [256, 256], (256,)),
    ("SimAM", [256, 1e-3], (256, 1e-3)),
    ("EMA", [256, 8], (256, 8)),
    ("NLBlockND", [256, 256, "dot"], (256, 256, "dot")),  # the second is the inner width
    ("NLBlockND", [128], (256, 128)),
    ("LSKA", [256, 11], (256, 11)),
])  # fmt: skip
def test_width_may_be_given_twice(module, args, built):
    assert planned(module, args) == (built, {})


@pytest.mark.parametrize(("row", "words"), [
    (("EMA", [{"factor": "abc"}]), ["[EMA]", "factor should be a whole number, not 'abc'", "factor=32"]),
    (("EMA", [{"factor": 8.5}]), ["a whole number, not 8.5"]),
    (("EMA", [{"factor": True}]), ["a whole number, not True"]),
    (("EMA", [[8]]), ["a whole number, not [8]"]),
    (("EMA", [{"factor": 0}]), ["factor should be at least 1, not 0"]),
    (("EMA", [8, {"factor": 8}]), ["multiple values", "it takes channels, factor=32"]),
    (("CBAM", [16, 5]), ["pool_types should be a list of avg, max, lp, lse, not 5"]),
    (("CBAM", [7, {"kernel_size": 3}]), ["kernel_size is given twice"]),
    (("CBAM", [{"kernel_size": 4}]), ["kernel_size should be odd, not 4"]),
    (("CloAttention", [{"group_split": 8}]), ["group_split should be None or a list of whole numbers, not 8"]),
    (("NLBlockND", [{"mode": 3}]), ["mode should be a word, not 3"]),
    (("BRA", [{"n_win": 0}]), ["n_win should be at least 1"]),
    (("BRA", [{"side_dwconv": 4}]), ["side_dwconv should be odd, not 4"]),
    (("ECA", [4]), ["k_size should be odd, not 4"]),
    (("CloAttention", [{"kernel_sizes": [4]}]), ["kernel_sizes should be odd, not [4]"]),
    (("MSDA", [{"dilation": [1, 0]}]), ["dilation should be at least 1, not [1, 0]"]),
    (("SK", [[1, 3]]), ["kernels [1, 3] should be odd, from 3 on"]),
    (("NLBlockND", [{"dimension": 3}]), ["over 3 dimensions", "4 axes"]),
    (("C2f_EMA", [16, True, {"facto": 8}]), ["no option 'facto'", "'factor'"]),
    (("C2f_EMA", [16, True, {"factor": "abc"}]), ["factor should be a whole number"]),
    (("C2f_EMA", [16, True, {"factor": 0}]), ["factor should be at least 1"]),
    (("Conv", [16, 3, {"k": "abc"}]), ["multiple values", "c2, k=1"]),
    (("Conv", [64, {"init": "identity"}]), ["init: identity", "keep their input's width"]),
])  # fmt: skip
def test_invalid_arguments_are_named(row, words):
    text = complaint(row)
    for word in ["row ", *words]:
        assert word in text


@pytest.mark.parametrize("row", [
    ("BRA", [{"num_heads": 2, "side_dwconv": 0}]), ("GE", [{"extent": 0}]), ("NLBlockND", [None, "dot"]), ("BiFormerBlock", [{"topk": -1}]),
    ("CloAttention", [{"num_heads": 4, "group_split": [0, 4]}]),
])  # fmt: skip
def test_zero_and_none_are_accepted_where_meaningful(row):
    build_model(tiny_cfg(attention=row))


@pytest.mark.parametrize(("written", "meant"), [
    ("C2f_EMMA", "C2f_EMA"), ("Konv", "Conv"),
])  # fmt: skip
def test_unknown_module_suggests_the_nearest(written, meant):
    with pytest.raises(KeyError, match=f"unknown module '{written}', did you mean '{meant}'.; a module of your own joins with --plugins"):
        BLOCKS[written]


def test_no_suggestion_without_a_near_name():
    with pytest.raises(KeyError, match="unknown module 'Xyzzyq'; a module"):
        BLOCKS["Xyzzyq"]


def test_weights_file_as_cfg_is_refused():
    with pytest.raises(UserError, match=r"best\.pt: holds weights.*model\.yaml"):
        load_spec("runs/exp/weights/best.pt")


@pytest.fixture(scope="module")
def trained() -> Model:
    torch.manual_seed(0)
    model = build_model(tiny_cfg(attention=("C2f", [32, True])))
    for tensor in model.parameters():
        tensor.data.add_(0.1 * torch.randn_like(tensor))
    return model.eval()


def into(trained: Model, replace: str) -> Model:
    model = Model(edit(trained.spec, replace=replace).spec, names=trained.names)
    moved(trained, model)
    return model.eval()


def moved(source: Model, target: Model) -> None:
    transfer(target, Source(source.state_dict(), source.spec.to_dict(), source.names))


def test_a_module_inside_a_block_starts_as_a_no_op(trained):
    """The identity start is the module's: the block around it keeps its trained weights and stays at work."""
    x = torch.rand(1, 3, 64, 96)
    plain, started = into(trained, "C2f=C2f_EMA@7"), into(trained, "C2f=C2f_EMA@7(init=identity)")
    expected = trained.predict(x)
    assert all(torch.equal(a, b) for a, b in zip(started.predict(x), expected))
    assert not all(torch.equal(a, b) for a, b in zip(plain.predict(x), expected))


@pytest.mark.parametrize("row", [("C2f_EMA", [64, True]), ("C3_SE", [64]), ("RepNCSPELAN4_CBAM", [64, 32, 16, 1])])
def test_a_module_inside_a_block_that_widens_starts_as_a_no_op(row):
    name, args = row
    started = build_model(tiny_cfg(attention=(name, [*args, {"init": "identity"}]))).model[7].eval()
    plain = build_model(tiny_cfg(attention=(name.split("_")[0], args))).model[7].eval()
    own, rest = started.load_state_dict(plain.state_dict(), strict=False)
    assert own
    assert all(".attention." in key for key in own)
    assert not rest
    x = torch.rand(1, 32, 5, 7)
    assert torch.equal(started(x), plain(x))


def test_identity_starts_inside_blocks_exchange_weights_with_plain_ones(trained):
    plain, started = into(trained, "C2f=C2f_EMA@7"), into(trained, "C2f=C2f_EMA@7(init=identity)")
    x = torch.rand(1, 3, 64, 96)
    moved(plain, started)  # its modules were at work
    assert started.model[7].m[0].attention.gamma.item() == 1
    for a, b in zip(started.predict(x), plain.predict(x)):
        torch.testing.assert_close(a, b)
    started.model[7].m[0].attention.gamma.data.fill_(0.5)
    again = into(trained, "C2f=C2f_EMA@7(init=identity)")
    moved(started, again)
    assert again.model[7].m[0].attention.gamma.item() == 0.5
    other = into(trained, "C2f=C2f_SE@7(init=identity)")
    moved(plain, other)  # nothing of EMA fits into SE
    assert other.model[7].m[0].attention.gamma.item() == 0
