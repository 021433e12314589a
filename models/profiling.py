"""``python -m models.profiling``: see models.analysis.profiling."""

from __future__ import annotations

import sys

from models.analysis.profiling import main

if __name__ == "__main__":
    sys.exit(main())
