"""The YAML inside another program's checkpoint in this project's dialect.

What those programs decide in code and not in the YAML is read off the pickled layers: the default activation, the activation within SPPF,
which newer versions leave out, and the kernels and the activation of YOLOv5's and YOLOv9's bottleneck blocks, which differ from release to
release.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from models.checkpoints.foreign_modules import children, is_module, walk
from models.checkpoints.safe_pickle import Record
from models.checkpoints.torch_files import StoredTensor
from models.heads.anchor_free import BINS
from models.layers.attention.yolov12 import POSITION_KERNEL
from models.layers.conv import ACTIVATIONS
from utils.errors import UserError

NO_CAP = 1 << 16  # a width that no network has
ONE_SCALE = "one"  # of a file without scales; no letter, because blocks of YOLO11 and YOLO12 differ at some of these
DEEPEST, MOST_VALUES = 12, 100_000
MASK_HEADS = ("Segment", "Segment26", "DSegment", "DualDSegment")  # whose rows have more than classes and anchors
TWO_BRANCHES = ("v10Detect", "Segment26", "Pose26")  # heads that always begin with two branches
ONE_TO_MANY, ONE_TO_ONE = "cv2", "one2one_cv2"  # the box convolutions of a head's two branches
KEPT = ("nc", "depth_multiple", "width_multiple", "activation")
ACTIVATION_SETTINGS = ("negative_slope", "alpha", "lambd")
OWN_ACTIVATION = ("HGStem", "HGBlock", "LightConv")
BOTTLENECKS = ("Bottleneck", "BottleneckCSP")
ACTIVATION_MODULES = ("torch.nn", "utils.activations")  # the latter: YOLOv5's own forms of Hardswish, SiLU and Mish, for export
RENAMED = {"torch.nn.Upsample": "nn.Upsample", "Upsample": "nn.Upsample"}


def translated(model: Record, rows: Sequence[Record], *, tensors: Mapping[str, StoredTensor], strides: Sequence[float]) -> dict[str, Any]:
    """The model's YAML as a mapping that ``read_spec`` takes.

    Raises:
        UserError: there is none, or its rows are not the layers.
    """
    raw = plain(model.state.get("yaml"))
    if not isinstance(raw, dict) or not isinstance(raw.get("head"), list):
        raise UserError("holds a network without its YAML; give --cfg with a state dict of it instead")
    listed = raw.get("backbone")
    backbone = listed if isinstance(listed, list) else []
    if len(backbone) + len(raw["head"]) != len(rows):
        raise UserError(f"its YAML has {len(backbone) + len(raw['head'])} rows, the network {len(rows)}")
    cfg: dict[str, Any] = {key: raw[key] for key in KEPT if raw.get(key) is not None}
    cfg["nc"] = _classes(model, rows[-1], raw)
    cfg["ch"] = _first_channels(rows[0], raw)
    is_newer = model.cls.module.startswith("ultralytics")
    if raw.get("scales") or is_newer:
        cfg = _scaled(cfg, raw)
    anchors = _anchors(rows[-1], raw, strides)
    if anchors is not None:
        cfg["anchors"] = anchors
    if not cfg.get("activation"):
        activation = _usual_activation(rows)
        if activation not in (None, "nn.SiLU()"):
            cfg["activation"] = activation
    if _is_fused(tensors):
        cfg["fused"] = True
    cfg |= _head_keys(rows[-1])
    written = [*backbone, *raw["head"]]
    usual = cfg.get("activation", "nn.SiLU()")
    out = [_row(row, layer, usual=usual) for row, layer in zip(written, rows)]
    out[-1] = _head_row(out[-1], rows[-1], anchored=isinstance(anchors, list))
    cfg["backbone"], cfg["head"] = out[: len(backbone)], out[len(backbone) :]
    return cfg


def plain(value: Any) -> Any:
    """Plain values of a pickled structure; activations become their text, other records their class's name.

    Raises:
        UserError: nested without end.
    """
    budget = [MOST_VALUES]

    def convert(v: Any, depth: int) -> Any:
        budget[0] -= 1
        if depth > DEEPEST or budget[0] < 0:
            raise UserError("its YAML is nested or long beyond reason")
        if isinstance(v, Mapping):
            return {k if isinstance(k, (str, int)) else str(k): convert(x, depth + 1) for k, x in v.items() if not isinstance(k, Record)}
        if isinstance(v, (list, tuple)):
            return [convert(x, depth + 1) for x in v]
        if isinstance(v, Record):
            return _activation_text(v) or v.cls.name
        return v if isinstance(v, (str, int, float, bool, type(None))) else getattr(v, "name", None)

    return convert(value, 0)


def _scaled(cfg: dict[str, Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    """The v8 dialect; files of early versions and unscaled ones get a scale of their own."""
    depth, width = cfg.pop("depth_multiple", 1.0), cfg.pop("width_multiple", 1.0)
    scales, scale = raw.get("scales"), str(raw.get("scale") or "")
    if isinstance(scales, dict) and scales:
        cfg["scales"] = {str(name): [*values, NO_CAP][:3] for name, values in scales.items()}
        cfg["scale"] = scale if scale in cfg["scales"] else next(iter(cfg["scales"]))
    else:
        cfg["scales"], cfg["scale"] = {ONE_SCALE: [float(depth), float(width), NO_CAP]}, ONE_SCALE
    return cfg


def _classes(model: Record, head: Record, raw: Mapping[str, Any]) -> int:
    found = next((nc for nc in (head.state.get("nc"), raw.get("nc"), model.state.get("nc")) if isinstance(nc, int)), None)
    if found is None or found < 1:
        raise UserError("does not say how many classes it has")
    return found


def _first_channels(first: Record, raw: Mapping[str, Any]) -> int:
    given = raw.get("ch", raw.get("channels", 3))
    return given if isinstance(given, int) and given > 0 else 3


def _anchors(head: Record, raw: Mapping[str, Any], strides: Sequence[float]) -> Any:
    """Anchor boxes in px; None for a head without. A YAML that only counts them leaves them to the head's buffer."""
    buffers = head.state.get("_buffers")
    stored = buffers.get("anchors") if isinstance(buffers, dict) else None
    if not isinstance(stored, StoredTensor) or len(stored.shape) != 3:
        return raw.get("anchors") if isinstance(raw.get("anchors"), int) else None
    if isinstance(raw.get("anchors"), list):
        return raw["anchors"]
    if len(strides) != stored.shape[0]:
        raise UserError("has anchors without the strides that bring them to px")
    levels = stored.load().float().flatten(1).tolist()
    return [[round(size * stride, 3) for size in level] for level, stride in zip(levels, strides)]


