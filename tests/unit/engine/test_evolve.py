"""The search for hyper-parameters: what comes of a parent, and that a search which was stopped goes on as if it had not been."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.training.evolve import BOUNDS, evolve, make_child, read_generations
from engine.training.nonfinite_guard import Diverged
from engine.training.setup.config import resolve_config
from tasks import DETECT
from train import main
from utils.config import Hyperparameters, TrainConfig
from utils.errors import UserError
from utils.visual import plots

PLOT = plots.plot_evolution
HYP = Hyperparameters(box=7.5, degrees=0.0, lr0=0.01)


def row(number, fitness, **values):
    return {"generation": number, "fitness": fitness, **{key: float(getattr(HYP, key)) for key in BOUNDS}, **values}


class Trainer:
    """Takes the place of a training; lower learning rates are better."""

    def __init__(self, *, stop_at=None, diverge_at=None, parts=("box", "cls")):
        self.stop_at, self.diverge_at, self.parts, self.seen = stop_at, diverge_at, parts, []

    def __call__(self, config):
        number = len(self.seen)
        if number == self.stop_at:
            raise KeyboardInterrupt
        hyp = config.hyp if isinstance(config.hyp, Hyperparameters) else HYP
        folder = Path(config.project) / config.name
        folder.mkdir(parents=True, exist_ok=True)
        hyp.to_yaml(folder / "hyp.yaml")
        (folder / "results.csv").write_text(",".join(("epoch", *(f"train/{part}_loss" for part in self.parts))) + "\n")
        self.seen.append(hyp.to_dict())
        if number == self.diverge_at:
            raise UserError("epoch 1: the loss became nan") from Diverged("nan")
        fitness = 1 - 10 * hyp.lr0
        return SimpleNamespace(best=SimpleNamespace(fitness=fitness, columns=dict(zip(DETECT.columns, (0.5, 0.25, fitness, fitness)))))


def config(tmp_path, **changes):
    return TrainConfig(**{"cfg": "yolov9-t.yaml", "project": tmp_path, "name": "search", "evolve": 6, **changes})


@pytest.fixture(autouse=True)
def quick_images(monkeypatch):
    """Thirty diagrams take seconds; one test draws a few of them."""
    monkeypatch.setattr(plots, "plot_evolution", lambda rows, keys, path: path.write_text(f"{len(rows)} points"))


def test_evolve_plot_is_written(tmp_path):
    PLOT([row(0, 0.5), row(1, 0.6, lr0=0.02)], ("lr0", "box"), tmp_path / "evolve.png")
    assert (tmp_path / "evolve.png").stat().st_size > 3000


def rows_of(folder):
    with open(folder / "evolve.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_mutation_stays_within_bounds_and_keeps_zeros():
    rows = [row(0, 0.5, scale=0.9, momentum=0.98)]
    children = [make_child(rows, HYP, seed=0, generation=g) for g in range(1, 200)]
    for key, (low, high) in BOUNDS.items():
        values = [getattr(c, key) for c in children]
        assert min(low, getattr(HYP, key)) <= min(values), key
        assert max(values) <= max(high, getattr(HYP, key)), key
        assert (len(set(values)) > 20) == (rows[0][key] != 0), key
    assert all(c.degrees == 0 for c in children)
    assert all(c.tal_topk == HYP.tal_topk and c.nbs == HYP.nbs for c in children)
    changed = [sum(getattr(c, key) != rows[0][key] for key in BOUNDS if rows[0][key]) for c in children]
    assert min(changed) > 0


@pytest.mark.parametrize(
    ("parts", "varied"), [(("box", "cls", "pose", "kobj"), {"pose", "kobj"}), (("box", "angle"), {"angle"}), (("cls",), set())]
)
def test_gains_of_a_task_are_varied_where_its_loss_has_them(tmp_path, parts, varied):
    trainer = Trainer(parts=parts)
    folder = evolve(config(tmp_path), trainer)
    gains = ("pose", "kobj", "rle", "angle")
    assert {key for key in gains if len({seen[key] for seen in trainer.seen}) > 1} == varied
    assert set(rows_of(folder)[0]).intersection(gains) == varied


def test_regularisation_of_classifiers_is_varied():
    recipe = HYP.replace(erasing=0.4, label_smoothing=0.1)
    rows = [row(0, 0.5, erasing=0.4, label_smoothing=0.1)]
    children = [make_child(rows, recipe, seed=0, generation=g) for g in range(1, 40)]
    assert all(len({getattr(child, key) for child in children}) > 10 for key in ("erasing", "label_smoothing"))


def test_a_search_of_fewer_keys_is_resumed_with_these(tmp_path):
    folder = evolve(config(tmp_path, evolve=2), Trainer())
    rows = [{key: value for key, value in r.items() if key not in ("erasing", "label_smoothing")} for r in rows_of(folder)]
    (folder / "evolve.csv").write_text("\n".join(",".join(values) for values in (rows[0], *(r.values() for r in rows))) + "\n")
    evolve(config(tmp_path, evolve=3), Trainer())
    assert len(rows_of(folder)) == 3
    assert "erasing" not in rows_of(folder)[0]


def test_parents_are_drawn_from_the_best_five_by_fitness():
    rows = [row(i, fitness, box=1.0 + i) for i, fitness in enumerate((0.1, 0.2, 0.3, 0.4, 0.5, 0.9))]
    taken = [0] * 6
    for generation in range(400):
        made = make_child(rows, HYP.replace(), seed=1, generation=generation)
        taken[min(range(6), key=lambda i: abs(made.box / (1 + i) - 1))] += 1
    assert taken[5] > taken[4] > taken[1]
    assert taken[5] > 150  # of 400, its share of the lead is 0.7 / 1.3


def test_resumed_search_equals_an_uninterrupted_one(tmp_path, capsys):
    whole = evolve(config(tmp_path / "whole"), Trainer())
    with pytest.raises(KeyboardInterrupt, match="holds 3 of 6 generations"):
        evolve(config(tmp_path / "cut"), Trainer(stop_at=3))
    resumed = evolve(config(tmp_path / "cut"), Trainer())
    for name in ("evolve.csv", "hyp_evolve.yaml", "recipe.yaml"):
        assert (whole / name).read_text() == (resumed / name).read_text()
    assert (whole / "evolve.png").read_text() == "6 points"
    rows = rows_of(whole)
    assert [int(r["generation"]) for r in rows] == list(range(6))
    best = max(rows, key=lambda r: float(r["fitness"]))
    assert Hyperparameters.from_yaml(whole / "hyp_evolve.yaml").lr0 == float(best["lr0"])
    assert float(rows[0]["lr0"]) == HYP.lr0
    assert "Resuming" in capsys.readouterr().out
    more = Trainer()
    evolve(config(tmp_path / "cut", evolve=7), more)
    assert len(more.seen) == 1


def test_diverging_values_have_zero_fitness_and_the_search_continues(tmp_path):
    rows = rows_of(evolve(config(tmp_path), Trainer(diverge_at=2)))
    assert [float(r["fitness"]) == 0 for r in rows] == [False, False, True, False, False, False]
    with pytest.raises(UserError, match="became nan"):
        evolve(config(tmp_path, name="first"), Trainer(diverge_at=0))


def test_another_search_in_the_same_folder_is_refused(tmp_path):
    evolve(config(tmp_path, evolve=1), Trainer())
    with pytest.raises(UserError, match=r"--epochs 3: .*search holds a search with --epochs 100"):
        evolve(config(tmp_path, epochs=3), Trainer())
    (tmp_path / "run" / "weights").mkdir(parents=True)
    with pytest.raises(UserError, match="give another --name"):
        read_generations(tmp_path / "run", config(tmp_path))


def test_incompatible_flags_are_refused(tmp_path, capsys):
    with pytest.raises(UserError, match="--evolve with --resume"):
        config(tmp_path, resume="last.pt")
    with pytest.raises(UserError, match="many trainings"):
        resolve_config(config(tmp_path))
    assert main(["--evolve", "2", "--cfg", "nowhere.yaml", "--data", "shapes.yaml", "--project", str(tmp_path), "--device", "cpu"]) == 1
    assert "nowhere.yaml" in capsys.readouterr().err
