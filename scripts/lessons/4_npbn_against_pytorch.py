# %% [markdown]
# # npbn against PyTorch
#
# npbn computes every gradient with formulas that somebody derived; PyTorch derives them itself
# (autograd). Both are given the same weights and the same batches. If npbn is right, the losses
# must lie on top of one another, as far as rounding allows. How far is that? A third contestant
# shows it: PyTorch once more, with a batch norm that is written by hand.

# %%
from _lesson import BLUE, GREEN, ORANGE, start

lesson = start(needs=("torch",), curves=True)

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import safetensors.torch
import torch
from torch import nn

from _curves import curves, ten_epochs, ten_epochs_of_pytorch
from npbn import functional as F
from npbn.backend import get_backend
from npbn.checkpoint import export_torch
from npbn.models import LeNet
from npbn.optim import SGD

dataset = lesson.data()

# %% [markdown]
# ## A batch norm without a backward pass
#
# These few lines are all that one has to write with autograd. `weight` and `bias` are PyTorch's
# names for $\gamma$ and $\beta$.


# %%
class HandWritten(nn.Module):
    """Batch norm for PyTorch, as the formulas say it; autograd finds the backward pass."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            axes = (0, 2, 3)[: x.ndim - 1]
            mean = x.mean(axes, keepdim=True)
            var = ((x - mean) ** 2).mean(axes, keepdim=True)
            with torch.no_grad():  # both are in the units of x, one number a feature
                self.running_mean = 0.9 * self.running_mean + 0.1 * mean.flatten()
                self.running_var = 0.9 * self.running_var + 0.1 * var.flatten()
        else:
            mean, var = (
                self.per_feature(self.running_mean, x),
                self.per_feature(self.running_var, x),
            )
        x_hat = (x - mean) / torch.sqrt(var + 1e-5)
        return self.per_feature(self.weight, x) * x_hat + self.per_feature(self.bias, x)

    @staticmethod
    def per_feature(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return values.reshape(1, -1, *[1] * (x.ndim - 2))


# %% [markdown]
# Network A with PyTorch's modules. npbn's model writes its weights into a file as PyTorch would,
# and PyTorch reads it.


# %%
def in_pytorch(model: LeNet, norm_of_maps: type, norm_of_vectors: type) -> nn.Sequential:
    """PyTorch's network A, with the weights of npbn's."""
    network = nn.Sequential(
        *(nn.Conv2d(1, 6, 5), norm_of_maps(6), nn.Sigmoid(), nn.AvgPool2d(2)),
        *(nn.Conv2d(6, 16, 5), norm_of_maps(16), nn.Sigmoid(), nn.AvgPool2d(2)),
        nn.Flatten(),
        *(nn.Linear(256, 120), norm_of_vectors(120), nn.Sigmoid()),
        *(nn.Linear(120, 84), norm_of_vectors(84), nn.Sigmoid()),
        nn.Linear(84, 10),
    )
    with tempfile.TemporaryDirectory() as folder:
        export_torch(model, Path(folder) / "weights.safetensors")
        weights = safetensors.torch.load_file(Path(folder) / "weights.safetensors")
    network.to(weights["0.weight"].dtype)
    # Only PyTorch's own batch norm counts the batches.
    network.load_state_dict(weights, strict=norm_of_maps is nn.BatchNorm2d)
    return network


networks = {
    "PyTorch": lambda model: in_pytorch(model, nn.BatchNorm2d, nn.BatchNorm1d),
    "PyTorch, hand-written batch norm": lambda model: in_pytorch(model, HandWritten, HandWritten),
}
