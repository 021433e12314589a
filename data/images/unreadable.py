"""Images that become unreadable while an epoch runs: a few are reported once, many end it.

Workers replace each by a grey image without objects, which depends on the file alone; the main process counts them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from utils.errors import UserError

TOLERATED, TOLERATED_PART = 3, 0.1  # images, whichever is more
SHOWN = 10


class UnreadableImages:
    """Files of a data set that could not be read.

    Args:
        count: images in the data set.
        prefix: words before messages.
    """

    def __init__(self, count: int, *, prefix: str = "") -> None:
        self.count, self.prefix = count, prefix
        self.reasons: dict[str, str] = {}  # path -> what is wrong
        self._new: list[str] = []

    def add(self, found: Iterable[tuple[str, str]]) -> None:
        """Records (path, message) pairs.

        Raises:
            UserError: the folder is gone, or too many images are unreadable to train on the rest.
        """
        for path, reason in found:
            if path in self.reasons:
                continue
            folder = Path(path).parent
            if not folder.is_dir():
                raise UserError(f"{folder}: the folder of {Path(path).name} and others is gone; is its disk still mounted?")
            self.reasons[path] = reason
            self._new.append(reason)
        limit = max(TOLERATED, int(self.count * TOLERATED_PART))
        if len(self.reasons) > limit:
            first = next(iter(self.reasons.values()))
            raise UserError(f"{len(self.reasons)} of {self.count} images cannot be read any more (at most {limit} may), first: {first}")

    def report(self) -> None:
        """Prints those that are new since the last report."""
        if self._new:
            more = f" and {len(self._new) - SHOWN} more" if len(self._new) > SHOWN else ""
            named = "; ".join(self._new[:SHOWN])
            print(f"warning: {self.prefix}{len(self._new)} image(s) replaced by grey: {named}{more}", file=sys.stderr)
        self._new = []
