"""Makes tests/goldens/explain/grad_cam.npz with the package grad-cam (1.5), which no test needs: its maps of a small network.

Example:
    pip install --no-deps --target FOLDER grad-cam ttach scikit-learn scipy joblib threadpoolctl narwhals
    PYTHONPATH=FOLDER:. python benchmarks/grad_cam_golden.py
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from pytorch_grad_cam import EigenCAM, GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM
from torch import Tensor, nn

from models.analysis.tracing import head_rows
from tests.golden import image_array
from tests.tiny import DUAL_HEAD, tiny_model

PATH = Path(__file__).parents[1] / "tests" / "goldens" / "explain" / "grad_cam.npz"
CLASSES = {"layercam": LayerCAM, "gradcam": GradCAM, "gradcam++": GradCAMPlusPlus, "hirescam": HiResCAM, "eigencam": EigenCAM}
BEST = 3  # candidates that the target is the sum of


class Scores(nn.Module):
    """The scores (B, N, nc) of a detector as the one output that the package takes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.head.decode(self.model(images)).scores


def main() -> None:
    """Writes the vector."""
    model = tiny_model(head=DUAL_HEAD)
    rows, images = head_rows(model), image_array(7, (1, 3, 96, 128))
    wrapped = Scores(model).eval()
    with torch.no_grad():
        scores = wrapped(images)[0]
    levels = (scores.shape[0] * 16 // 21, scores.shape[0] * 20 // 21, scores.shape[0])  # strides 8, 16 and 32: 16, 4 and 1 of 21
    starts = (0, *levels[:-1])
    best = [start + scores[start:end].max(1).values.argmax() for start, end in zip(starts, levels)]  # one of each level
    candidates = torch.stack(best)
    classes = scores[candidates].argmax(1)
    arrays = {"candidates": candidates.numpy(), "classes": classes.numpy()}

    def target(output: Tensor) -> Tensor:
        return output[candidates, classes].sum()

    for name, cls in CLASSES.items():
        layers = [model.model[row] for row in rows]
        with cls(wrapped, target_layers=layers) as cam:
            together = cam(input_tensor=images, targets=[target])
            activations = [a.cpu().numpy() for a in cam.activations_and_grads.activations]
            gradients = [g.cpu().numpy() for g in cam.activations_and_grads.gradients] or activations  # EigenCAM has none
            for row, layer, a, g in zip(rows, layers, activations, gradients):
                arrays[f"{name}.{row}"] = cam.get_cam_image(images, layer, [target], a, g, False)[0].astype(np.float32)
        arrays[f"{name}.together"] = together[0].astype(np.float32)
    notes = "maps (h, w) of the rows that the head of tests/tiny.py's dual network reads, before they are cut off at 0 and scaled"
    PATH.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(PATH, meta=json.dumps({"notes": notes, "rows": rows, "package": "grad-cam"}), **arrays)
    print(f"{PATH}: {len(arrays)} arrays")


if __name__ == "__main__":
    main()
