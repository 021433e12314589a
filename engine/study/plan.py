"""From a study file to its variants: every combination that it asks for, the single ones that it names, and their capacity controls."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.channels import with_channels
from engine.logging.observing import reason_of
from engine.study.control import control_of
from engine.study.halving import Rule
from engine.study.reading import metric_name
from engine.study.run_files import file_hash
from engine.task_presets import HYPS, PRESETS, task_of
from engine.training.recipes import family_hyp, find_hyp
from engine.training.setup.network import stored_spec
from models.checkpoints.checkpoint import load_checkpoint
from models.edit.rows import edit
from models.model import Model
from models.spec.parser import ModelSpec, load_spec
from models.spec.registry import BLOCKS, Plugin, load_plugin
from tasks import Task
from utils.cli.flags import flags_of
from utils.cli.study_arguments import StudyConfig, StudyRequest
from utils.config import TrainConfig
from utils.errors import UserError, nearest, one_line
from utils.hyperparameters import Hyperparameters
from utils.reading.yaml_text import shown

if TYPE_CHECKING:
    from data.dataset_spec import DatasetSpec

NONE = "none"
AND = re.compile(r"\+(?!aux\b)(?![^(]*\))")  # SE@9+CBAM@4, not EMA@9+aux
KEYS = ("cfg", "weights", "attention", "attention_init", "replace", "hyp", "hyp_change", "imgsz")  # of a single variant
RUN_FLAGS = ("seed", "epochs", "batch_size", "workers", "plugins", "device", "project", "name", "exist_ok", "resume", "evolve")
OWN_FLAGS = (*KEYS, "data", *RUN_FLAGS)
LARGEST_STUDY = 10_000  # trainings


@dataclass(frozen=True)
class Variant:
    """What is trained, as it was asked for.

    Attributes:
        cfg, weights: as ``train.py`` takes them; an empty text for none.
        attention, replace: edits of the network.
        attention_init: how insertions start.
        hyp: hyper-parameter file; empty for the recipe of the model's family.
        hyp_change: values in place of the file's.
        imgsz: px.
        control_of: the variants whose capacity control this is; empty for any other.
    """

    name: str
    cfg: str = ""
    weights: str = ""
    attention: tuple[str, ...] = ()
    attention_init: str = ""
    replace: tuple[str, ...] = ()
    hyp: str = ""
    hyp_change: Mapping[str, Any] = field(default_factory=dict)
    imgsz: int = 640
    control_of: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlannedVariant:
    """A variant with the network and the recipe that it is trained with.

    Attributes:
        slug: its name as a folder's.
        notes: its edits, for the head of its model YAML.
        plugins, weights: sha256 -> path of the plugins that the network uses, and of the weights that it starts from.
    """

    variant: Variant
    slug: str
    spec: ModelSpec
    hyp: Hyperparameters
    notes: tuple[str, ...] = ()
    plugins: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.variant.name


@dataclass(frozen=True)
class Plan:
    """A study of one data set.

    Attributes:
        train: further flags of train.py, the same for all variants.
        early_stop: the rule by which variants are stopped; None without one.
        notes: lines for the report.
    """

    folder: Path
    data: str
    config: StudyConfig
    variants: tuple[PlannedVariant, ...]
    baseline: str
    train: Mapping[str, Any]
    early_stop: Rule | None = None
    notes: tuple[str, ...] = ()


def make_plans(request: StudyRequest) -> list[Plan]:
    """A plan for each data set.

    Raises:
        UserError: a variant cannot be built, or the study is no study; names file and key.
    """
    config = request.config
    for path in config.plugins:
        load_plugin(path)
    train = _train_flags(request)
    rule = Rule.from_mapping(request.early_stop, epochs=config.epochs, source=request.source) if request.early_stop else None
    if rule and (train.get("noval") or train.get("nosave")):
        raise UserError(f"{request.source}: early_stop needs the metrics and the save of every epoch; leave out noval and nosave of train")
    variants = _variants(request)
    files = config.data or (PRESETS[task_of(TrainConfig(cfg=variants[0].cfg), None)].data,)
    folders = _folders(config, files)
    return [_plan(request, variants, file, folder, train, rule) for file, folder in zip(files, folders)]


def _plan(request: StudyRequest, variants: Sequence[Variant], data: str, folder: Path, train: Mapping[str, Any], rule: Rule | None) -> Plan:
    from data.dataset_spec import load_dataset_spec

    config = request.config
    with _named(request.source, "data"):
        spec = load_dataset_spec(data, single_cls=bool(train.get("single_cls")))
    plugins = {path: load_plugin(path) for path in config.plugins}
    networks = _Networks(spec, request.source, plugins, backbone_weights=str(train.get("backbone_weights") or ""))
    variants, notes = _with_controls(variants, networks, config.control)
    names = [v.name for v in variants]
    config = replace(config, metric=_metric(config.metric, networks.task(variants), request.source))
    slugs = _slugs(names)
    planned = tuple(networks.planned(variant, slug) for variant, slug in zip(variants, slugs))
    baseline = config.baseline or names[0]
    if baseline not in names:
        hint = nearest(baseline, names) or f"the variants are {', '.join(names)}"
        raise UserError(f"{request.source}: baseline {baseline!r} is no variant; {hint}")
    if len(names) * len(config.seeds) > LARGEST_STUDY:
        raise UserError(f"{request.source}: {len(names)} variants with {len(config.seeds)} seeds are more than {LARGEST_STUDY} trainings")
    return Plan(folder, data, config, planned, baseline, train, rule, tuple(notes))


def _metric(given: str, task: Task, source: str) -> str:
    """The column that is compared. Raises UserError where the task has none of that name."""
    metric = metric_name(given) if given else task.defaults.metric
    if metric not in task.columns:
        hint = nearest(metric, task.columns) or f"known are {', '.join(task.columns)}"
        raise UserError(f"{source}: metric {(given or metric)!r} is no column of results.csv; {hint}")
    return metric


def _variants(request: StudyRequest) -> list[Variant]:
    """Every combination of the lists, then the variants that are named."""
    config, source = request.config, request.source
    own = [bool(keys.get("cfg") or keys.get("weights")) for keys in request.variants.values()]
    if not (config.cfg or config.weights) and not (own and all(own)):
        raise UserError(f"{source}: cfg: give a model YAML, such as yolov8n.yaml, or weights")
    grid = _grid(request) if config.cfg or config.weights else []
    single = [_single(name, keys, grid[0] if grid else Variant(""), request) for name, keys in request.variants.items()]
    if grid and len(grid) == 1 and single and grid[0].name in [v.name for v in single]:
        raise UserError(f"{source}: variants.{grid[0].name}: the network without the changes of variants has this name; give another")
    variants = [*grid, *single]
    names = [v.name for v in variants]
    if twice := next((n for n in names if names.count(n) > 1), None):
        raise UserError(f"{source}: variant {twice!r} is there twice")
    return variants


def _grid(request: StudyRequest) -> list[Variant]:
    config = request.config
    axes: dict[str, Sequence[Any]] = {
        "cfg": config.cfg or ("",), "weights": config.weights or (NONE,), "hyp": config.hyp or ("",), "imgsz": config.imgsz,
        "hyp_change": _changes(request), "replace": config.replace or (NONE,), "attention": config.attention or (NONE,),
    }  # fmt: skip
    for key, values in axes.items():
        if twice := next((v for i, v in enumerate(values) if v in values[:i]), None):
            raise UserError(f"{request.source}: {key}: {shown(twice)} is given twice")
    varied = [key for key, values in axes.items() if len(values) > 1]
    found = []
    for combination in itertools.product(*axes.values()):
        chosen = dict(zip(axes, combination))
        label = ", ".join(_label(key, chosen[key]) for key in reversed(axes) if key in varied)
        lone = "baseline" if request.variants else Path(chosen["cfg"] or chosen["weights"]).stem
        found.append(_variant(label or lone, {**chosen, "attention_init": config.attention_init}, request.source))
    return found


def _changes(request: StudyRequest) -> list[dict[str, Any]]:
    """Every combination of changed hyper-parameters."""
    many = {key.name for key in flags_of(Hyperparameters) if key.many}
    lists: dict[str, list[Any]] = {}
    for key, value in request.hyp_changes.items():
        whole = key in many and isinstance(value, list) and not any(isinstance(v, list) for v in value)
        lists[key] = value if isinstance(value, list) and not whole else [value]
        if not lists[key]:
            raise UserError(f"{request.source}: hyp_change.{key}: a value, or a list of values, is expected, not {shown(value)}")
    changes = [dict(zip(lists, values)) for values in itertools.product(*lists.values())]
    with _named(request.source, "hyp_change"):
        for change in changes:
            _checked_changes(change)
    return changes


def _checked_changes(change: Mapping[str, Any]) -> dict[str, Any]:
    """The values as the recipe takes them. Raises UserError for an unknown key or a value out of range."""
    checked = Hyperparameters.from_dict(change).to_dict()
    return {key: checked[key] for key in change if key in checked}


def _label(key: str, value: Any) -> str:
    """A value of an axis in a variant's name."""
    if key == "hyp_change":
        return " ".join(f"{k}={v}" for k, v in value.items())
    if key == "imgsz":
        return f"{value} px"
    if key in ("cfg", "weights", "hyp"):
        return Path(str(value)).stem if value not in ("", NONE) else "scratch" if key == "weights" else "family recipe"
    return str(value)


