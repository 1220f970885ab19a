"""Define LeNet with batch norm in PyTorch, with which scripts compare npbn. Needs PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def lenet(
    *,
    padding: int = 0,
    maps: tuple[int, int] = (6, 16),
    norm_of_maps: Callable[[int], nn.Module] = nn.BatchNorm2d,
    norm_of_vectors: Callable[[int], nn.Module] = nn.BatchNorm1d,
) -> nn.Sequential:
    """Return network A or, with ``padding=2``, network B, with layers in the order of npbn's.

    Args:
        padding: the padding of the first convolution.
        maps: the numbers of maps of the first and the second convolution.
        norm_of_maps: a function of the number of maps that returns the batch norm after a
            convolution.
        norm_of_vectors: a function of the number of features that returns the batch norm after a
            linear layer.
    """
    first, second = maps
    side = ((28 + 2 * padding - 4) // 2 - 4) // 2
    return nn.Sequential(
        *(nn.Conv2d(1, first, 5, padding=padding), norm_of_maps(first)),
        *(nn.Sigmoid(), nn.AvgPool2d(2)),
        *(nn.Conv2d(first, second, 5), norm_of_maps(second), nn.Sigmoid(), nn.AvgPool2d(2)),
        nn.Flatten(),
        *(nn.Linear(second * side * side, 120), norm_of_vectors(120), nn.Sigmoid()),
        *(nn.Linear(120, 84), norm_of_vectors(84), nn.Sigmoid()),
        nn.Linear(84, 10),
    )


class HandWrittenBatchNorm(nn.Module):
    """Batch norm in elementary operations, as in a lesson; autograd does the backward pass."""

    moving_mean: torch.Tensor
    moving_var: torch.Tensor

    def __init__(self, features: int, num_dims: int) -> None:
        super().__init__()
        shape = (1, features, 1, 1)[:num_dims]
        self.gamma = nn.Parameter(torch.ones(shape))
        self.beta = nn.Parameter(torch.zeros(shape))
        self.register_buffer("moving_mean", torch.zeros(shape))
        self.register_buffer("moving_var", torch.ones(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, var = self.moving_mean, self.moving_var
        if self.training:
            axes = (0, 2, 3)[: x.ndim - 1]
            mean = x.mean(axes, keepdim=True)
            var = ((x - mean) ** 2).mean(axes, keepdim=True)
            self.moving_mean = 0.9 * self.moving_mean + 0.1 * mean.detach()
            self.moving_var = 0.9 * self.moving_var + 0.1 * var.detach()
        return self.gamma * (x - mean) / torch.sqrt(var + 1e-5) + self.beta
