"""Class activation maps: equal to the package grad-cam's where both define the same, and right on small cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.analysis.class_activation import METHODS, combined, method_of, scaled
from models.analysis.explained_targets import Target
from models.analysis.tracing import check_rows, head_rows, row_title, trace
from tests.golden import assert_close, find, image_array
from tests.tiny import DUAL_HEAD, tiny_model
from utils.errors import UserError

GOLDEN = ("explain", "grad_cam")


@pytest.fixture(scope="module")
def golden():
    return find(*GOLDEN)


@pytest.fixture(scope="module")
def traced(golden):
    """Maps and gradients of the rows that the golden vector was made for, for its target."""
    model = tiny_model(head=DUAL_HEAD)
    rows = head_rows(model)
    found = trace(model, image_array(7, (1, 3, 96, 128)), rows)
    target = Target(golden.tensor("candidates"), golden.tensor("classes"))
    gradients = found.gradients(target.value(found.predictions, (96, 128)))
    return {row: (found.maps[row][0].detach(), gradients[row][0]) for row in rows}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("row", [3, 4, 7])
def test_map_equals_that_of_grad_cam(golden, traced, method, row):
    ours, theirs = METHODS[method](*traced[row]), golden.tensor(f"{method}.{row}")
    if method == "eigencam":  # a component has no sign there
        theirs = max((theirs, -theirs), key=lambda one: float((one.clamp(min=0) * ours).sum()))
    assert ours.max() > 0 or theirs.max() <= 0
    assert_close(ours, theirs.clamp(min=0), tol=2e-3 if method == "eigencam" else 1e-4, what=f"{method} of row {row}")


@pytest.mark.parametrize("method", ["layercam", "hirescam"])
def test_rows_together_equal_those_of_grad_cam(golden, traced, method):
    cams = [METHODS[method](*pair) for pair in traced.values()]
    together = combined([cam - cam.min() for cam in cams], (96, 128))  # there the least of a map becomes 0
    assert_close((together - together.min()) / (1 - together.min()), golden.tensor(f"{method}.together"), tol=1e-3)


def spike(channels: int = 2, at: tuple[int, int] = (1, 2)) -> Tensor:
    one = torch.zeros(channels, 4, 5)
    one[0, at[0], at[1]] = 1.0
    return one


@pytest.mark.parametrize("method", [name for name in METHODS if name != "eigencam"])
def test_map_is_zero_without_gradient(method):
    assert METHODS[method](torch.rand(3, 4, 5), torch.zeros(3, 4, 5)).abs().max() == 0


@pytest.mark.parametrize("method", ["layercam", "gradcam", "gradcam++", "hirescam"])
def test_map_is_where_activation_and_gradient_meet(method):
    cam = METHODS[method](spike(), spike())
    assert cam.argmax() == 1 * 5 + 2
    assert cam.min() >= 0


@pytest.mark.parametrize("method", ["layercam", "gradcam", "gradcam++", "hirescam"])
def test_what_speaks_against_the_target_is_left_out(method):
    assert METHODS[method](spike(), -spike()).max() == 0


def test_eigen_cam_is_positive_where_activations_are_large():
    for seed in range(4):
        torch.manual_seed(seed)
        activations = 0.01 * torch.rand(6, 5, 5)
        activations[:, 2, 3] += torch.rand(6) + 1
        assert METHODS["eigencam"](activations, torch.zeros_like(activations)).argmax() == 2 * 5 + 3


def test_rows_without_influence_do_not_dilute_the_others():
    one = torch.rand(3, 4)
    together = combined([one, torch.zeros(6, 8)], (12, 16))
    assert_close(together, combined([one], (12, 16)))
    assert combined([torch.zeros(2, 2)], (4, 4)).max() == 0


def test_scaling_survives_numbers_that_are_not_finite():
    assert scaled(torch.tensor([[0.0, 2.0], [float("nan"), float("inf")]])).tolist() == [[0.0, 1.0], [0.0, 0.0]]


def test_unknown_method_and_row_are_named():
    with pytest.raises(UserError, match="did you mean 'gradcam'"):
        method_of("grad-cam")
    model = tiny_model()
    with pytest.raises(UserError, match=r"row 99: .* rows 0 to 7"):
        check_rows(model, [99])
    assert check_rows(model, [-1, 7, 3]) == [7, 3]
    assert row_title(model, 3) == "row 3 ADown, stride 8"


def test_row_that_target_does_not_depend_on_has_zero_gradient():
    model = tiny_model()
    found = trace(model, image_array(7, (1, 3, 64, 64)), [3, 4, 7])
    target = Target(torch.tensor([0]), torch.tensor([0]))  # a cell of the finest level, which reads row 3 alone
    gradients = found.gradients(target.value(found.predictions, (64, 64)))
    assert gradients[3].abs().max() > 0
    assert gradients[4].abs().max() == gradients[7].abs().max() == 0


def test_tracing_leaves_the_model_as_it_was():
    model = tiny_model().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trace(model, image_array(7, (1, 3, 64, 64)), [3], modules={"model.7": model.model[7]})
    assert model.training
    assert all(not module._forward_hooks for module in model.modules())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