def _single(name: str, keys: Mapping[str, Any], base: Variant, request: StudyRequest) -> Variant:
    """A variant of the file's ``variants``: what it names, and the first of each list for the rest; edits are its own."""
    where = f"{request.source}: variants.{name}"
    for key in keys:
        if key not in KEYS:
            raise UserError(f"{where}: unknown key {shown(key)}; {nearest(str(key), KEYS) or 'known are ' + ', '.join(KEYS)}")
    defaults = {
        "cfg": base.cfg, "weights": base.weights or NONE, "attention": NONE, "replace": NONE, "hyp": base.hyp, "imgsz": base.imgsz,
        "attention_init": request.config.attention_init, "hyp_change": base.hyp_change,
    }  # fmt: skip
    if not isinstance(keys.get("hyp_change", {}), Mapping):
        raise UserError(f"{where}.hyp_change: a mapping such as {{iou_loss: SIoU}} is expected, not {shown(keys['hyp_change'])}")
    with _named(where, "hyp_change"):
        _checked_changes(keys.get("hyp_change", {}))
    for key in ("cfg", "weights", "hyp", "attention_init"):
        if not isinstance(keys.get(key, ""), str):
            raise UserError(f"{where}.{key}: a text is expected, not {shown(keys[key])}")
    with _named(where):
        StudyConfig(**{key: keys[key] for key in ("imgsz", "attention_init") if key in keys})
    return _variant(name, {**defaults, **keys}, where)


