"""Text of a file that somebody gives: a regular file of bounded size, in UTF-8 or with a byte-order mark."""

from __future__ import annotations

import codecs
import os
from pathlib import Path

from utils.errors import UserError
from utils.files import NotAFileError, TooLargeError, read_bounded
from utils.reading.limits import MAX_NAME_BYTES, MAX_PATH_CHARS, MAX_TEXT_BYTES

REPLACED = "\ufffd"  # stands for bytes that are no UTF-8
# By the mark at the start of a text; that of UTF-32 begins with that of UTF-16.
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
          (codecs.BOM_UTF16_BE, "utf-16"))  # fmt: skip


def read_bytes(path: str | Path, *, most: int = MAX_TEXT_BYTES, kind: str = "file") -> bytes:
    """The content of a regular file; folders, devices and pipes, which may never end, are not opened.

    Args:
        most: largest size in bytes.
        kind: what the file should be, for messages.

    Raises:
        UserError: missing, unreadable, no regular file, or larger than ``most``.
    """
    try:
        return read_bounded(path, limit=most)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except NotAFileError as error:
        raise UserError(f"{path}: a {kind} is expected, this is {error.kind}") from None
    except TooLargeError:
        raise UserError(f"{path}: a {kind} of more than {most:,} bytes is not read") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def decode(content: bytes) -> str:
    """Text from bytes: by their byte-order mark, else as UTF-8; ``REPLACED`` stands for what is neither."""
    return content.decode(marked_encoding(content) or "utf-8", errors="replace")


def marked_encoding(content: bytes) -> str:
    """The encoding that a byte-order mark names, which decoding leaves out; empty where there is no mark."""
    return next((encoding for mark, encoding in _MARKS if content.startswith(mark)), "")


def user_path(text: str | Path, where: str) -> Path:
    """A path that somebody wrote, with ``~`` expanded.

    Args:
        where: begins the message: a flag, or a file and its key.

    Raises:
        UserError: no path that could exist: a NUL, a name that is too long, the home of an unknown user.
    """
    if fault := path_fault(str(text)):
        raise UserError(f"{where}: {fault}")
    return Path(os.path.expanduser(text))


def folder_name_fault(text: str) -> str:
    """Why a run folder cannot have this name below its project; empty where it can. ``group/name`` is a name too."""
    parts = text.replace(os.sep, "/").split("/")
    if not text.strip():
        return "a name is needed, this one is empty"
    if os.path.isabs(text) or not {".", ".."}.isdisjoint(parts):
        return f"{text[:80]!r} is a path; the folder is made below --project: give --project and --name"
    return path_fault(text)


def path_fault(text: str) -> str:
    """Why no file can have this path; empty where one can."""
    if "\0" in text:
        return f"{text[:80]!r} holds a NUL character"
    if "\t" in text or "\n" in text:
        return f"{text[:80]!r} holds a tab or a line end; write / for \\, which is an escape in double quotes"
    longest = max(text.replace(os.sep, "/").split("/"), key=len)
    if len(os.fsencode(longest)) > MAX_NAME_BYTES:
        return f"the name {longest[:40]}… has {len(os.fsencode(longest))} bytes, at most {MAX_NAME_BYTES} are possible"
    if len(text) > MAX_PATH_CHARS:
        return f"the path {text[:40]}… has {len(text)} characters, at most {MAX_PATH_CHARS} are possible"
    if text.startswith("~") and os.path.expanduser(text) == text:
        return f"{text}: there is no user {text[1:].split('/')[0]!r} here (./~name is a folder of that name)"
    return ""
