"""The argument parser of every command: what it refuses is one line, not the whole usage."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn

from utils.errors import nearest, one_line

USAGE_STATUS = 2
_UNKNOWN = re.compile(r"unrecognized arguments: (--[\w-]+)")


class OneLineParser(argparse.ArgumentParser):
    """``argparse.ArgumentParser`` with short errors that name the nearest flag."""

    def error(self, message: str) -> NoReturn:
        unknown = _UNKNOWN.match(message)
        meant = nearest(unknown[1], (s for s in self._option_string_actions if s.startswith("--"))) if unknown else ""
        self.exit(USAGE_STATUS, f"{self.prog}: {one_line(message, most=500)}; {meant or '--help lists what is accepted'}\n")
