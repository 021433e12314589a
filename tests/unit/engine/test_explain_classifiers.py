"""explain() and explain.py of networks whose results are of the whole image: the class, the middle of the image, no boxes."""

from __future__ import annotations

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import explain as script
from data.augment.centre_crop import centre_crop
from engine.explain import explain
from engine.explain.comparing import explain_as
from engine.explain.explaining import ExplainOptions, Explanation
from engine.explain.figures import cam_figure
from engine.explain.numbers import RANDOM, faithfulness_of, sanity_lines
from engine.inference.predictor import Predictor
from models import build_model
from models.analysis.explained_targets import log_odds
from models.checkpoints.checkpoint import Checkpoint, save_checkpoint
from models.model import Model
from tests.golden import assert_close, fill_
from tests.tiny import tiny_model
from utils.cli.explain_arguments import ExplainConfig
from utils.errors import UserError
from utils.nms import Suppression

NAMES = ("ant", "bee", "cow")
OPTIONS = ExplainOptions(hw=(64, 64))


def classifier_cfg(nc: int = 3) -> dict:
    rows = [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [16, 3, 2]], [-1, 1, "SE", []], [-1, 1, "Conv", [16, 3, 2]]]
    return {"nc": nc, "depth_multiple": 1.0, "width_multiple": 1.0, "backbone": rows, "head": [[-1, 1, "Classify", ["nc"]]]}


def classifier(names: tuple[str, ...] = NAMES, *, certain: bool = False) -> Model:
    """``certain``: so large logits that float32 has no number between the best score and 1."""
    model = fill_(build_model(classifier_cfg(len(names)), names=names), 2.0).eval()
    if certain:
        with torch.no_grad():
            model.head.linear.weight *= 2e2
    return model


def photo(height: int = 80, width: int = 160) -> np.ndarray:
    small = np.random.default_rng(0).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def scores_of(found: Explanation) -> torch.Tensor:
    return found.trace.predictions.scores[0, 0].detach()


def test_the_best_class_of_two_is_explained_by_its_odds():
    """The sum of both scores is 1 for every image: its gradient is what rounding leaves."""
    found = explain(classifier(("ant", "bee")), photo(), OPTIONS)
    best = int(scores_of(found).argmax())
    assert (found.target.classes.tolist(), found.chosen) == ([best], (0,))
    assert found.target.text.startswith(f"detection 0: {('ant', 'bee')[best]} ")
    (gradient,) = torch.autograd.grad(found.target.value(found.trace.predictions, (64, 64)), found.trace.maps[3], retain_graph=True)
    logits = torch.log(found.trace.predictions.scores[0, 0])
    (wanted,) = torch.autograd.grad(logits[best] - logits[1 - best], found.trace.maps[3], retain_graph=True)
    assert gradient.abs().max() > 1e-3
    assert_close(gradient, wanted, tol=1e-5)


def test_a_certain_class_has_a_map_too():
    found = explain(classifier(certain=True), photo(), OPTIONS, method="gradcam")
    assert float(scores_of(found).max()) == 1.0
    assert torch.isfinite(found.cams["gradcam"][3]).all()
    assert float(found.cams["gradcam"][3].max()) > 1e-3


def test_odds_of_several_classes_are_those_of_their_sum():
    scores = torch.tensor([0.5, 0.2, 0.3])
    assert log_odds(scores, torch.tensor([0, 2])) == pytest.approx(np.log(0.8 / 0.2), rel=1e-5)


def test_classes_and_numbers_choose():
    model = classifier()
    order = scores_of(explain(model, photo(), OPTIONS)).argsort(descending=True).tolist()
    second = explain(model, photo(), OPTIONS, target=1)
    assert (second.target.classes.tolist(), second.chosen) == ([order[1]], (1,))
    last = explain(model, photo(), OPTIONS, classes=order[2], suppression=Suppression(conf=0.99))
    assert (last.target.classes.tolist(), last.chosen) == ([order[2]], ())
    assert last.target.text.startswith(f"below the lowest score: {NAMES[order[2]]} 0.")
    both = explain(model, photo(), OPTIONS, classes=(order[2], order[0]), suppression=Suppression(conf=0.0, max_det=2))
    told = r"below the 2 best: {} 0\.\d\d; detection 0: {} 0\.\d\d, by their log-odds"
    assert re.fullmatch(told.format(NAMES[order[2]], NAMES[order[0]]), both.target.text)
    with pytest.raises(UserError, match="target: the scores of all 3 classes of the network sum to 1"):
        explain(model, photo(), OPTIONS, classes=(0, 1, 2))


