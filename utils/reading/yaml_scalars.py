"""One plain or quoted text of a YAML as a value: the types that config files need, and no others.

YAML 1.1 as PyYAML reads it, without its surprises: dates, octal and sexagesimal numbers stay the text that was written (``010`` is neither
8 nor 10). What PyYAML writes without quotes is read back as it was.
"""

from __future__ import annotations

import re
from typing import Any

from utils.reading.limits import MAX_YAML_DIGITS, MAX_YAML_TEXT
from utils.reading.text_files import REPLACED

_WORDS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **{spelled: value for word, value in {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}.items()
       for spelled in (word, word.capitalize(), word.upper())},
}  # fmt: skip
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*)", re.ASCII)
_HEX = re.compile(r"[-+]?0x[0-9a-fA-F]+", re.ASCII)
_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+][0-9]+)?", re.ASCII)
_SPECIAL = re.compile(r"([-+]?)\.(inf|Inf|INF|nan|NaN|NAN)")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_CORE = "tag:yaml.org,2002:"
_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (float, int), "bool": (bool,), "null": (type(None),)}


class ScalarError(ValueError):
    """A text that is not read; the message says why, without the place."""


def check_text(text: str) -> None:
    """Refuses what no config file holds on purpose.

    Raises:
        ScalarError: bytes of another encoding, control characters, or too much of it.
    """
    if REPLACED in text:
        raise ScalarError("is not UTF-8 text (GBK or another code page?); save the file as UTF-8")
    if fault := control_character(text):
        raise ScalarError(fault)
    if len(text) > MAX_YAML_TEXT:
        raise ScalarError(f"a text of {len(text):,} characters, at most {MAX_YAML_TEXT:,} are read")


def control_character(text: str) -> str:
    """Names the first control character or lone surrogate of a text; empty where there is none. Tabs and line ends are none."""
    found = _CONTROL.search(text)
    return f"holds the control character U+{ord(found[0]):04X}" if found else ""


def scalar_value(text: str, *, tag: str | None, is_plain: bool) -> Any:
    """The value of a text.

    Args:
        tag: as written, resolved; None where there is none.
        is_plain: without quotes.

    Raises:
        ScalarError: a tag that is not read, or a text that is not of its tag's type.
    """
    if tag is None:
        return plain_value(text) if is_plain else text
    kind = tag.removeprefix(_CORE) if tag.startswith(_CORE) else ""
    if kind == "str" or tag == "!":
        return text
    if kind not in _TYPES:
        raise ScalarError(f"the tag {shown_tag(tag)} is not read here; write the value without it")
    value: Any = plain_value(text)
    if type(value) not in _TYPES[kind]:
        raise ScalarError(f"{text[:40]!r} is no {kind}, which its tag {shown_tag(tag)} asks for")
    return float(value) if kind == "float" else value


def plain_value(text: str) -> Any:
    """An unquoted text as None, a boolean, a number, or the text that it is.

    Raises:
        ScalarError: a number of too many digits.
    """
    if text in _WORDS:
        return _WORDS[text]
    if special := _SPECIAL.fullmatch(text):
        return float(special[1] + special[2])
    is_int, is_hex = _INT.fullmatch(text), _HEX.fullmatch(text)
    if not (is_int or is_hex or _FLOAT.fullmatch(text)):
        return text
    if len(text) > MAX_YAML_DIGITS:
        raise ScalarError(f"a number of {len(text):,} digits, at most {MAX_YAML_DIGITS} are read")
    return int(text, 16 if is_hex else 10) if is_int or is_hex else float(text)


def shown_tag(tag: str) -> str:
    """A resolved tag as it is written: ``!!int``."""
    return f"!!{tag.removeprefix(_CORE)}"[:80] if tag.startswith(_CORE) else tag[:80]
