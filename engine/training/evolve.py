"""``--evolve N``: a genetic search for hyper-parameters; every generation is a complete training.

The first generation trains with the recipe as it is. Each later one selects a parent among the best so far, with a probability that grows
with its fitness, and multiplies most of its values by random factors, within bounds; a value of 0 stays 0, so that what is switched off
stays so. The result depends only on the seed and on ``evolve.csv``, which is complete at every moment: the same command resumes a search.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from engine.logging.observing import observing
from engine.training.nonfinite_guard import Diverged
from utils import distributed
from utils.config import Hyperparameters, TrainConfig
from utils.errors import UserError
from utils.files import atomic_write
from utils.reading.yaml_text import read_yaml
from utils.run_folders import LOCK_FILE, RunLock

if TYPE_CHECKING:
    from tasks.base import MetricResult

PARENTS = 5  # the best generations so far
CHANCE, SPREAD = 0.8, 0.2  # that a value changes, and the deviation of its factor
FACTORS = (0.3, 3.0)
DIGITS = 5  # significant ones
# key -> bounds of its values, extended where the recipe lies outside; other keys keep the recipe's value
BOUNDS: dict[str, tuple[float, float]] = {
    "lr0": (1e-5, 0.1),
    "lrf": (0.01, 1.0),
    "momentum": (0.6, 0.98),
    "weight_decay": (0.0, 0.001),
    "warmup_epochs": (0.0, 5.0),
    "warmup_momentum": (0.0, 0.95),
    "warmup_bias_lr": (0.0, 0.2),
    "box": (0.02, 20.0),
    "cls": (0.2, 4.0),
    "obj": (0.2, 4.0),
    "dfl": (0.4, 6.0),
    "pose": (1.0, 40.0),
    "kobj": (0.2, 4.0),
    "rle": (0.2, 4.0),
    "angle": (0.2, 4.0),
    "cls_pw": (0.5, 2.0),
    "obj_pw": (0.5, 2.0),
    "anchor_t": (2.0, 8.0),
    "label_smoothing": (0.0, 0.3),
    "hsv_h": (0.0, 0.1),
    "hsv_s": (0.0, 0.9),
    "hsv_v": (0.0, 0.9),
    "degrees": (0.0, 45.0),
    "translate": (0.0, 0.9),
    "scale": (0.0, 0.9),
    "shear": (0.0, 10.0),
    "perspective": (0.0, 0.001),
    "erasing": (0.0, 0.9),
    **dict.fromkeys(("flipud", "fliplr", "mosaic", "mixup", "copy_paste"), (0.0, 1.0)),
}
TASK_GAINS = frozenset(("pose", "kobj", "rle", "angle"))  # each varied only where the loss has the part of its name
# flags that may differ when a search is resumed
RESUMABLE = frozenset(("evolve", "device", "workers", "cache", "exist_ok", "plugins", "download"))
Row = dict[str, float]  # of evolve.csv: generation, fitness, metrics, values


def evolve(config: TrainConfig, train: Callable[[TrainConfig], Any]) -> Path:
    """Searches for ``config.evolve`` generations in all; returns the folder of the results.

    Args:
        train: trains with a config and returns the result, as ``train.train`` does.

    Raises:
        UserError: the first generation cannot be trained, or the folder holds another search.
    """
    _check_world_size()
    with RunLock() as lock:
        return search(config, train, lock)


def search(config: TrainConfig, train: Callable[[TrainConfig], Any], lock: RunLock) -> Path:
    """The generations that are left, in the folder of the search, which ``lock`` takes."""
    folder = Path(config.project) / config.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror or error}); give another --project or --name") from None
    lock.take(folder)
    single = config.replace(evolve=0, project=str(folder), name="generation", exist_ok=True, nosave=True, noplots=True)
    rows = read_generations(folder, config)
    if rows:
        print(f"Resuming {folder / 'evolve.csv'} after {len(rows)} generations")
    try:
        while len(rows) < config.evolve:
            hyp = make_child(rows, read_recipe(folder), seed=config.seed, generation=len(rows)) if rows else None
            print(f"\nGeneration {len(rows) + 1} of {config.evolve}")
            rows.append(train_generation(len(rows), single, hyp, train))
            write_results(folder, rows, plots=not config.noplots)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{folder} holds {len(rows)} of {config.evolve} generations, the same command resumes it") from None
    best = max(rows, key=lambda row: row["fitness"])
    found = f"{folder / 'hyp_evolve.yaml'} (use it with --hyp); every generation in {folder / 'evolve.csv'} and evolve.png"
    print(f"Best of {len(rows)} generations: number {int(best['generation']) + 1}, fitness {best['fitness']:.4f}: {found}")
    return folder


def train_generation(number: int, config: TrainConfig, hyp: Hyperparameters | None, train: Callable[[TrainConfig], Any]) -> Row:
    """Trains one generation; values with which the loss diverges have fitness 0."""
    metrics: MetricResult | None = None
    try:
        result = train(config.replace(hyp=hyp) if hyp else config)
        metrics = result.best
    except UserError as error:
        if hyp is None or not isinstance(error.__cause__, Diverged):
            raise
        print(f"Fitness 0: {error}")
    folder = Path(config.project) / config.name
    used = Hyperparameters.from_yaml(folder / "hyp.yaml").to_dict()
    measured = dict(metrics.columns) if metrics is not None else {}
    fitness = metrics.fitness if metrics is not None else 0.0
    return {"generation": number, "fitness": float(fitness), **measured, **{key: float(used[key]) for key in used_keys(folder)}}


def used_keys(folder: Path) -> list[str]:
    """The keys of BOUNDS that the training in a folder can have used, in order: its results.csv names the parts of its loss."""
    try:
        header = (folder / "results.csv").read_text(encoding="utf-8").partition("\n")[0].split(",")
    except OSError:
        return list(BOUNDS)
    return [key for key in BOUNDS if key not in TASK_GAINS or f"train/{key}_loss" in header]


def varied_keys(rows: Sequence[Row]) -> list[str]:
    """The keys of BOUNDS that a search varies, in order: those of its first generation."""
    return [key for key in BOUNDS if key in rows[0]]


def make_child(rows: Sequence[Row], recipe: Hyperparameters, *, seed: int, generation: int) -> Hyperparameters:
    """The hyper-parameters of a generation: a parent's, most of them mutated."""
    rng = np.random.default_rng((seed, generation))
    best = sorted(rows, key=lambda row: -row["fitness"])[:PARENTS]
    weights = np.array([row["fitness"] for row in best])
    weights = weights - weights.min() + 1e-6
    parent = best[rng.choice(len(best), p=weights / weights.sum())]
    keys = varied_keys(rows)
    factors = np.ones(len(keys))
    while (factors == 1).all():
        changed = rng.random(len(keys)) < CHANCE
        factors = np.where(changed, (1 + SPREAD * rng.standard_normal(len(keys))).clip(*FACTORS), 1.0)
    values = {key: clip_to_bounds(parent[key] * factor, key, getattr(recipe, key)) for (key, factor) in zip(keys, factors.tolist())}
    return recipe.replace(**values, source=f"generation {generation + 1}")


