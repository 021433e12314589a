"""A network's first convolution for another number of input channels: the same response to grey pictures, in every family."""

import pytest
import torch

from models import build_model
from models.checkpoints import transfer_weights
from models.first_convolution import adapted_to_channels, adapted_weights
from tests.golden import fill_

CONV, HEAD = [[-1, 1, "Conv", [16, 3, 2]]], [[-1, 1, "DDetect", ["nc"]]]
STEMS = {
    "convolution": [[-1, 1, "Conv", [8, 3, 2]]],
    "space into channels": [[-1, 1, "ReOrg", []], [-1, 1, "Conv", [8, 3, 1]]],
    "space into channels inside": [[-1, 1, "Focus", [8, 3]]],
    "through an identity row": [[-1, 1, "Silence", []], [-1, 1, "Conv", [8, 3, 2]]],
    "several branches": [[-1, 1, "RepConv", [8, 3, 2]]],
}


def network(stem, ch):
    cfg = {"nc": 2, "depth_multiple": 1.0, "width_multiple": 1.0, "anchors": 3, "backbone": STEMS[stem] + CONV, "head": HEAD}
    model = build_model(cfg, ch=ch)
    fill_(model, 1.35)
    return model.eval()


class TestWeight:
    @pytest.mark.parametrize("have", [1, 2, 3, 4, 6])
    @pytest.mark.parametrize("wanted", [1, 2, 3, 4, 5, 12])
    def test_response_to_equal_channels_stays(self, have, wanted):
        weight = torch.randn(7, have, 3, 3, generator=torch.Generator().manual_seed(0))
        adapted = adapted_to_channels(weight, wanted)
        assert adapted.shape == (7, wanted, 3, 3)
        torch.testing.assert_close(adapted.sum(1), weight.sum(1))

    def test_rgb_is_kept_and_the_rest_is_its_mean(self):
        weight = torch.randn(2, 3, 3, 3)
        adapted = adapted_to_channels(weight, 5)
        torch.testing.assert_close(adapted[:, :3], weight * 3 / 5)
        torch.testing.assert_close(adapted[:, 3], weight.mean(1) * 3 / 5)
        torch.testing.assert_close(adapted[:, 4], adapted[:, 3])

    def test_type_and_identity(self):
        weight = torch.randn(2, 3, 1, 1, dtype=torch.float16)
        assert adapted_to_channels(weight, 1).dtype == torch.float16
        assert adapted_to_channels(weight, 3) is weight


@torch.no_grad()
@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("ch", [1, 5])
def test_grey_pictures_give_the_same(stem, ch):
    rgb = network(stem, 3)
    other = build_model({**rgb.spec.to_dict(), "ch": ch})
    result = transfer_weights(other, rgb.state_dict())
    assert result.matched == result.total
    assert result.missing == ()
    expected_names = 2 if stem == "several branches" else 1
    assert len(result.adapted) == expected_names
    said = f"transferred {result.total} of {result.total} tensors; {', '.join(result.adapted)} adapted from 3 to {ch} input channels"
    assert str(result) == said
    grey = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    expected, found = rgb.predict(grey.expand(-1, 3, -1, -1)), other.eval().predict(grey.expand(-1, ch, -1, -1))
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.boxes, expected.boxes, rtol=1e-5, atol=1e-4)


def test_same_channels_and_foreign_shapes_are_left_alone():
    model, weights = network("convolution", 4), network("convolution", 3).state_dict()
    assert adapted_weights(model, weights, in_channels=4) == {}
    assert list(adapted_weights(model, weights)) == ["model.0.conv.weight"]
    wider = {**weights, "model.0.conv.weight": torch.zeros(9, 3, 3, 3)}
    assert adapted_weights(model, wider) == {}
    assert "adapted" not in str(transfer_weights(network("convolution", 3), weights))


@pytest.mark.slow
@pytest.mark.parametrize(
    "cfg", ["yolov5n.yaml", "yolov5n6.yaml", "yolov7-tiny.yaml", "yolov7-w6.yaml", "yolov8n.yaml", "yolov9-t.yaml", "yolov9-e.yaml"]
)
def test_every_family(cfg):
    weights, model = build_model(cfg).state_dict(), build_model(cfg, ch=4)
    unlike = {name for name, value in model.state_dict().items() if value.shape != weights[name].shape}
    assert unlike
    assert set(adapted_weights(model, weights)) == unlike
