"""Compute the sizes of a stage that the kernels need, and the lengths of the kernels' arrays.

The kernels, too, compute the lengths of their arrays in shared memory. The functions here must give
the same lengths; tests compare both.
"""

from __future__ import annotations

from collections.abc import Sequence

from npbn.engine.gpu.program import SHAPE_FIELDS
from npbn.engine.plan import StagePlan
from npbn.layers import MaxPool2d, ReLU, Sigmoid

# The constants of kernels.cu.
TILE, TILE_K, VECTOR = 16, 128, 4
ROWS_PER_THREAD, MAPS_PER_THREAD, TAPS_PER_THREAD, BANKS, PARAMETERS_PER_BLOCK = 4, 2, 5, 32, 32
ACTIVATIONS = {type(None): 0, Sigmoid: 1, ReLU: 2}

TILES = (2 * TILE * (TILE_K + VECTOR),)
"""The lengths of the arrays that ``tile_of_product`` of kernels.cu allocates in shared memory."""


def normalization(stage: KernelStage) -> tuple[int, ...]:
    """Return the lengths of the arrays in shared memory of ``normalization`` in kernels.cu."""
    return (stage.maps,) * 4


def over(number: int, by: int) -> int:
    """Return number / by, rounded up."""
    return -(-number // by)


class KernelStage:
    """A stage of the plan with its sizes, or the images as a stage without operations.

    Attributes:
        plan: the stage of the plan; None for the images.
        sizes: the values of the fields of the kernels' ``Shape``.
        linear: whether the affine map is a linear layer.
        norm: the batch norm of the stage, or None.
        inputs: the number of elements of an example's input x.
        values: the number of elements of an example's y, the output of the affine map.
        outputs: the number of elements of an example's output after pooling.
        weights: the number of elements of the weight.
        planes: the length of the array of an example's padded x in the forward pass.
        summed: the length of the array of an example's padded x in the backward pass.
        wide: the length of the array of an example's dy with zeros around and between its elements.
        gradients: the length of the array of an example's dy without such zeros.
        classifier: the lengths of the arrays of ``linear_cross_entropy``: a tile of inputs, the
            weights, and a tile of logits.
    """

    def __init__(self, name: str, plan: StagePlan | None, sizes: Sequence[int]) -> None:
        self.name, self.plan = name, plan
        self.linear = plan is not None and plan.linear
        self.norm = None if plan is None else plan.norm
        self.sizes = s = dict(zip(SHAPE_FIELDS, map(int, sizes), strict=True))
        self.channels, self.maps = s["channels"], s["maps"]
        self.inputs = self.channels * s["height"] * s["width"]
        self.values = self.maps * s["rows"] * s["columns"]
        self.outputs = self.values // (s["window_h"] * s["window_w"])
        self.weights = self.maps * self.channels * s["kernel_h"] * s["kernel_w"]
        down, across = (
            (s[axis], s[f"stride_{side}"], s[f"kernel_{side}"])
            for axis, side in (("rows", "h"), ("columns", "w"))
        )
        self.planes = self.channels * _plane_read(down, across)
        self.summed = self.channels * _plane_summed(down, across)
        self.wide = self.maps * _plane_read(
            (s["height"], 1, s["kernel_h"]), (s["width"], 1, s["kernel_w"])
        )
        pitch = self.inputs | 1
        self.classifier = TILE * pitch, self.maps * pitch, TILE * self.maps
        self.gradients = (
            over(self.maps, MAPS_PER_THREAD) * MAPS_PER_THREAD * s["rows"] * (s["columns"] | 1)
        )


_Axis = tuple[int, int, int]
"""The number of outputs, the stride and the kernel size along one axis of the image."""


def _plane_read(down: _Axis, across: _Axis) -> int:
    """Return the area of a plane with the layout that ``planes_read`` of kernels.cu returns."""
    rows, stride, kernel = down
    columns, stride_w, kernel_w = across
    height = (over(rows, ROWS_PER_THREAD) * ROWS_PER_THREAD - 1) * stride + kernel
    width = (columns - 1) * stride_w + kernel_w
    return height * _raised(width, over(columns, ROWS_PER_THREAD), BANKS // ROWS_PER_THREAD)


def _plane_summed(down: _Axis, across: _Axis) -> int:
    """Return the area of a plane with the layout that ``planes_summed`` of kernels.cu returns."""
    height, width = ((outputs - 1) * stride + kernel for outputs, stride, kernel in (down, across))
    return _raised(height * (width | 1), down[2] * (width | 1), BANKS)


def _raised(number: int, like: int, divisor: int) -> int:
    """Return the smallest n >= number for which n - like is a multiple of the divisor."""
    return number + (like - number) % divisor


def images_of(channels: int, height: int, width: int) -> KernelStage:
    """Return the images as a stage without operations, which comes before the first stage."""
    shape = channels, height, width
    return KernelStage("images", None, (*shape, *shape, *(1, 1), *(1, 1), *(0, 0), *(1, 1), 0, 0))


def stage_of(name: str, plan: StagePlan) -> KernelStage:
    """Return a stage of the plan with its sizes."""
    geometry = *plan.kernel, *plan.stride, *plan.padding, *plan.window
    maximum, activation = type(plan.pool) is MaxPool2d, ACTIVATIONS[type(plan.activation)]
    return KernelStage(name, plan, (*plan.shape, *plan.maps, *geometry, maximum, activation))
