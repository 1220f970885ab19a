r"""Compute batch norm, activation and pooling of one chunk of examples, and their backward pass.

For a map, let μ be the mean and s the standard deviation of batch norm
(`npbn.functional.batch_norm`). The forward pass computes

$$z = \frac{\gamma}{s} (y - \mu) + \beta \qquad a = \sigma(z) \qquad
  x = \text{mean or maximum of } a \text{ over a window}$$

Let g be the gradient of the loss with respect to x, and m the number of values that μ is the mean
of. The backward pass computes

$$dz = \sigma'(z) g(\text{window}) \qquad d\beta = \sum dz \qquad
  d\gamma = \sum dz \hat{x} \qquad \hat{x} = \frac{y - \mu}{s}$$

$$dy = \frac{\gamma}{s} \Big( dz - \frac{d\beta}{m} - \hat{x} \frac{d\gamma}{m} \Big)
  = \text{scale} \cdot dz - \text{slope} \cdot (y - \text{mean}) + \text{offset}$$

The sums go over the whole batch. So a launch has to end before the sums are used. After the launch,
the sums of the chunks are merged in the order of the chunks.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from npbn.engine.cpu.products import INLINE, OPTIONS
from npbn.engine.cpu.vector import (
    BYTES,
    at,
    fma,
    full,
    load,
    power_of_two,
    store,
    total,
    where_equal,
    where_greater,
)

NO_ACTIVATION, SIGMOID, RELU = range(3)
NO_NORM, BATCH_NORM, FROZEN = range(3)
"""The kinds of batch norm. In training too, FROZEN normalizes by moving averages."""

# The constants of a stage. Each constant has a value for each map: z = (y - mean) · scale + shift.
# The mean μ is stored as two numbers, mean and rest, whose sum is μ, because one number is not
# precise enough. The constant inverse is 1/s. The constants slope and offset are those of dy above.
CONSTANTS = 7
MEAN, REST, SCALE, SHIFT, INVERSE, SLOPE, OFFSET = range(CONSTANTS)

# The results for a chunk that are stored for each map in these rows of net.found: the mean of y,
# the sum of squares about that mean, and the sums from which dβ and dγ are computed. The means of
# all maps come first, then their sums of squares, and so on.
FOUND = 4
MEANS, SQUARES, DBETA, DGAMMA = range(FOUND)


# e^x = 2^k · e^r, where k is the integer nearest to x / ln 2, so that |r| <= ln 2 / 2. For such r,
# a Taylor polynomial is precise enough. ln 2 is HIGH + LOW, and the product k · HIGH is exact (W.
# Cody and W. Waite, "Software Manual for the Elementary Functions", 1980, chapter 6). The addition
# of MAGIC to x / ln 2 rounds x / ln 2 to the integer k, and leaves k in the last bits of the sum.
_F, _D = np.float32, np.float64
LIMIT32, MAGIC32, INVERSE_LN2_32 = _F(87), _F(1.5 * 2**23), _F(1 / math.log(2))
HIGH32, LOW32 = _F(0.693359375), _F(math.log(2) - 0.693359375)
LIMIT64, MAGIC64, INVERSE_LN2_64 = _D(708), _D(1.5 * 2**52), _D(1 / math.log(2))
HIGH64 = _D(float.fromhex("0x1.62e42feep-1"))
LOW64 = _D(float.fromhex("0x1.a39ef35793c76p-33"))  # This constant is the one of fdlibm.
F2, F3, F4, F5, F6, F7 = (_F(1 / math.factorial(i)) for i in range(2, 8))
D2, D3, D4, D5, D6, D7 = (_D(1 / math.factorial(i)) for i in range(2, 8))
D8, D9, D10, D11, D12, D13 = (_D(1 / math.factorial(i)) for i in range(8, 14))


def exponential(x: Any) -> Any:
    """Return e^x for each number x of a vector.

    If x is beyond ±87 in float32 or ±708 in float64, the result is e^x at that limit, so that the
    result is neither infinite nor 0. The result for NaN is NaN.
    """
    raise TypeError("expected to be compiled")


@overload(exponential, jit_options=INLINE, inline="never")
def _exponential(x: Any) -> Any:
    if x.dtype == types.float32:

        def in_float32(x: Any) -> Any:
            x = where_greater(x, LIMIT32, LIMIT32, x)
            x = where_greater(-LIMIT32, x, -LIMIT32, x)
            shifted = fma(x, INVERSE_LN2_32, MAGIC32)
            k = shifted - MAGIC32
            r = fma(k, -LOW32, fma(k, -HIGH32, x))
            p = fma(r, F7, F6)
            p = fma(r, p, F5)
            p = fma(r, p, F4)
            p = fma(r, p, F3)
            p = fma(r, p, F2)
            p = fma(r, p, _F(1))
            p = fma(r, p, _F(1))
            return p * power_of_two(shifted)

        return in_float32

    def in_float64(x: Any) -> Any:
        x = where_greater(x, LIMIT64, LIMIT64, x)
        x = where_greater(-LIMIT64, x, -LIMIT64, x)
        shifted = fma(x, INVERSE_LN2_64, MAGIC64)
        k = shifted - MAGIC64
        r = fma(k, -LOW64, fma(k, -HIGH64, x))
        p = fma(r, D13, D12)
        p = fma(r, p, D11)
        p = fma(r, p, D10)
        p = fma(r, p, D9)
        p = fma(r, p, D8)
        p = fma(r, p, D7)
        p = fma(r, p, D6)
        p = fma(r, p, D5)
        p = fma(r, p, D4)
        p = fma(r, p, D3)
        p = fma(r, p, D2)
        p = fma(r, p, _D(1))
        p = fma(r, p, _D(1))
        return p * power_of_two(shifted)

    return in_float64


@njit(**INLINE)
def constant(net: Any, k: int, which: int, o: int) -> Any:
    """Return a constant of map o of stage k; ``which`` is MEAN, REST or another index."""
    stage = net.stages[k]
    return at(net.values, stage.constants + which * stage.maps + o)


@njit(**OPTIONS)
def activate(net: Any, k: int, slot: int) -> None:
    """Compute a = σ(z) from a stage's y, store it, and pool it into x of the next stage.

    The function goes through as many rows at a time as a pooling window has, so that these rows are
    still in the cache when they are pooled.
    """
    stage, following, values = net.stages[k], net.stages[k + 1], net.values
    height, columns = stage.window_h, stage.columns
    for o in range(stage.maps):
        plane = slot * stage.y_size + o * stage.y_plane
        x = following.x + slot * following.x_size + o * following.x_plane + following.inside
        mean, scale = constant(net, k, MEAN, o), constant(net, k, SCALE, o)
        shift = constant(net, k, SHIFT, o)
        for h in range(stage.rows // height):
            y = stage.y + plane + h * height * columns
            a = stage.z + plane + h * height * columns
            count = height * columns
            if stage.activation == SIGMOID:
                for i in range(count):
                    z = fma(load(values, y + i) - mean, scale, shift)
                    store(values, a + i, 1 / (1 + exponential(0 - z)))
            elif stage.activation == RELU:
                for i in range(count):
                    z = fma(load(values, y + i) - mean, scale, shift)
                    store(values, a + i, where_greater(0, z, 0, z))
            else:
                for i in range(count):
                    store(values, a + i, fma(load(values, y + i) - mean, scale, shift))
            pool_row(net, k, a, x + h * following.x_row)


@njit(**OPTIONS)
def pool_row(net: Any, k: int, a: int, x: int) -> None:
    """Compute the mean or the maximum of each window in a row of windows.

    If an element of a window is NaN, the result for the window is NaN.

    Args:
        net: the arrays of the model.
        k: the index of the stage.
        a: the place of the row of windows.
        x: the place to which the results are written.
    """
    stage, values = net.stages[k], net.values
    height, width, columns = stage.window_h, stage.window_w, stage.columns
    share = values.dtype.type(1 / (height * width))
    for w in range(columns // width):
        pooled = load(values, a + w * width)
        if stage.maximum:
            for i in range(height):
                for j in range(width):
                    one = load(values, a + i * columns + w * width + j)
                    larger = where_greater(one, pooled, one, pooled)
                    pooled = where_equal(one, one, larger, one)
        else:
            pooled = full(values, 0.0)
            for i in range(height):
                for j in range(width):
                    pooled = pooled + load(values, a + i * columns + w * width + j)
            pooled = pooled * share
        store(values, x + w, pooled)


@njit(**OPTIONS)
def unpool_row(net: Any, k: int, a: int, x: int, dx: int, da: int) -> None:
    """Compute the gradient with respect to a row of windows from the gradient of its pooling.

    For maximum pooling, the gradient with respect to a maximum goes to the first element of the
    window that is equal to the maximum. All other elements get 0.

    Args:
        net: the arrays of the model.
        k: the index of the stage.
        a: the place of the row of windows.
        x: the place of the means or maxima of the windows.
        dx: the place of the gradient with respect to the means or maxima.
        da: the place to which the gradient with respect to the row of windows is written.
    """
    stage, values = net.stages[k], net.values
    height, width, columns = stage.window_h, stage.window_w, stage.columns
    share = values.dtype.type(1 / (height * width))
    for w in range(columns // width):
        g = load(values, dx + w)
        if stage.maximum:
            largest = load(values, x + w)
            for i in range(height):
                for j in range(width):
                    place = i * columns + w * width + j
                    one = load(values, a + place)
                    store(values, da + place, where_equal(one, largest, g, 0))
                    g = where_equal(one, largest, 0, g)
        else:
            g = g * share
            for i in range(height):
                for j in range(width):
                    store(values, da + i * columns + w * width + j, g)


@njit(**OPTIONS)
def activate_backward(net: Any, k: int, slot: int, scratch: int) -> None:
    """Compute dz from dx of the next stage, store dz in place of a, and compute batch norm's sums.

    dz = da · σ'(z). The derivative of the sigmoid is a (1 - a). The sums are those of dz and of
    dz · (y - mean) over the chunk; the sums are stored in ``net.found``. dx of the next stage lies
    in the vectors from ``scratch`` on. The memory after dx is used for da.
    """
    stage, following, values = net.stages[k], net.stages[k + 1], net.values
    height, columns, activation = stage.window_h, stage.columns, stage.activation
    da = scratch + following.x_size
    for o in range(stage.maps):
        plane = slot * stage.y_size + o * stage.y_plane
        pooled = o * following.x_plane + following.inside
        x = following.x + slot * following.x_size + pooled
        mean = constant(net, k, MEAN, o)
        dbeta = dgamma = full(values, 0.0)
        for h in range(stage.rows // height):
            y = stage.y + plane + h * height * columns
            a = stage.z + plane + h * height * columns
            row = h * following.x_row
            unpool_row(net, k, a, x + row, scratch + pooled + row, da)
            row_dbeta = row_dgamma = full(values, 0.0)
            for i in range(height * columns):
                dz = load(values, da + i)
                if activation == SIGMOID:
                    one = load(values, a + i)
                    dz = dz * (one * (1 - one))
                elif activation == RELU:
                    dz = where_greater(load(values, a + i), 0, dz, 0)
                store(values, a + i, dz)
                row_dbeta = row_dbeta + dz
                row_dgamma = fma(dz, load(values, y + i) - mean, row_dgamma)
            dbeta = dbeta + row_dbeta
            dgamma = dgamma + row_dgamma
        net.found[stage.found + DBETA * stage.maps + o, slot] = total(dbeta)
        net.found[stage.found + DGAMMA * stage.maps + o, slot] = total(dgamma)


@njit(**OPTIONS)
def normalize_backward(net: Any, k: int, slot: int, mask: Any) -> None:
    """Replace dz by dy, in place; dy is 0 in the lanes that have no example."""
    stage, values = net.stages[k], net.values
    to_y = stage.y - stage.z
    for o in range(stage.maps):
        mean, scale = constant(net, k, MEAN, o), constant(net, k, SCALE, o)
        slope, offset = -constant(net, k, SLOPE, o), constant(net, k, OFFSET, o)
        plane = stage.z + slot * stage.y_size + o * stage.y_plane
        for place in range(plane, plane + stage.rows * stage.columns):
            rest = fma(load(values, place + to_y) - mean, slope, offset)
            store(values, place, fma(load(values, place), scale, rest) * mask)


@njit(**OPTIONS)
def statistics(net: Any, k: int, slot: int, mask: Any, examples: int) -> None:
    """Compute the mean of each map over the chunk, and the sum of squares about the mean.

    The function makes two passes over a map. The first pass computes the mean, which is rounded.
    The second pass subtracts the rounded mean, and corrects both results for the rounding (Chan,
    Golub and LeVeque 1983). Each row is summed first, then the sums of the rows are summed, so that
    there are fewer roundings.
    """
    stage, values = net.stages[k], net.values
    columns = stage.columns
    count = examples * stage.rows * columns
    for o in range(stage.maps):
        plane = stage.y + slot * stage.y_size + o * stage.y_plane
        end = plane + stage.rows * columns
        s = full(values, 0.0)
        for row in range(plane, end, columns):
            row_s = full(values, 0.0)
            for place in range(row, row + columns):
                row_s = row_s + load(values, place)
            s = s + row_s
        mean = values.dtype.type(np.float64(total(s * mask)) / count)
        s = q = full(values, 0.0)
        for row in range(plane, end, columns):
            row_s = row_q = full(values, 0.0)
            for place in range(row, row + columns):
                centred = load(values, place) - mean
                row_s = row_s + centred
                row_q = fma(centred, centred, row_q)
            s = s + row_s
            q = q + row_q
        correction = np.float64(total(s * mask)) / count
        squares = total(q * mask) - count * correction * correction
        net.found[stage.found + MEANS * stage.maps + o, slot] = mean + correction
        net.found[stage.found + SQUARES * stage.maps + o, slot] = squares


# The functions below run between two launches: from the results of the chunks in net.found, they
# compute the constants that the next launch needs.


@njit(**OPTIONS)
def merge(net: Any, k: int, examples: int, training: bool) -> None:
    """Set the constants that normalize y of a stage, and update batch norm's moving averages.

    The means and the sums of squares of the chunks are merged as by T. Chan, G. Golub and R.
    LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979,
    (2.1). The moving averages are updated only if ``training`` is true and batch norm is not
    frozen; otherwise the moving averages normalize y.
    """
    stage, values, found = net.stages[k], net.values, net.found
    lanes = BYTES // values.itemsize
    sites = stage.rows * stage.columns
    for o in range(stage.maps):
        bias = 0.0
        if stage.bias >= 0:
            bias = np.float64(values[stage.bias + o])
        mean, inverse, scale, beta = -bias, 1.0, 1.0, 0.0
        if stage.norm != NO_NORM:
            moving = stage.moving + o
            if training and stage.norm == BATCH_NORM:
                means = found[stage.found + MEANS * stage.maps + o]
                squares = found[stage.found + SQUARES * stage.maps + o]
                chunks = (examples + lanes - 1) // lanes
                s = q = 0.0
                for m in range(chunks):
                    s += min(lanes, examples - m * lanes) * (means[m] - means[0])
                mean = means[0] + s / examples
                for m in range(chunks):
                    count = sites * min(lanes, examples - m * lanes)
                    q += squares[m] + count * (means[m] - mean) ** 2
                var = q / (sites * examples)
                keep = stage.momentum
                values[moving] = keep * values[moving] + (1 - keep) * (mean + bias)
                values[moving + stage.maps] = keep * values[moving + stage.maps] + (1 - keep) * var
            else:
                mean, var = values[moving] - bias, np.float64(values[moving + stage.maps])
            inverse = 1 / math.sqrt(var + stage.eps)
            scale = values[stage.gamma + o] * inverse
            beta = np.float64(values[stage.beta + o])
        rest = mean - np.float64(values.dtype.type(mean))
        to = stage.constants + o
        values[to + MEAN * stage.maps] = mean
        values[to + REST * stage.maps] = rest
        values[to + SCALE * stage.maps] = scale
        values[to + SHIFT * stage.maps] = beta - rest * scale
        values[to + INVERSE * stage.maps] = inverse
        values[to + SLOPE * stage.maps] = 0
        values[to + OFFSET * stage.maps] = 0


@njit(**OPTIONS)
def merge_backward(net: Any, k: int, examples: int) -> None:
    """Compute dγ, dβ and the gradient of the bias of a stage, and the constants slope and offset.

    `normalize_backward` computes dy with the constants slope and offset.
    """
    stage, values, found = net.stages[k], net.values, net.found
    lanes = BYTES // values.itemsize
    m = examples * stage.rows * stage.columns
    for o in range(stage.maps):
        dbeta = q = 0.0
        for chunk in range((examples + lanes - 1) // lanes):
            dbeta += found[stage.found + DBETA * stage.maps + o, chunk]
            q += found[stage.found + DGAMMA * stage.maps + o, chunk]
        inverse = np.float64(constant(net, k, INVERSE, o))
        scale = np.float64(constant(net, k, SCALE, o))
        rest = np.float64(constant(net, k, REST, o))
        dgamma = (q - rest * dbeta) * inverse
        dbias = scale * dbeta
        if stage.norm != NO_NORM:
            values[stage.gamma + stage.gradient + o] = dgamma
            values[stage.beta + stage.gradient + o] = dbeta
        if stage.norm == BATCH_NORM:
            slope = scale * dgamma * inverse / m
            values[stage.constants + SLOPE * stage.maps + o] = slope
            values[stage.constants + OFFSET * stage.maps + o] = slope * rest - scale * dbeta / m
            dbias = 0.0  # Batch norm subtracts the bias, so the loss does not depend on the bias.
        if stage.bias >= 0:
            values[stage.bias + stage.gradient + o] = dbias
