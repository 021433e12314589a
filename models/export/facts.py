"""Metadata of an exported file: class names, stride, image size and the rest, under the keys that other YOLOs use and read."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from utils.errors import UserError


@dataclass(frozen=True)
class ExportFacts:
    """What a reader of an exported file has to know besides its graph."""

    names: tuple[str, ...]  # of the classes
    stride: int = 32  # px; with ``dynamic``, sides of images are multiples of it
    imgsz: tuple[int, int] = (640, 640)  # height, width in px
    batch: int = 1
    ch: int = 3
    dynamic: bool = False  # whether it accepts other sizes and batches than these
    end2end: bool = False  # whether suppression is inside the file
    topk: int = 0  # of the suppression inside: detections an image,
    iou: float = 0.0  # overlap above which a box is dropped,
    conf: float = 0.0  # and score above which a box is a candidate
    task: str = "detect"

    def to_metadata(self) -> dict[str, str]:
        """Plain text values, as ONNX requires them; ``from_metadata`` parses them as Python literals."""
        values = {**asdict(self), "names": dict(enumerate(self.names)), "imgsz": list(self.imgsz)}
        values["channels"] = values.pop("ch")
        return {key: str(value) for key, value in values.items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], *, source: str) -> ExportFacts:
        """Reads what ``to_metadata`` wrote, or what other programs store under the same keys; missing entries take their defaults.

        Raises:
            UserError: an entry cannot be parsed.
        """
        values: dict[str, Any] = {key: _literal(value) for key, value in metadata.items()}
        try:
            names = values.pop("names", {})
            height, width = (imgsz, imgsz) if isinstance(imgsz := values.pop("imgsz", cls.imgsz), int) else imgsz
            plain: dict[str, Any] = {"ch": int(values.get("channels", cls.ch))}
            for key in ("stride", "batch", "dynamic", "end2end", "topk", "iou", "conf", "task"):
                default = getattr(cls, key)
                plain[key] = type(default)(values.get(key, default))
            in_order = [names[k] for k in sorted(names, key=int)] if isinstance(names, dict) else names
            return cls(names=tuple(map(str, in_order)), imgsz=(int(height), int(width)), **plain)
        except (TypeError, ValueError):
            raise UserError(f"{source}: its metadata cannot be understood; export it again with export.py") from None


def _literal(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