@pytest.mark.parametrize("quantity", ["box", "both"])
def test_boxes_of_classifiers_are_refused(quantity, tmp_path):
    with pytest.raises(UserError, match=f"quantity {quantity}: classes of a whole image have no boxes"):
        explain(classifier(), photo(), OPTIONS, quantity=quantity)
    with pytest.raises(UserError, match=f"--of {quantity}: classes of a whole image have no boxes"):
        script.explain(ExplainConfig(weights=str(checkpoint(tmp_path)), of=quantity, project=str(tmp_path / "runs")))


def test_what_is_explained_is_what_is_predicted():
    """The middle of the image at the task's size, and all classes from a score of 0 on."""
    model, image = classifier(), photo()
    found = explain(model, image)
    predicted = Predictor(model, Suppression(conf=0.0), device=torch.device("cpu")).predict([image])[0]
    assert found.placement.input_hw == (224, 224)
    assert_close(found.found.scores, predicted.scores, tol=1e-6)
    assert len(found.found) == 3
    assert_close(found.trace.images[0].detach().permute(1, 2, 0), centre_crop(image, (224, 224)).image / np.float32(255), tol=1e-6)


def test_map_lies_on_what_the_network_saw():
    found = explain(classifier(), photo(80, 160), OPTIONS)
    plane, seen = found.planes["layercam"], found.placement.seen((80, 160))
    assert plane.shape == (64, 128)
    assert not plane[:, :32].any()
    assert not plane[:, 96:].any()
    assert_close(found.placement.uncropped(torch.from_numpy(plane), fill=-1.0), plane[:, 32:96])
    assert seen.all(0).nonzero()[0].tolist() == [*range(40, 120)]
    grey = cv2.cvtColor(photo(80, 160), cv2.COLOR_RGB2GRAY)[..., None].repeat(3, 2)
    assert (found.overlay()[:, :40] == grey[:, :40]).all()
    assert (found.overlay()[:, 40:120] != grey[:, 40:120]).any(2).mean() > 0.9
    assert cam_figure(found, "layercam").axes


def test_place_of_interest_is_the_middle_unless_it_is_given():
    assert explain(classifier(), photo(), OPTIONS).query == pytest.approx((0.5, 0.5))
    given = explain(classifier(), photo(80, 160), OPTIONS, query_xy=(60.0, 20.0))
    assert (given.query.x, given.query.y) == pytest.approx((0.25, 0.25))
    with pytest.raises(UserError, match="query 5 5: lies outside of what the network sees of the image, x 40 to 120, y 0 to 80"):
        explain(classifier(), photo(80, 160), OPTIONS, query_xy=(5.0, 5.0))


def test_faithfulness_and_sanity_are_of_the_class():
    model = classifier()
    found = explain(model, photo(), OPTIONS)
    curves = faithfulness_of(model, found)
    assert set(curves) == {"layercam", RANDOM}
    assert all(one.deletion[0] == one.insertion[-1] == pytest.approx(1.0) for one in curves.values())
    same = explain_as(found, model, OPTIONS)
    assert_close(same.map, found.map, tol=1e-5)
    assert same.target.text == f"the same 1 class(es), best score {float(scores_of(found).max()):.2f}"
    assert "+1.00" in sanity_lines(found, same)[0]
    with pytest.raises(UserError, match="--compare: a network of the task 'classify' beside one of 'detect'"):
        explain_as(found, tiny_model(names=NAMES), OPTIONS)


def checkpoint(folder: Path) -> Path:
    cfg = classifier_cfg()
    save_checkpoint(
        folder / "best.pt", Checkpoint(cfg=cfg, cfg_name="tiny.yaml", names=NAMES, weights=classifier().state_dict(), config={})
    )
    return folder / "best.pt"


def test_command_line(tmp_path, capsys):
    cv2.imwrite(str(tmp_path / "a.png"), photo())
    flags = ["--weights", checkpoint(tmp_path), "--source", tmp_path / "a.png", "--project", tmp_path / "runs", "--imgsz", "64"]
    assert script.main([*map(str, flags), "--faithfulness", "--sanity", "--receptive-field"]) == 0
    names = {path.name for path in (tmp_path / "runs" / "exp").iterdir()}
    assert {"index.html", "0000_a_layercam.png", "0000_a_row02_SE.png", "receptive_fields.png", "0000_a_random_weights.png"} <= names
    out = capsys.readouterr().out
    assert "a.png: detection 0: " in out
    assert "deletion 0.000" not in out