def _head_keys(head: Record) -> dict[str, Any]:
    """The keys of the file that say which form of its name the head has, from the head itself: programs can change it after reading."""
    bins = head.state.get("reg_max", BINS)
    keys: dict[str, Any] = {"reg_max": bins} if isinstance(bins, int) and bins != BINS else {}
    if head.cls.name not in TWO_BRANCHES and _child(head, ONE_TO_ONE) is not None:
        keys["end2end"] = True
    if (shape := plain(head.state.get("kpt_shape"))) is not None:
        keys["kpt_shape"] = shape
    return keys


def _branches(head: Record) -> str | None:
    """The one branch that a head made for two has left; None for all others."""
    many, one = (_child(head, name) is not None for name in (ONE_TO_MANY, ONE_TO_ONE))
    if one and not many:
        return "one2one"
    return "one2many" if head.cls.name in TWO_BRANCHES and many and not one else None


def _usual_activation(rows: Sequence[Record]) -> str | None:
    """The activation of most convolutions, less those of blocks that have one of their own."""
    kinds: Counter[str] = Counter()
    for module in (found for row in rows if row.cls.name not in OWN_ACTIVATION for _, found in walk(row)):
        act = children(module).get("act")
        text = _activation_text(act) if isinstance(act, Record) else None
        if text not in (None, "nn.Identity()"):
            kinds[str(text)] += 1
    return kinds.most_common(1)[0][0] if kinds else None


def _activation_text(module: Record) -> str | None:
    """Such as ``nn.LeakyReLU(0.1)``; None for what is no activation of the framework's."""
    name = module.cls.name
    if name not in ACTIVATIONS or not module.cls.module.startswith(ACTIVATION_MODULES):
        return None
    values = [module.state[key] for key in ACTIVATION_SETTINGS if isinstance(module.state.get(key), (int, float))]
    return f"nn.{name}({', '.join(f'{v:g}' for v in values)})"


