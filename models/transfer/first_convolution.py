"""Weights of one number of input channels for a network of another: its first convolution is adapted, found by the graph.

An image whose channels are all equal (grey) gives the same response after as before, whatever the numbers: 3 to 1 sums over RGB; 3 to N
keeps RGB and gives every further channel their mean, all times 3/N, so that the batch norms behind it see values of the size they know.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.model import Model

RGB = 3


def adapted_to_channels(weight: Tensor, in_channels: int) -> Tensor:
    """A convolution's weight for another number of input channels, with the same response where all channels are equal.

    To three or more channels from three or more, the first ones stay what they are (RGB), up to one factor: further channels get the
    mean of all, and channels that are gone leave their sum, spread evenly. Otherwise every channel gets an equal part of the sum.

    Args:
        weight: (O, C, kh, kw).
        in_channels: N.

    Returns:
        (O, N, kh, kw), in the weight's type, on its device; ``weight`` itself where N is C.
    """
    have = weight.shape[1]
    if have == in_channels:
        return weight
    exact = weight.double()
    total = exact.sum(dim=1, keepdim=True)  # (O, 1, kh, kw)
    if min(have, in_channels) < RGB:
        adapted = (total / in_channels).repeat(1, in_channels, 1, 1)
    elif in_channels > have:
        extra = (total / have).repeat(1, in_channels - have, 1, 1)
        adapted = torch.cat((exact, extra), dim=1) * (have / in_channels)
    else:
        gone = exact[:, in_channels:].sum(dim=1, keepdim=True)
        adapted = exact[:, :in_channels] + gone / in_channels
    return adapted.to(weight.dtype)


def adapted_tensor(weight: Tensor, shape: tuple[int, ...], *, channels: tuple[int, int]) -> Tensor | None:
    """A first convolution's weight brought to ``shape``; None where it differs in more than the number of image channels.

    Rows that fold the image's space into channels (ReOrg, Focus, Contract) give several images' channels, block after block.

    Args:
        channels: Of the images that the weight was trained on, and of those that it shall read.
    """
    have, wanted = channels
    if weight.dim() != 4 or len(shape) != 4 or weight.shape[0] != shape[0] or tuple(weight.shape[2:]) != shape[2:]:
        return None
    blocks, rest = divmod(shape[1], wanted)
    if rest or weight.shape[1] != blocks * have:
        return None
    return torch.cat([adapted_to_channels(block, wanted) for block in weight.split(have, dim=1)], dim=1)


def first_convolutions(model: Model) -> frozenset[str]:
    """Names of the convolution weights in rows that read the image, directly or through rows without parameters."""
    images, names = {-1}, []
    for plan, layer in zip(model.plans, model.model):
        if not images.intersection(plan.sources):
            continue
        parameters = [name for name, value in layer.named_parameters() if value.dim() == 4]
        if any(True for _ in layer.parameters()):
            names += [f"model.{plan.index}.{name}" for name in parameters]
        elif len(plan.sources) == 1:
            images.add(plan.index)
    return frozenset(names)
