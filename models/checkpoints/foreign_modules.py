"""A pickled network, as records, taken apart: its tensors by name, and the class and settings of each layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeGuard

from torch import Tensor, nn

from models.checkpoints.safe_pickle import Record
from models.checkpoints.stored_tensors import check_total
from models.checkpoints.torch_files import StoredTensor
from utils.errors import UserError

DEEPEST = 50  # modules within modules
MOST_MODULES = 100_000
WRAPPERS = ("module", "_orig_mod")  # children that DataParallel and torch.compile add around a network
# What must be equal in a layer of the framework's own, where a file's layer and the one built for it have the same place.
COMPARED = (
    "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "eps", "negative_slope", "scale_factor", "mode", "ceil_mode"
)  # fmt: skip

SAME_LAYERS = {"NonDynamicallyQuantizableLinear": "Linear"}  # the framework's name for a linear layer in its multi-head attention


class Layer(NamedTuple):
    """What a file records of one module: its class, and the settings that tensors do not show."""

    kind: str
    settings: Mapping[str, Any]


def is_module(value: Any) -> TypeGuard[Record]:
    """Whether it is a record of an object that holds modules."""
    return isinstance(value, Record) and isinstance(value.state.get("_modules"), dict)


def children(module: Record) -> dict[str, Any]:
    """The modules directly within, by name."""
    found = module.state.get("_modules")
    return found if isinstance(found, dict) else {}


def unwrapped(module: Record) -> Record:
    """The network within DataParallel, DistributedDataParallel and compiled modules."""
    for _ in range(DEEPEST):
        inner = [child for name, child in children(module).items() if name in WRAPPERS and is_module(child)]
        if len(inner) != 1 or len(children(module)) != 1:
            break
        module = inner[0]
    return module


def rows_of(model: Record) -> list[Record]:
    """The layers of ``model.model``, one a YAML row. Raises UserError for a network of another build."""
    rows = children(model).get("model")
    layers = list(children(rows).values()) if is_module(rows) else []
    if not layers or not all(isinstance(layer, Record) for layer in layers):
        raise UserError(f"holds a {model.cls.name}, whose layers are not rows of a YOLO's YAML")
    return layers


def tensors_of(model: Record) -> dict[str, StoredTensor]:
    """The state dict of the network: parameters, then buffers that are meant to be saved, module by module."""
    found: dict[str, StoredTensor] = {}
    for path, module in walk(model):
        temporary = module.state.get("_non_persistent_buffers_set") or ()
        for table in ("_parameters", "_buffers"):
            entries = module.state.get(table)
            for name, value in entries.items() if isinstance(entries, dict) else ():
                if isinstance(value, StoredTensor) and not (table == "_buffers" and name in temporary):
                    found[f"{path}.{name}" if path else str(name)] = value
    return found


def layers_of(model: Record) -> dict[str, Layer]:
    """Every module of the framework's own classes by its path, with its settings; and whether blocks add their input."""
    found = {}
    for path, module in walk(model):
        own = module.cls.module.startswith("torch.nn.modules")
        names = COMPARED if own else ("add",)
        settings = {name: _plain(module.state[name]) for name in names if name in module.state}
        if own or settings:
            found[path] = Layer(_kind(module.cls.name) if own else "", settings)
    return found


def differences(expected: Mapping[str, Layer], model: nn.Module) -> list[str]:
    """Where the network that was built is another than the file's, in words; layers without a counterpart are left out."""
    built = dict(model.named_modules())
    found = []
    for path, layer in expected.items():
        own = built.get(path)
        if own is None or (layer.kind and not type(own).__module__.startswith("torch.nn.modules")):
            continue
        if layer.kind and _kind(type(own).__name__) != layer.kind:
            found.append(f"{path} is {layer.kind} in the file and {type(own).__name__} here")
            continue
        for name, value in layer.settings.items():
            here = _plain(getattr(own, name, value))
            if here != value and not (isinstance(value, float) and isinstance(here, (int, float)) and abs(here - value) < 1e-12):
                found.append(f"{path}.{name} is {value} in the file and {here} here")
    return found


def walk(module: Record, path: str = "", depth: int = 0) -> Iterator[tuple[str, Record]]:
    """Every module with its path, parents first. Raises UserError where they are nested without end."""
    for count, (name, found) in enumerate(_walk(module, path, depth)):
        if count > MOST_MODULES:
            raise UserError(f"holds more than {MOST_MODULES} modules; no network has as many")
        yield name, found


def _walk(module: Record, path: str, depth: int) -> Iterator[tuple[str, Record]]:
    if depth > DEEPEST:
        raise UserError(f"holds modules nested more than {DEEPEST} deep, or within themselves")
    yield path, module
    for name, child in children(module).items():
        if isinstance(child, Record):
            yield from _walk(child, f"{path}.{name}" if path else str(name), depth + 1)


def loaded(tensors: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """The tensors themselves, floating-point ones as float32. Raises UserError naming the one that is damaged."""
    check_total(list(tensors.values()))
    weights = {}
    for name, stored in tensors.items():
        try:
            tensor = stored.load()
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        weights[name] = tensor.float() if tensor.is_floating_point() else tensor
    return weights


def _kind(name: str) -> str:
    """The class of a layer; those that compute the same have one name."""
    return SAME_LAYERS.get(name, name)


def _plain(value: Any) -> Any:
    """A setting in one form: sizes given as one number or as equal ones are the same."""
    if isinstance(value, (list, tuple)):
        return value[0] if value and all(v == value[0] for v in value) else tuple(value)
    return value
