"""``cls_weights``: the class loss weighted class by class."""

from __future__ import annotations

import pytest
import torch

from models.heads.anchor_free import Detect
from tests.unit.models.test_losses_anchors import HYP, batch_of, built, random_output
from utils.config import Hyperparameters
from utils.errors import UserError


def class_part(weights: tuple[float, ...]) -> torch.Tensor:
    return built().build_loss(HYP.replace(cls_weights=weights))(random_output(), batch_of(5))["cls"]


def test_anchor_based_class_loss_is_the_weighted_sum_of_its_classes():
    parts = [class_part(tuple(float(i == k) for i in range(4))) for k in range(4)]
    torch.testing.assert_close(sum(parts), class_part(()))
    torch.testing.assert_close(class_part((0.5, 1, 2, 3)), 0.5 * parts[0] + parts[1] + 2 * parts[2] + 3 * parts[3])


@pytest.mark.parametrize("values", [[1, 2], [1] * 5])
def test_one_weight_for_each_class_is_needed(values):
    hyp = Hyperparameters(cls_weights=values)
    free = Detect(4, [8] * 3)
    free.set_strides((8, 16, 32))
    for head in (built(), free):
        with pytest.raises(UserError, match=f"cls_weights: expected one number for each of the 4 classes, got {len(values)}"):
            head.build_loss(hyp)


@pytest.mark.parametrize(("value", "message"), [(3, "is not a list of numbers"), (["a"], "is not a number"), ([-1], "out of range")])
def test_other_values_are_refused(value, message):
    with pytest.raises(UserError, match=f"cls_weights: .*{message}"):
        Hyperparameters(cls_weights=value)


def test_a_hyp_file_keeps_them(tmp_path):
    hyp = Hyperparameters(cls_weights=[0.5, 2])
    hyp.to_yaml(tmp_path / "hyp.yaml")
    assert Hyperparameters.from_yaml(tmp_path / "hyp.yaml").cls_weights == (0.5, 2.0)
