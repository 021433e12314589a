"""TorchScript archives, checked before torch reads them: what is opened is a copy that holds the checked members and nothing else.

torch runs an archive's code, some of it while it loads. The copy leaves no room for a second reading: neither another table of contents in
the same file, nor a file that changes in between.
"""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from models.export.archive_code import check_code
from models.export.archive_pickles import check_pickle
from utils.errors import UserError, first_line

MOST_TABLE_BYTES = 8 << 20  # of the table of contents
MOST_CODE_BYTES, MOST_PICKLE_BYTES, MOST_EXTRA_BYTES = 1 << 20, 1 << 20, 4 << 20  # all code, all pickles, the extra file; unpacked
COPIED_BYTES = 1 << 20  # at a time
_NAME = re.compile(r"[A-Za-z0-9_./-]{1,400}")
_CODE, _NUMBERS = re.compile(r"code/.+\.py"), re.compile(r"(data|constants)/[0-9]+")
_PICKLES = ("data.pkl", "constants.pkl")
_VERSION = re.compile(rb"[0-9]{1,4}\n?")
_SMALL = {"version": _VERSION, ".data/version": _VERSION, "byteorder": re.compile(rb"little|big")}
_LEFT_OUT = re.compile(
    r"code/.+\.py\.debug_pkl|traced_inputs(\.pkl|/[0-9]+)|extra/.+|\.data/serialization_id|\.format_version|\.storage_alignment"
)
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OverflowError, struct.error)


def copy_checked(path: Path, copy: Path, *, extra: str) -> str:
    """Writes an archive without what torch does not need to ``copy``, once its code and its pickles have been read; returns an extra file.

    Args:
        extra: name of the extra file, which may be missing: then its text is empty.

    Raises:
        UserError: no archive, a damaged or an oversized one, or one that does more than an exported network.
    """
    try:
        _check_table(path)
        with zipfile.ZipFile(path) as source:
            archive = _Archive(source, path)
            archive.check()
            archive.write(copy)
            return archive.text(f"extra/{extra}")
    except UserError as error:
        raise UserError(f"{error}; --trust opens a file of your own unread") from None
    except _ZIP_ERRORS as error:
        raise UserError(f"{path}: not a TorchScript export, or a damaged one ({first_line(error)})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be checked before it is opened ({error.strerror or error})") from None


def _check_table(path: Path) -> None:
    """Refuses a table of contents that would fill the memory: ``zipfile`` reads it whole."""
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - (1 << 17), 0))
        tail = file.read(1 << 17)
    end = tail.rfind(b"PK\5\6")
    if end < 0 or len(tail) < end + 22:
        raise zipfile.BadZipFile("no table of contents at its end")
    size = struct.unpack_from("<I", tail, end + 12)[0]
    if end >= 76 and tail[end - 20 : end - 16] == b"PK\6\7":  # a second record for large archives, which counts
        size = struct.unpack_from("<Q", tail, end - 76 + 40)[0]
    if size > MOST_TABLE_BYTES:
        raise UserError(f"{path}: a table of contents of {size:,} bytes; at most {MOST_TABLE_BYTES:,} are read")


class _Archive:
    """The members of one archive by their name inside it, without the name of the archive that each begins with."""

    def __init__(self, source: zipfile.ZipFile, path: Path) -> None:
        self.source, self.path = source, path
        self.members: dict[str, zipfile.ZipInfo] = {}
        folded: set[str] = set()
        roots: set[str] = set()
        for info in source.infolist():
            root, _, name = info.filename.partition("/")
            roots.add(root)
            folded.add(name.lower())  # torch finds members whatever the case of their letters
            self.members[name] = info
            if not _NAME.fullmatch(name) or len(roots) > 1:
                raise self._refusal(info)
        if len(folded) != len(source.infolist()):
            raise UserError(f"{path}: holds two members of one name, which no exported network needs")

    def check(self) -> None:
        """Reads code and pickles; everything else has to be of a kind that is known."""
        stored = code = 0
        for name, info in self.members.items():
            if _CODE.fullmatch(name):
                code += info.file_size
                self._check_size(code, MOST_CODE_BYTES, "code")
                check_code(self._ascii(name), where=f"{self.path}: {name.removeprefix('code/__torch__/')}")
            elif _NUMBERS.fullmatch(name):
                stored += info.file_size
                if info.compress_type != zipfile.ZIP_STORED or stored > self.path.stat().st_size:
                    raise self._refusal(info)
            elif name in _SMALL:
                self._check_size(info.file_size, 16, name)
                if not _SMALL[name].fullmatch(self.source.read(info)):
                    raise self._refusal(info)
            elif name not in _PICKLES and not _LEFT_OUT.fullmatch(name):
                raise self._refusal(info)
        pickles = [name for name in _PICKLES if name in self.members]
        self._check_size(sum(self.members[name].file_size for name in pickles), MOST_PICKLE_BYTES, "pickles")
        for name in pickles:
            check_pickle(self.source.read(self.members[name]), where=f"{self.path}: {name}", sizes=self._sizes(name))

    def write(self, copy: Path) -> None:
        """The members that torch reads, under the names that were checked."""
        with zipfile.ZipFile(copy, "w") as target:
            for name, info in self.members.items():
                if _LEFT_OUT.fullmatch(name):
                    continue
                member = zipfile.ZipInfo(f"{copy.stem}/{name}")
                member.file_size = info.file_size
                with self.source.open(info) as reading, target.open(member, "w") as writing:
                    while block := reading.read(COPIED_BYTES):
                        writing.write(block)

    def text(self, name: str) -> str:
        """A member as text; empty where there is none."""
        if name not in self.members:
            return ""
        self._check_size(self.members[name].file_size, MOST_EXTRA_BYTES, name)
        return self.source.read(self.members[name]).decode()

    def _sizes(self, pickle: str) -> Mapping[str, int]:
        """Bytes of the members that a pickle's tensors may name."""
        folder = pickle.removesuffix("pkl").replace(".", "/")
        return {name.removeprefix(folder): info.file_size for name, info in self.members.items() if name.startswith(folder)}

    def _ascii(self, name: str) -> str:
        try:
            return self.source.read(self.members[name]).decode("ascii")
        except UnicodeDecodeError:
            raise UserError(f"{self.path}: {name} holds letters that no exported network needs") from None

    def _check_size(self, size: int, most: int, what: str) -> None:
        if size > most:
            raise UserError(f"{self.path}: {size:,} bytes of {what}; at most {most:,} are read")

    def _refusal(self, info: zipfile.ZipInfo) -> UserError:
        return UserError(f"{self.path}: holds the member {info.filename[:100]!a}, which no exported network needs")
