"""``python -m models.edit``: see models.edit.rows."""

from __future__ import annotations

import sys

from models.edit.rows import main

if __name__ == "__main__":
    sys.exit(main())
