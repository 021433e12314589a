"""The nearest orthogonal matrix, approximately: Newton-Schulz iteration without a decomposition.

Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon) gives the coefficients: five steps bring singular values from 0-1
to about 0.7 to 1.2, whatever they were.
"""

from __future__ import annotations

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.775, 2.0315)
STEPS = 5
LEAST_NORM = 1e-7


def orthogonalised(matrices: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """X ← a X + (b A + c A²) X with A = X Xᵀ, from X over its Frobenius norm.

    Args:
        matrices: (k, rows, columns).
        dtype: of the products. None: bfloat16 as published, but on a CPU, where it is ten times slower, float32.

    Returns:
        (k, rows, columns), of the type of ``matrices``.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x.to(dtype or (torch.float32 if x.device.type == "cpu" else torch.bfloat16))
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + LEAST_NORM)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)
