"""``detect.py --data``: a file that is not there is refused, also where it would not be read."""

import pytest

from engine.inference.detect import detect
from utils.cli.detect_arguments import DetectConfig
from utils.errors import UserError


@pytest.mark.parametrize("source", ["", "images"])
def test_a_dataset_that_is_not_there_is_refused(source):
    with pytest.raises(UserError, match=r"dataset file nofile not found, tried .*; known names: "):
        detect(DetectConfig(weights="none.pt", data="nofile", source=source, device="cpu"))
