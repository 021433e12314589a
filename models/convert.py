"""``python -m models.convert``: see models.checkpoints.convert."""

from __future__ import annotations

import sys

from models.checkpoints.convert import main

if __name__ == "__main__":
    sys.exit(main())
