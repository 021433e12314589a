"""``python -m models.catalogue``: see models.analysis.catalogue."""

from __future__ import annotations

import sys

from models.analysis.catalogue import main

if __name__ == "__main__":
    sys.exit(main())
