r"""Batch norm, activation and pooling of one chunk of examples, and their backward pass.

With the batch norm's mean μ and standard deviation s of a map (`npbn.functional.batch_norm`),

$$z = \frac{\gamma}{s} (y - \mu) + \beta \qquad a = \sigma(z) \qquad
  x = \text{mean or maximum of } a \text{ over a window}$$

and back, with g the gradient of the loss with respect to x,

$$dz = \sigma'(z) g(\text{window}) \qquad d\beta = \sum dz \qquad
  d\gamma = \sum dz \hat{x} \qquad \hat{x} = \frac{y - \mu}{s}$$

$$dy = \frac{\gamma}{s} \Big( dz - \frac{d\beta}{m} - \hat{x} \frac{d\gamma}{m} \Big)
  = \text{scale} \cdot dz - \text{slope} \cdot (y - \text{mean}) + \text{offset}$$

The sums go over the whole batch. So a launch ends where they are needed, and the sums of its chunks
are merged in the order of the chunks.
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
"""A frozen batch norm normalizes by its moving averages, in training as well."""

# The constants of a stage, with a value for each map: z = (y - mean) · scale + shift. The batch's
# mean is stored as the sum mean + rest, because one number is not precise enough. inverse is 1/s.
CONSTANTS = 7
MEAN, REST, SCALE, SHIFT, INVERSE, SLOPE, OFFSET = range(CONSTANTS)

# The sums that a chunk computes for each map, in these rows of net.found.
FOUND = 4
MEANS, SQUARES, DBETA, DGAMMA = range(FOUND)


# e^x = 2^k · e^r, where k is the integer nearest to x / ln 2, so that |r| <= ln 2 / 2: there a
# Taylor polynomial is enough. ln 2 is HIGH + LOW; k · HIGH is exact (W. Cody and W. Waite,
# "Software Manual for the Elementary Functions", 1980, chapter 6). Adding MAGIC rounds to the
# integer, and leaves it in the last bits.
_F, _D = np.float32, np.float64
LIMIT32, MAGIC32, INVERSE_LN2_32 = _F(87), _F(1.5 * 2**23), _F(1 / math.log(2))
HIGH32, LOW32 = _F(0.693359375), _F(math.log(2) - 0.693359375)
LIMIT64, MAGIC64, INVERSE_LN2_64 = _D(708), _D(1.5 * 2**52), _D(1 / math.log(2))
HIGH64 = _D(float.fromhex("0x1.62e42feep-1"))
LOW64 = _D(float.fromhex("0x1.a39ef35793c76p-33"))  # as in fdlibm
F2, F3, F4, F5, F6, F7 = (_F(1 / math.factorial(i)) for i in range(2, 8))
D2, D3, D4, D5, D6, D7 = (_D(1 / math.factorial(i)) for i in range(2, 8))
D8, D9, D10, D11, D12, D13 = (_D(1 / math.factorial(i)) for i in range(8, 14))


def exponential(x: Any) -> Any:
    """e^x of a vector; the smallest normal number or the largest where that would be beyond.

    NaN stays NaN.
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
    """Return a constant of map o of stage k."""
    stage = net.stages[k]
    return at(net.values, stage.constants + which * stage.maps + o)


@njit(**OPTIONS)
def activate(net: Any, k: int, slot: int) -> None:
    """Compute a = σ(z) from a stage's y, store it, and pool it into x of the next stage.

    It goes through as many rows at a time as a window has, so that they are pooled from the cache.
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
    """A row of windows: the mean or the maximum of each; NaN where one of a window is NaN."""
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
    """The gradient with respect to a row of windows, to ``da``, from that of its means or maxima.

    A maximum's goes to the first element of the window that is as large.
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
    """Compute dz from dx of the next stage, store it in place of a, and add up batch norm's sums.

    dz = da · σ'(z); the sums are those of dz and of dz · (y - mean) over the chunk. The sigmoid's
    derivative is a (1 - a). dx is at ``scratch``; after it, there is room for da.
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
        net.found[stage.found + FOUND * o + DBETA, slot] = total(dbeta)
        net.found[stage.found + FOUND * o + DGAMMA, slot] = total(dgamma)


@njit(**OPTIONS)
def normalize_backward(net: Any, k: int, slot: int, mask: Any) -> None:
    """dz becomes dy, in place; 0 where there is no example."""
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
    """Mean of each map over the chunk, and the sum of squares about it.

    In two passes: the second centres by the rounded mean, and corrects for its rounding (Chan,
    Golub and LeVeque 1983). Rows are summed up first, then their sums: fewer roundings.
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
        one = stage.found + FOUND * o
        net.found[one + MEANS, slot] = mean + correction
        net.found[one + SQUARES, slot] = total(q * mask) - count * correction * correction


# Between two launches: from what the chunks found to what the next launch needs.


@njit(**OPTIONS)
def merge(net: Any, k: int, examples: int, training: bool) -> None:
    """Set what normalizes y of a stage, and move batch norm's averages.

    The chunks' means and squares are merged as by T. Chan, G. Golub and R. LeVeque, "Updating
    Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979, (2.1).
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
                one = stage.found + FOUND * o
                means, squares = found[one + MEANS], found[one + SQUARES]
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
    """dγ, dβ and the bias's gradient of a stage, and what its dy is made with."""
    stage, values, found = net.stages[k], net.values, net.found
    lanes = BYTES // values.itemsize
    m = examples * stage.rows * stage.columns
    for o in range(stage.maps):
        one = stage.found + FOUND * o
        dbeta = q = 0.0
        for chunk in range((examples + lanes - 1) // lanes):
            dbeta += found[one + DBETA, chunk]
            q += found[one + DGAMMA, chunk]
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
            dbias = 0.0  # batch norm subtracts a bias: the loss does not depend on it
        if stage.bias >= 0:
            values[stage.bias + stage.gradient + o] = dbias
