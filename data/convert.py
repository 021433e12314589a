"""``python -m data.convert``: see data.tools.convert."""

from __future__ import annotations

import sys

from data.tools.convert import main

if __name__ == "__main__":
    sys.exit(main())
