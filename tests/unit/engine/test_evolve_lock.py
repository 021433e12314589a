"""The folder of a search belongs to one process, as that of a run does."""

from __future__ import annotations

import pytest

from engine.training.evolve import evolve
from utils.config import TrainConfig
from utils.errors import UserError


def test_second_search_in_the_same_folder_is_refused(tmp_path):
    config = TrainConfig(cfg="yolov9-t.yaml", data="shapes.yaml", evolve=2, project=tmp_path, name="search")
    said = []

    def train(generation):
        with pytest.raises(UserError, match=r"search: process \d+ on .* trains in it") as caught:
            evolve(config, train)
        said.append(str(caught.value))
        raise KeyboardInterrupt

    for _ in range(2):  # what an interrupted search leaves locks nothing
        with pytest.raises(KeyboardInterrupt, match="holds 0 of 2 generations"):
            evolve(config, train)
    assert len(said) == 2