def _variant(name: str, values: Mapping[str, Any], source: str) -> Variant:
    attention, replaced = (_several(values[key], f"{source}: {key}") for key in ("attention", "replace"))
    weights = "" if values["weights"] in (NONE, None) else values["weights"]
    return Variant(
        name, values["cfg"], weights, attention, values["attention_init"] if attention else "", replaced, values["hyp"],
        values["hyp_change"], values["imgsz"],
    )  # fmt: skip


def _several(value: Any, where: str) -> tuple[str, ...]:
    """``SE@9+CBAM@4`` or a list as single edits; ``none`` as no edit."""
    entries = value if isinstance(value, (list, tuple)) else [NONE if value is None else value]
    if not all(isinstance(entry, str) for entry in entries):
        raise UserError(f"{where}: texts such as SE@9 are expected, not {shown(value)}")
    parts = [part.strip() for entry in entries for part in AND.split(entry)]
    return () if parts == [NONE] else tuple(parts)


def _with_controls(variants: Sequence[Variant], networks: _Networks, kind: str) -> tuple[list[Variant], list[str]]:
    """Each variant that edits its network, followed by its control; controls that are the same network are one variant."""
    if not kind:
        return list(variants), []
    found: list[Variant] = []
    notes: list[str] = []
    for variant in variants:
        found.append(variant)
        if not (variant.attention or variant.replace):
            continue
        with networks.naming(variant):
            base = networks.base(variant)
            try:
                control = control_of(
                    base, variant.attention, variant.replace, kind=kind, imgsz=variant.imgsz, init=variant.attention_init
                )  # fmt: skip
            except UserError:
                raise
            except Exception as error:  # a user's module may not run on maps of the study's size: its training says so
                notes.append(f"{variant.name} has no control: its modules do not run ({one_line(reason_of(error), most=200)})")
                continue
        notes += control.notes
        if not control.insertions:
            continue
        plain = replace(variant, name=f"{variant.name} control", attention=control.insertions, replace=(), control_of=(variant.name,))
        same = next((v for v in found if v.control_of and replace(plain, name=v.name, control_of=v.control_of) == v), None)
        if same:
            found[found.index(same)] = replace(same, control_of=(*same.control_of, variant.name))
            notes.append(f"{same.name} is the control of {variant.name} too: the same network")
        else:
            found.append(plain)
    return found, notes


