"""``python -m data.shapes``: see data.tools.shapes."""

from __future__ import annotations

import sys

from data.tools.shapes import main

if __name__ == "__main__":
    sys.exit(main())
