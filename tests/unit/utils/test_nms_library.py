"""torchvision's suppression without its package, which costs as much time and memory at the start as torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torchvision import ops

from utils import nms as module
from utils.nms import nms

BOXES = "torch.tensor([[0.0, 0, 10, 10], [0, 0, 9, 10], [20, 20, 30, 30]]), torch.tensor([0.5, 0.6, 0.7]), 0.5"


def test_it_is_torchvisions() -> None:
    g = torch.Generator().manual_seed(0)
    low = torch.rand(200, 2, generator=g) * 50
    boxes, scores = torch.cat((low, low + 20), dim=1), torch.rand(200, generator=g)
    assert torch.equal(nms(boxes, scores, 0.4), ops.nms(boxes, scores, 0.4))


def run(program: str, root: str) -> list[str]:
    program = f"import sys; sys.path.insert(0, {root!r})\n{program}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()


def test_a_prediction_imports_neither_torchvision_nor_a_compiler(request: pytest.FixtureRequest) -> None:
    program = (
        "import torch\nfrom models import build_model\nfrom utils.nms import nms\n"
        "build_model('yolov8n.yaml').predict(torch.zeros(1, 3, 64, 64))\n"
        f"assert nms({BOXES}).tolist() == [2, 1]\n"
        "print(*(name for name in ('torchvision', 'torch._dynamo', 'sympy') if name in sys.modules))\n"
        "import torchvision\n"  # may still come later
        f"assert torchvision.ops.nms({BOXES}).tolist() == [2, 1]\n"
    )
    if not any(module.PathFinder.find_spec(name, list(torchvision_folders())) for name in module.LIBRARIES):
        pytest.skip("this torchvision's library has another name")
    assert run(program, str(request.config.rootpath)) == []


@pytest.mark.parametrize("names", ["()", "('nothing', '_C_absent')"])
def test_the_package_is_imported_where_its_library_is_unknown(request: pytest.FixtureRequest, names: str) -> None:
    program = (
        f"import torch\nfrom utils import nms\nnms.LIBRARIES = {names}\nassert nms.nms({BOXES}).tolist() == [2, 1]\n"
        "print('torchvision' in sys.modules)"
    )
    assert run(program, str(request.config.rootpath)) == ["True"]


def torchvision_folders() -> list[str]:
    import torchvision

    return list(torchvision.__path__)
