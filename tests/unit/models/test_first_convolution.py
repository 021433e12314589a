"""A network's first convolution for another number of input channels: the same response to grey images, in every family."""

import pytest
import torch

from models import build_model
from models.transfer.first_convolution import adapted_tensor, adapted_to_channels, first_convolutions
from models.transfer.report import ADAPTED
from models.transfer.transfer import Source, transfer
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
    def test_response_to_equal_channels_is_unchanged(self, have, wanted):
        weight = torch.randn(7, have, 3, 3, generator=torch.Generator().manual_seed(0))
        adapted = adapted_to_channels(weight, wanted)
        assert adapted.shape == (7, wanted, 3, 3)
        torch.testing.assert_close(adapted.sum(1), weight.sum(1))

    def test_rgb_weights_are_kept_and_further_channels_get_their_mean(self):
        weight = torch.randn(2, 3, 3, 3)
        adapted = adapted_to_channels(weight, 5)
        torch.testing.assert_close(adapted[:, :3], weight * 3 / 5)
        torch.testing.assert_close(adapted[:, 3], weight.mean(1) * 3 / 5)
        torch.testing.assert_close(adapted[:, 4], adapted[:, 3])

    def test_dtype_is_kept_and_equal_channels_are_returned_unchanged(self):
        weight = torch.randn(2, 3, 1, 1, dtype=torch.float16)
        assert adapted_to_channels(weight, 1).dtype == torch.float16
        assert adapted_to_channels(weight, 3) is weight


@torch.no_grad()
@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("ch", [1, 5])
def test_adapted_network_gives_the_same_output_on_grey_images(stem, ch):
    rgb = network(stem, 3)
    other = build_model({**rgb.spec.to_dict(), "ch": ch})
    report = transfer(other, Source(rgb.state_dict(), rgb.spec.to_dict()))
    own = {name for name, value in other.state_dict().items() if value.shape == rgb.state_dict()[name].shape}
    assert report.filled == own  # what is adapted is not held in whole: --freeze pretrained trains it
    (row,) = report.having(ADAPTED)
    assert row.note == f"first convolution adapted from 3 to {ch} input channels"
    assert row.note in str(report)
    assert report.of_target == 1.0
    assert report.of_source <= 1.0
    grey = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    expected, found = rgb.predict(grey.expand(-1, 3, -1, -1)), other.eval().predict(grey.expand(-1, ch, -1, -1))
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.boxes, expected.boxes, rtol=1e-5, atol=1e-4)


def test_every_branch_that_reads_the_image_is_adapted():
    assert first_convolutions(network("convolution", 3)) == {"model.0.conv.weight"}
    assert first_convolutions(network("space into channels", 3)) == {"model.1.conv.weight"}
    assert len(first_convolutions(network("several branches", 3))) == 2


def test_other_shape_differences_are_not_adapted():
    weight = torch.ones(8, 3, 3, 3)
    assert adapted_tensor(weight, (8, 4, 3, 3), channels=(3, 4)).shape == (8, 4, 3, 3)
    for shape, channels in (((9, 4, 3, 3), (3, 4)), ((8, 4, 5, 5), (3, 4)), ((8, 6, 3, 3), (3, 4)), ((8, 4, 3, 3), (1, 4)), ((8,), (3, 4))):
        assert adapted_tensor(weight, shape, channels=channels) is None
    same = network("convolution", 4)
    assert "adapted" not in str(transfer(network("convolution", 4), Source(same.state_dict(), same.spec.to_dict())))


@pytest.mark.slow
@pytest.mark.parametrize(
    "cfg", ["yolov5n.yaml", "yolov5n6.yaml", "yolov7-tiny.yaml", "yolov7-w6.yaml", "yolov8n.yaml", "yolov9-t.yaml", "yolov9-e.yaml"]
)
def test_first_convolution_is_adapted_in_every_family(cfg):
    rgb, model = build_model(cfg), build_model(cfg, ch=4)
    report = transfer(model, Source(rgb.state_dict(), rgb.spec.to_dict()))
    assert report.having(ADAPTED)
    assert report.of_target == 1.0
