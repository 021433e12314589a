"""``python -m data.check``: see data.tools.check."""

from __future__ import annotations

import sys

from data.tools.check import main

if __name__ == "__main__":
    sys.exit(main())