def _is_fused(tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether batch norms are folded: none is left beside its convolution. BottleneckCSP's common one stays in any case."""
    return not any(name.endswith(".running_mean") and not _is_common_norm(name, tensors) for name in tensors)


def _is_common_norm(name: str, tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether it is the norm of a BottleneckCSP, behind two bare convolutions."""
    block = name.removesuffix("bn.running_mean")
    return block != name and f"{block}cv2.weight" in tensors and f"{block}cv3.weight" in tensors


def _row(row: Any, layer: Record, *, usual: str) -> list[Any]:
    if not isinstance(row, list) or len(row) != 4:
        raise UserError(f"its YAML has a row that is not [from, number, module, args]: {str(row)[:60]}")
    source, number, module, args = row
    name = RENAMED.get(str(module), str(module).removeprefix("torch.") if str(module).startswith("torch.nn.") else str(module))
    args = [*args] if isinstance(args, list) else [args]
    first = children(layer).get("cv1")
    if name == "SPPF" and isinstance(first, Record) and is_module(first):
        act = children(first).get("act")
        if isinstance(act, Record) and act.cls.name == "Identity":
            args.append({"act": False})
    if name in BOTTLENECKS:
        args += [{key: value} for key, value in _bottleneck_options(name, args, layer, usual=usual).items()]
    if name == "A2C2f":
        args += [{key: value} for key, value in _area_options(layer).items()]
    if name == "RepConv" and "conv1" in children(layer):  # ultralytics' block of this name is YOLOv9's
        name = "RepConvN"
    return [source, number, name, args]


def _bottleneck_options(name: str, args: Sequence[Any], layer: Record, *, usual: str) -> dict[str, Any]:
    """Kernels and activation of a row's bottlenecks, as the file has them, where the row does not say."""
    block = _child(layer, "0") or layer  # the first of several in a row
    options: dict[str, Any] = {}
    inner = _child(block, "m", "0") if name == "BottleneckCSP" else block
    convolutions = [_child(inner, cv, "conv") for cv in ("cv1", "cv2")] if inner else []
    sizes = [_kernel(conv) for conv in convolutions if conv]
    if len(sizes) == 2 and not any(isinstance(a, list) for a in args):
        options["k"] = sizes
    act = _child(block, "act")
    text = _activation_text(act) if act else None
    if text not in (None, usual):
        options["act"] = text
    return options


def _area_options(layer: Record) -> dict[str, Any]:
    """What releases of area attention differ in: the kernel of the position convolution, and the width of the perceptron."""
    position, wide = _child(layer, "m", "0", "0", "attn", "pe", "conv"), _child(layer, "m", "0", "0", "mlp", "0", "conv")
    options: dict[str, Any] = {}
    if position and (kernel := _kernel(position)) != POSITION_KERNEL:
        options["position_kernel"] = kernel
    width, hidden = (wide.state.get(key) for key in ("in_channels", "out_channels")) if wide else (0, 0)
    if isinstance(width, int) and isinstance(hidden, int) and width > 0 and hidden > 0:
        exact = (round(hidden / width, digits) for digits in range(1, 16))
        options["mlp_ratio"] = next((ratio for ratio in exact if int(width * ratio) == hidden), hidden / width)
    return options


def _kernel(conv: Record) -> Any:
    """The kernel of a convolution: one number where both sides are equal."""
    size = plain(conv.state.get("kernel_size"))
    return size[0] if isinstance(size, list) and len(set(size)) == 1 else size


def _child(module: Record, *path: str) -> Record | None:
    """The module at a path within another; None where there is none."""
    found: Any = module
    for name in path:
        found = children(found).get(name) if isinstance(found, Record) else None
    return found if isinstance(found, Record) else None


def _head_row(row: list[Any], head: Record, *, anchored: bool) -> list[Any]:
    """The head with the classes and anchors of this file; YOLOv7's with folded implicit layers is a plain one."""
    source, number, name, args = row
    if isinstance(head.state.get("forward"), Record) and name in ("IDetect", "IAuxDetect"):
        if name == "IAuxDetect":
            source = source[: len(source) // 2]
        name = "Detect"
    options = [a for a in args if isinstance(a, dict)]
    if name == "RTDETRDecoder":
        options = [*args[1:]]  # its sizes
    if branches := _branches(head):
        options.append({"branches": branches})
    behind = [a for a in args[2 if anchored else 1 :] if not isinstance(a, dict)] if name in MASK_HEADS else []
    shape = ["kpt_shape"] if "kpt_shape" in head.state else []
    return [source, number, name, ["nc", "anchors", *behind] if anchored else ["nc", *behind, *shape, *options]]
