"""Class activation maps: where the channels of a row speak for a target, from their activations and the target's gradients.

Each method is a function of a row's activations (C, h, w) and gradients (C, h, w) to a map (h, w), before it is scaled; parts that speak
against the target are cut off at 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.errors import UserError, nearest

Method = Callable[[Tensor, Tensor], Tensor]
GRAD_CAM_PP_EPS = 1e-6


def layer_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """LayerCAM (IEEE TIP 2021, equations 4 and 5): each place is weighted by its own gradient where that is positive."""
    return (gradients.clamp(min=0) * activations).sum(0).clamp(min=0)


def grad_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM (arXiv 1610.02391, equations 1 and 2): each channel is weighted by the mean of its gradient over the map."""
    return (gradients.mean((1, 2), keepdim=True) * activations).sum(0).clamp(min=0)


def grad_cam_pp(activations: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM++ (arXiv 1710.11063, equations 10 and 19): positive gradients count, the more the fewer places share a channel."""
    square, cube = gradients**2, gradients**3
    shared = activations.sum((1, 2), keepdim=True) * cube
    alpha = torch.where(gradients != 0, square / (2 * square + shared + GRAD_CAM_PP_EPS), torch.zeros_like(square))
    weights = (alpha * gradients.clamp(min=0)).sum((1, 2), keepdim=True)
    return (weights * activations).sum(0).clamp(min=0)


def hires_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """HiResCAM (arXiv 2011.08891, equation 3): the product of activation and gradient, place by place, both signs."""
    return (gradients * activations).sum(0).clamp(min=0)


def eigen_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """EigenCAM (arXiv 2008.00299): the projection on the first principal component of the places' channels. Knows no target.

    A component has no sign of its own; it is the one in which places of large activation are positive.
    """
    rows = activations.flatten(1).t()  # (N, C)
    centred = rows - rows.mean(0)
    _, _, components = torch.linalg.svd(centred, full_matrices=False)
    projection = centred @ components[0]
    energy = rows.norm(dim=1)
    sign = torch.where((projection * (energy - energy.mean())).sum() < 0, -1.0, 1.0)
    return (sign * projection).view(activations.shape[1:]).clamp(min=0)


METHODS: Mapping[str, Method] = {
    "layercam": layer_cam,
    "gradcam": grad_cam,
    "gradcam++": grad_cam_pp,
    "hirescam": hires_cam,
    "eigencam": eigen_cam,
}


def method_of(name: str) -> Method:
    """A method by its name.

    Raises:
        UserError: an unknown name.
    """
    if name.lower() not in METHODS:
        raise UserError(f"method {name!r}: {nearest(name, METHODS) or 'known are ' + ', '.join(METHODS)}")
    return METHODS[name.lower()]


def scaled(cam: Tensor) -> Tensor:
    """A map divided by its maximum; zeros stay zeros, and so does a map of numbers that are not finite."""
    cam = torch.nan_to_num(cam.float(), nan=0.0, posinf=0.0, neginf=0.0)
    most = cam.max() if cam.numel() else cam.new_zeros(())
    return cam / most if most > 0 else torch.zeros_like(cam)


def resized(cam: Tensor, hw: tuple[int, int]) -> Tensor:
    """A map (h, w) at another size, bilinear between the centres of its cells."""
    return F.interpolate(cam[None, None].float(), hw, mode="bilinear", align_corners=False)[0, 0]


def combined(cams: Sequence[Tensor], hw: tuple[int, int]) -> Tensor:
    """Maps of several rows as one of height and width ``hw``: the mean of those that are not 0 everywhere, each in 0-1, in 0-1."""
    lively = [resized(scaled(cam), hw) for cam in cams if bool((cam > 0).any())]
    return scaled(torch.stack(lively).mean(0)) if lively else torch.zeros(hw)
