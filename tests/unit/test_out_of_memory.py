"""A device without memory left ends a training in one line that says what to do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from engine.saving import accounted_for
from utils.errors import UserError


def test_the_line(tmp_path):
    run = SimpleNamespace(save_dir=tmp_path)
    with pytest.raises(UserError, match="smaller --batch-size or --imgsz; nothing was saved"), accounted_for(run):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
