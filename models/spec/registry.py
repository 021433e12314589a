"""Names to building blocks: ``@register`` stands beside a class and says how its arguments and output width are derived.

A model YAML names its layers; this table is the only place that knows what a name means. Built-in blocks are found by importing the
packages in ``BUILTIN_PACKAGES`` at the first look-up; a user's own file joins through :func:`load_plugin`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeAlias, TypeVar, get_args

from torch import nn

from models.spec.channel_rules import ChannelRule, same_width
from models.spec.plugin_faults import (
    classes_of,
    fault_of,
    globals_of,
    line_of,
    remedy,
    undefined_names,
    without_forward,
)
from tasks.base import TASKS
from utils.errors import PLUGIN_PREFIX, UserError, closest, nearest
from utils.metrics.columns import FITNESS_WEIGHTS, METRIC_COLUMNS

log = logging.getLogger(__name__)

BUILTIN_PACKAGES = ("models.layers", "models.backbones", "models.necks", "models.heads")
ADDED_WORDS = re.compile(r"(attention|attn|block|module|layer)+$")  # GAM_Attention, SE_Block: what other programs call GAM and SE
# What a block is in a network; "framework" is for torch's own classes, "block" for all other layers.
Kind: TypeAlias = Literal["attention", "backbone", "neck", "head", "framework", "block"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Block = TypeVar("Block", bound=Callable[..., Any])


@dataclass(frozen=True)
class BlockSpec:
    """One registered block.

    Attributes:
        name: the name written in YAML rows.
        cls: the class (or factory) that builds the layer.
        channels: the rule that turns a row's arguments into constructor arguments and an output width.
        aliases: other names that mean the same block.
        paper: title and arXiv number for the catalogue, empty for plain layers.
        kind: what it is in a network.
    """

    name: str
    cls: Callable[..., Any]
    channels: ChannelRule
    aliases: tuple[str, ...] = ()
    paper: str = ""
    kind: Kind = "block"

    @property
    def built_in(self) -> bool:
        """Whether it is this project's or torch's, not a plugin's."""
        return getattr(self.cls, "__module__", "").startswith(("models.", "torch."))


Resolver = Callable[[str], "BlockSpec | None"]


class Registry(Mapping[str, BlockSpec]):
    """Block specifications by name or alias; iteration yields canonical names only."""

    def __init__(self) -> None:
        self._specs: dict[str, BlockSpec] = {}
        self._names: dict[str, str] = {}  # every name and alias -> canonical name
        self._resolvers: list[Resolver] = []
        self._loaded = False

    def add(self, spec: BlockSpec) -> None:
        for name in (spec.name, *spec.aliases):
            if name in self._names:
                taken = self._specs[self._names[name]]
                owner = f"this project's own {_where(taken.cls)}" if taken.built_in else _where(taken.cls)
                raise UserError(f"block name {name!r} is taken by {owner}; register {_where(spec.cls)} under another name")
        self._specs[spec.name] = spec
        self._names.update(dict.fromkeys((spec.name, *spec.aliases), spec.name))

    def resolver(self, resolve: Resolver) -> Resolver:
        """Decorator that enters a function for names that are not registered but follow from registered ones (``C2f_EMA``)."""
        self._resolvers.append(resolve)
        return resolve

    def __getitem__(self, name: str) -> BlockSpec:
        spec = self._find(name)
        if spec is None:
            meant = self._meant(name)
            hint = f", did you mean {meant!r}?" if meant else ""
            raise KeyError(f"unknown module {name!r}{hint}; a module of your own joins with --plugins")
        return spec

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._find(name) is not None

    def _find(self, name: str) -> BlockSpec | None:
        self.load_builtins()
        if name in self._names:
            return self._specs[self._names[name]]
        derived = next((spec for resolve in self._resolvers if (spec := resolve(name)) is not None), None)
        return derived or self._spelled(name)

    def _spelled(self, name: str) -> BlockSpec | None:
        """The one attention module that other projects spell like this: ``GAM_Attention`` for GAM, ``LSKblock`` for LSKBlock."""
        bare = _bare(name)
        meant = {own for known, own in self._names.items() if _bare(known) == bare and self._specs[own].kind == "attention"}
        return self._specs[meant.pop()] if len(meant) == 1 else None

    def _meant(self, name: str) -> str:
        """The known name nearest to an unknown one: inside its block, or by spelling."""
        outer, _, inner = name.partition("_")
        composed = [c for near in closest(inner, self._names) if (c := f"{outer}_{near}") in self]
        return next(iter(composed or closest(name, self._names)), "")

    def __iter__(self) -> Iterator[str]:
        self.load_builtins()
        return iter(sorted(self._specs))

    def __len__(self) -> int:
        self.load_builtins()
        return len(self._specs)

    def snapshot(self) -> tuple[dict[str, BlockSpec], dict[str, str], list[Resolver]]:
        """What is registered now, for :meth:`restore`."""
        return dict(self._specs), dict(self._names), list(self._resolvers)

    def restore(self, state: tuple[dict[str, BlockSpec], dict[str, str], list[Resolver]]) -> None:
        """Takes back what was registered since."""
        self._specs, self._names, self._resolvers = dict(state[0]), dict(state[1]), list(state[2])

    def load_builtins(self) -> None:
        """Imports this project's own blocks, once."""
        if self._loaded:
            return
        self._loaded = True  # before the imports: they register, and must not come back here
        for package_name in BUILTIN_PACKAGES:
            package = importlib.import_module(package_name)
            for module in pkgutil.walk_packages(package.__path__, package_name + "."):
                importlib.import_module(module.name)


BLOCKS = Registry()


