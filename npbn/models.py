"""Define the two networks of npbn: LeNet-5 (LeCun et al. 1998) with batch norm, in two sizes.

Both networks can also be built without batch norm, for comparison.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from npbn.layers import AvgPool2d, BatchNorm, Conv2d, Flatten, Layer, Linear, Sequential, Sigmoid


class LeNet(Sequential):
    """Network A: LeNet with batch norm, for images of 1 × 28 × 28 and 10 classes.

    The network has two blocks of convolution (5 × 5), batch norm, sigmoid and average pooling
    (2 × 2). Three linear layers follow, with batch norm and sigmoid between them. The sides of the
    maps are 28 → 24 → 12 → 8 → 4. With batch norm, there are 44,878 parameters.

    Args:
        batch_norm: whether the network has batch norm.
        activation: a class of layers, one of which follows each batch norm.
        generator: the generator of the initial weights. By default, this is a new generator.
    """

    def __init__(
        self,
        *,
        batch_norm: bool = True,
        activation: Callable[[], Layer] = Sigmoid,
        generator: np.random.Generator | None = None,
    ) -> None:
        super().__init__(*_lenet_layers(1, 28, 10, 0, batch_norm, activation, generator))


class BLeNet(Sequential):
    """Network B: LeNet with padding 2 in the first convolution, for square images of any size.

    For images of side f, the sides of the maps are f → f → f/2 → f/2 - 4 → (f/2 - 4)/2, with halves
    rounded down. For f = 28, these are 28 → 28 → 14 → 10 → 5.

    Args:
        channels: the number of channels of the images: 1 for grey images.
        fig_size: the side of the images in pixels, at least 12.
        num_class: the number of classes.
        batch_norm: whether the network has batch norm.
        activation: a class of layers, one of which follows each batch norm.
        generator: the generator of the initial weights. By default, this is a new generator.
    """

    def __init__(
        self,
        channels: int = 1,
        fig_size: int = 28,
        num_class: int = 10,
        *,
        batch_norm: bool = True,
        activation: Callable[[], Layer] = Sigmoid,
        generator: np.random.Generator | None = None,
    ) -> None:
        if fig_size < 12:
            raise ValueError(f"expected fig_size >= 12, got {fig_size}")
        super().__init__(
            *_lenet_layers(channels, fig_size, num_class, 2, batch_norm, activation, generator)
        )


def _lenet_layers(
    channels: int,
    side: int,
    num_class: int,
    padding: int,
    batch_norm: bool,
    activation: Callable[[], Layer],
    generator: np.random.Generator | None,
) -> list[Layer]:
    generator = np.random.default_rng() if generator is None else generator
    side = (side + 2 * padding - 4) // 2  # The first convolution and pooling shrink the side.
    side = (side - 4) // 2  # So do the second convolution and pooling.

    def block(affine: Layer, features: int, num_dims: int) -> list[Layer]:
        norm: list[Layer] = [BatchNorm(features, num_dims)] if batch_norm else []
        return [affine, *norm, activation()]

    return [
        *block(Conv2d(channels, 6, 5, padding=padding, generator=generator), 6, 4),
        AvgPool2d(2),
        *block(Conv2d(6, 16, 5, generator=generator), 16, 4),
        AvgPool2d(2),
        Flatten(),
        *block(Linear(16 * side * side, 120, generator=generator), 120, 2),
        *block(Linear(120, 84, generator=generator), 84, 2),
        Linear(84, num_class, generator=generator),
    ]