class _Networks:
    """Networks and recipes of variants for one data set; what several share is built once.

    Args:
        plugins: by their paths.
        backbone_weights: that every variant starts from; empty for none.
    """

    def __init__(self, data: DatasetSpec, source: str, plugins: Mapping[str, Plugin], *, backbone_weights: str = "") -> None:
        self.data, self.source, self.plugins, self.backbone_weights = data, source, plugins, backbone_weights
        self._hash = lru_cache(maxsize=None)(file_hash)
        self._base = lru_cache(maxsize=None)(self._build_base)

    def base(self, variant: Variant) -> Model:
        """The network without the variant's edits."""
        return self._base(variant.cfg, variant.weights)

    def task(self, variants: Sequence[Variant]) -> Task:
        """That of all variants. Raises UserError where two have different ones."""
        tasks: dict[str, str] = {}
        for variant in variants:
            with self.naming(variant):
                tasks.setdefault(self.base(variant).task.name, variant.name)
        if len(tasks) > 1:
            whose = ", ".join(f"{name!r} {task}" for task, name in tasks.items())
            raise UserError(f"{self.source}: variants of different tasks cannot be compared: {whose}")
        return self.base(variants[0]).task

    def _build_base(self, cfg: str, weights: str) -> Model:
        checkpoint = load_checkpoint(weights) if weights else None
        spec = with_channels(self.data, TrainConfig(cfg=cfg, weights=weights), checkpoint)
        if not (cfg or (checkpoint and checkpoint.cfg)):
            raise UserError(f"{weights}: bare weights of a network that is not recognised; give its model YAML with cfg")
        return Model(load_spec(cfg or stored_spec(checkpoint), nc=spec.nc, ch=spec.ch), names=self.data.names)

    def planned(self, variant: Variant, slug: str) -> PlannedVariant:
        """The variant with its network and its recipe.

        Raises:
            UserError: they cannot be made; names file and key.
        """
        with self.naming(variant):
            base = self.base(variant)
            edited = edit(base.spec, insert=variant.attention, replace=variant.replace, init=variant.attention_init)
            is_edited = variant.attention or variant.replace
            model = Model(edited.spec) if is_edited else base  # a module that cannot be built is named before anything is trained
            weights = {self._hash(path): path for path in (variant.weights, self.backbone_weights) if path and self._hash(path)}
            hyp = self._hyp(variant, base)
            return PlannedVariant(variant, slug, edited.spec, hyp, tuple(edited.notes), self._plugins_of(model), weights)

    def _plugins_of(self, model: Model) -> dict[str, str]:
        """The plugins that a network uses; one that registers no module may act on every network."""
        blocks = [BLOCKS[row.module] for row in model.spec.rows]
        used = [*map(type, model.modules()), *(block.cls for block in blocks), *(block.channels for block in blocks)]
        registered = [BLOCKS[name].cls for name in BLOCKS]
        return {
            plugin.sha256: path for path, plugin in self.plugins.items()
            if any(map(plugin.holds, used)) or not any(map(plugin.holds, registered))
        }  # fmt: skip

    def _hyp(self, variant: Variant, base: Model) -> Hyperparameters:
        family = family_hyp(base.spec.origin, base.spec.dialect, base.head.anchor_based, scale=base.spec.scale)
        hyp = Hyperparameters.from_yaml(find_hyp(variant.hyp or family, HYPS))
        return hyp.replace(**_checked_changes(variant.hyp_change))

    def naming(self, variant: Variant) -> Any:
        """Names file and variant in errors."""
        return _named(self.source, f"variant {variant.name!r}")


@contextmanager
def _named(source: str, key: str = "") -> Iterator[None]:
    """Names the file and the key in an error."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{source}: {key}: {error}" if key else f"{source}: {error}") from error


def _train_flags(request: StudyRequest) -> dict[str, Any]:
    """The further flags of train.py, checked."""
    known = [f.name for f in flags_of(TrainConfig) if f.name not in OWN_FLAGS]
    values = {}
    for written, value in request.train.items():
        key = str(written).replace("-", "_")
        if key in OWN_FLAGS:
            raise UserError(f"{request.source}: train.{written}: the study decides it; leave it out here")
        if key not in known:
            hint = nearest(key, known) or f"known are {', '.join(known)}"
            raise UserError(f"{request.source}: train.{written}: train.py has no such flag; {hint}")
        values[key] = value
    with _named(request.source, "train"):
        TrainConfig(**values)
    return values


def _folders(config: StudyConfig, files: Sequence[str]) -> list[Path]:
    """The study folder; one for each data set in it where there are several."""
    folder = Path(config.project).expanduser() / config.name
    return [folder] if len(files) == 1 else [folder / slug for slug in _slugs([Path(file).stem for file in files])]


def _slugs(names: Sequence[str]) -> list[str]:
    """Names as names of folders, each another one, letter case aside."""
    slugs: list[str] = []
    for name in names:
        base = re.sub(r"[^\w.@=+-]+", "-", name).strip("-.")[:80] or "variant"
        taken = {slug.lower() for slug in slugs}
        candidates = itertools.chain([base], (f"{base}-{i}" for i in itertools.count(2)))
        slug = next(candidate for candidate in candidates if candidate.lower() not in taken)
        slugs.append(slug)
    return slugs
