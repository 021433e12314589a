"""The deployed form of a run's best weights, checked on validation images before it is left beside them."""

from __future__ import annotations

import sys
from pathlib import Path

from engine.training.run import Run
from models.checkpoints.convert import convert
from utils.errors import UserError

PICTURES = 2


def save_deployed(run: Run, best: Path) -> Path | None:
    """Writes ``best-deploy.pt`` beside best.pt, and says so; None where the network is folded already or the check fails.

    The run is done by then: what goes wrong here is a warning.
    """
    if run.model.spec.fused:
        return None
    images = run.val_loader.dataset.image_files[:PICTURES]
    try:
        done = convert(best, deploy=True, images=images)
    except UserError as error:
        print(f"warning: no deployed weights: {error}", file=sys.stderr)
        return None
    print(f"Deployed  {done}")
    return done.path
