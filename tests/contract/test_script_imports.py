"""What ``--help`` imports: the slow packages are imported where they are used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SLOW = ("torchvision", "torch._dynamo", "matplotlib", "tensorboard", "onnx", "onnxruntime", "pycocotools")
CODE = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit:
    pass
sys.exit(" ".join(name for name in {slow} if name in sys.modules) or 0)
"""


@pytest.mark.parametrize("script", ["train.py", "val.py", "detect.py", "export.py", "study.py", "explain.py"])
def test_help_imports_no_slow_package(script):
    run = subprocess.run([sys.executable, "-c", CODE.format(slow=SLOW), script], cwd=ROOT, capture_output=True, text=True)
    assert "usage:" in run.stdout, run.stderr
    assert run.returncode == 0, run.stderr
