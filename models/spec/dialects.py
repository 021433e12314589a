"""Which program's files a model YAML is one of: blocks of one name are not the same in all of them.

``v5`` files are YOLOv5's and YOLOv7's, ``v9`` files YOLOv9's, ``v8`` files those of ultralytics. YOLOv5, v7 and v9 ask for ``anchors:``
in every file, anchor-free ones included; ultralytics' files have none, and ``scales:`` unless the network has one size only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from utils.errors import UserError, nearest

DIALECTS = ("v5", "v8", "v9")
V9_HEADS = frozenset(["DDetect", "DualDetect", "DualDDetect", "TripleDetect", "TripleDDetect", "DSegment", "DualDSegment"])
V8_HEADS = frozenset(["Pose26", "RTDETRDecoder", "Segment26", "v10Detect"])
SHARED_HEADS = frozenset(["Classify", "Detect", "OBB", "Pose", "Segment"])  # without anchors: YOLOv9's or ultralytics'
# Blocks of YOLOv7 and YOLOv9 that ultralytics does not have: with them a file without anchors is not one of ultralytics.
NOT_ULTRALYTICS = frozenset(
    ["BottleneckCSPA", "BottleneckCSPB", "BottleneckCSPC", "CSP", "DownC", "MP", "ReOrg", "RepConvN", "RepNBottleneck", "RepNCSP", "Res"]
    + ["Shortcut", "Silence", "SP", "SPPCSPC"]
)


def dialect_of(data: Mapping[str, Any], modules: Sequence[str], head_args: Sequence[Any], *, origin: str) -> str:
    """The dialect of a YAML: the one it names (``dialect:``), or else the one that its keys, its blocks and its head show.

    Args:
        modules: the module of every row; the last is the head's.
        head_args: arguments of the last row.

    Raises:
        UserError: ``dialect:`` is not a known one.
    """
    named = data.get("dialect")
    if named is not None:
        if named not in DIALECTS:
            hint = nearest(str(named), DIALECTS) or "known are " + ", ".join(DIALECTS)
            raise UserError(f"{origin}: unknown dialect {named!r}; {hint}")
        return str(named)
    if "scales" in data:
        return "v8"
    head = modules[-1]
    if head in V9_HEADS:
        return "v9"
    if head in V8_HEADS:
        return "v8"
    sized = isinstance(data.get("anchors"), (list, tuple)) or any(isinstance(a, (list, tuple)) or a == "anchors" for a in head_args)
    if sized or head not in SHARED_HEADS:
        return "v5"
    blocks = {module.partition("_")[0] for module in modules}
    return "v9" if data.get("anchors") is not None or blocks & NOT_ULTRALYTICS else "v8"