def clip_to_bounds(value: float, key: str, recipe_value: float) -> float:
    """The value within the bounds, which are extended to the recipe's value, to five digits."""
    low, high = BOUNDS[key]
    return float(f"{min(max(value, min(low, recipe_value)), max(high, recipe_value)):.{DIGITS}g}")


def read_generations(folder: Path, config: TrainConfig) -> list[Row]:
    """The generations that this search has trained already; writes the flags of a new one.

    Raises:
        UserError: the folder holds a search with other flags, or something else.
    """
    flags, table = folder / "opt.yaml", folder / "evolve.csv"
    if not table.exists():
        if any(p.name not in ("opt.yaml", "generation", "recipe.yaml", LOCK_FILE) for p in folder.iterdir()):
            raise UserError(f"{folder}: holds a run, not a search of --evolve; give another --name")
        config.to_yaml(flags)
        return []
    stored, now = read_yaml(flags), config.to_dict()
    for name in (n for n in now if n not in RESUMABLE and n in stored and stored[n] != now[n]):
        flag = f"--{name.replace('_', '-')}"
        raise UserError(f"{flag} {now[name]}: {folder} holds a search with {flag} {stored[name]}; give the same, or another --name")
    try:
        with open(table, newline="", encoding="utf-8") as file:
            rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"{table}: cannot be read ({error}); give another --name") from None
    if any(not {"generation", "fitness", "lr0"} <= set(row) for row in rows):
        raise UserError(f"{table}: columns are missing; give another --name")
    return rows


def read_recipe(folder: Path) -> Hyperparameters:
    """The hyper-parameters of the first generation."""
    return Hyperparameters.from_yaml(folder / "recipe.yaml")


def write_results(folder: Path, rows: Sequence[Row], *, plots: bool) -> None:
    """Writes evolve.csv, the best values as hyp_evolve.yaml, and, where asked for, evolve.png."""
    used = Hyperparameters.from_yaml(folder / "generation" / "hyp.yaml")
    if len(rows) == 1:
        used.to_yaml(folder / "recipe.yaml")
    best = max(rows, key=lambda row: row["fitness"])
    values = read_recipe(folder).replace(**{key: best[key] for key in varied_keys(rows)}).to_dict()
    title = f"# Best of {len(rows)} generations: number {int(best['generation']) + 1}, fitness {best['fitness']:.5f}\n"
    _write_file(folder / "hyp_evolve.yaml", title + yaml.safe_dump(values, sort_keys=False))
    lines = [",".join(rows[0]), *(",".join(_format(row.get(key, 0.0)) for key in rows[0]) for row in rows)]
    _write_file(folder / "evolve.csv", "\n".join(lines) + "\n")
    if plots:
        from utils.visual.plots import plot_evolution

        with observing("plotting evolve.png"):
            plot_evolution(rows, varied_keys(rows), folder / "evolve.png")


def _check_world_size() -> None:
    if distributed.world_size() > 1:
        raise UserError("--evolve: trains in one process; start it without torchrun")


def _format(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(float(value))


def _write_file(path: Path, text: str) -> None:
    """Writes a file atomically."""
    try:
        with atomic_write(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be saved ({error.strerror or error})") from None