def _bare(name: str) -> str:
    """A module's name without separators, letter case and the words that projects add to it."""
    joined = name.lower().replace("_", "").replace("-", "")
    return ADDED_WORDS.sub("", joined) or joined


def register(name: str, *aliases: str, channels: ChannelRule, kind: Kind | None = None, paper: str = "") -> Callable[[Block], Block]:
    """Class decorator that enters a block under ``name`` (and ``aliases``) with its channel rule.

    Args:
        channels: the rule, of models/spec/channel_rules.py.
        kind: what the block is in a network; if not given, a same-width module is attention and anything else a plain block.
        paper: title and arXiv number.

    Example:
        >>> @register("CBAM", channels=rules.same_width, kind="attention", paper="CBAM, arXiv 1807.06521")
        ... class CBAM(nn.Module): ...

    Raises:
        UserError: the name is taken, or the kind is unknown.
    """
    if kind is None:
        kind = "attention" if channels is same_width else "block"
    elif kind not in KINDS:
        raise UserError(f"block {name!r}: unknown kind {kind!r}; {nearest(str(kind), KINDS) or 'known are ' + ', '.join(KINDS)}")

    def enter(cls: Block) -> Block:
        BLOCKS.add(BlockSpec(name=name, cls=cls, channels=channels, aliases=aliases, paper=paper, kind=kind))
        return cls

    return enter


@dataclass(frozen=True)
class Plugin:
    """A user's file that registers blocks: what a checkpoint remembers of it."""

    name: str
    sha256: str

    def holds(self, item: object) -> bool:
        """Whether a class or function was defined in this file."""
        module = str(getattr(item, "__module__", ""))
        return module.startswith(PLUGIN_PREFIX) and module.endswith(f"_{self.sha256[:8]}")


_PLUGINS: dict[str, Plugin] = {}  # by hash, so that naming a file twice is harmless


def load_plugin(path: str | Path) -> Plugin:
    """Imports a Python file that the user named on the command line, so that its ``@register`` blocks can be used in YAML rows.

    Only ever called with a path given by the person who runs the command; a path stored in a file is never imported.

    Raises:
        UserError: the file is missing, fails to import, registers a name that is taken, or nothing at all.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--plugins {path}: no such file")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest in _PLUGINS:
        return _PLUGINS[digest]
    module_name = f"{PLUGIN_PREFIX}{path.stem}_{digest[:8]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"--plugins {path}: not a Python file")
    BLOCKS.load_builtins()  # whose names the file cannot take
    before, known = _registrations(), BLOCKS.snapshot()
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
        _check_registered(module, path, changed=_registrations() != before)
    except (Exception, SystemExit) as error:  # whatever a user's file raises becomes one line that names the file
        del sys.modules[module_name]
        BLOCKS.restore(known)
        raise UserError(f"--plugins {path}: {fault_of(error, path, BLOCKS)}") from error
    return _PLUGINS.setdefault(digest, Plugin(path.name, digest))


def _registrations() -> list[Any]:
    """What every registry that a plugin can add to holds; that of export formats only where something has imported it."""
    formats = getattr(sys.modules.get("models.export.registry"), "FORMATS", {})
    return [*BLOCKS.snapshot(), list(TASKS), list(METRIC_COLUMNS), dict(FITNESS_WEIGHTS), list(formats)]


def _check_registered(module: ModuleType, path: Path, *, changed: bool) -> None:
    """Refuses a plugin that adds nothing or a block that cannot run; warns of classes that no row reaches and of undefined names.

    Raises:
        UserError: nothing was registered, or a registered class has no forward.
    """
    registered = {spec.cls for spec in map(BLOCKS.__getitem__, BLOCKS)}
    own = classes_of(module)
    forgotten = [cls for cls in own if cls not in registered]
    if not changed:
        raise UserError(_nothing_registered(forgotten))
    for cls in own:
        if cls in registered and (fault := without_forward(cls)):
            raise UserError(fault)
    for name, line in undefined_names(module):
        hint = remedy(name, BLOCKS)
        log.warning("--plugins %s: line %d: nothing defines %r%s", path, line, name, f"; {hint}" if hint else "")
    if taken := [cls.__name__ for cls in forgotten if cls.__name__ in BLOCKS]:
        for name in taken:
            log.warning("--plugins %s: its class %s is not registered: rows called %s build this project's own", path, name, name)
    used = {name for cls in own for name in _names_in(cls)}
    if alone := [cls.__name__ for cls in forgotten if cls.__name__ not in used and cls.__name__ not in taken]:
        log.warning("--plugins %s: no row can name %s: not registered, and no other class there uses it", path, ", ".join(alone))


def _nothing_registered(classes: Sequence[type[nn.Module]]) -> str:
    """What to write in a file that registers nothing."""
    found = f"the classes found are {', '.join(f'{cls.__name__} (line {line_of(cls)})' for cls in classes)}; " if classes else ""
    place = f" above {' and '.join(cls.__name__ for cls in classes)}" if classes else " above its class"
    return f"registers nothing, so no row can name what is in it; {found}write @register(name, channels=rules.same_width){place}"


def _names_in(cls: type) -> set[str]:
    """Global names that the methods of a class use, and the names of what it extends."""
    return {base.__name__ for base in cls.__mro__[1:]} | globals_of(cls)


def loaded_plugins() -> tuple[Plugin, ...]:
    """The plugins of this process, in the order in which they were loaded."""
    return tuple(_PLUGINS.values())


def _where(cls: Callable[..., Any]) -> str:
    return f"{getattr(cls, '__module__', '?')}.{getattr(cls, '__qualname__', repr(cls))}"
