r"""Compute a convolution or linear layer, and its two gradients, on one chunk of examples.

The same formula holds for convolutions and linear layers. Each output depends on ``taps`` numbers
of the input, which the index r counts. For a convolution, r counts the triples (c, i, j) of a
channel and a position in the kernel; for a linear layer, r counts all features. Let W be a matrix
of shape (maps, taps), and let x(r, s) be the input number that weight r is multiplied by for the
output at the site s = (p, q). Then

$$y_{o s} = \sum_r W_{o r} x(r, s)$$

$$dx(r, s) \mathrel{+}= \sum_o W_{o r} dy_{o s} \qquad dW_{o r} = \sum_s dy_{o s} x(r, s)$$

`npbn.functional.conv2d` and `npbn.functional.linear` derive these formulas.

In memory, the zeros of the padding lie around x. So for every kernel, stride and padding, the place
of x(r, s) is the sum of a number that depends only on r and a number that depends only on s. Two
tables hold these numbers, and the functions need nothing else to know about a layer's geometry.

Each function keeps six results in registers while it loops over the terms of the sums. Six vectors
take 12 of the 16 registers of AVX2, and the factors fit into the other registers. Two
multiplications can begin in every cycle, and each takes four cycles: with fewer than eight
registers for results, the multiplications would wait for each other. With AVX-512, a vector is one
register, so the six results take six registers, and the multiplications do wait.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from npbn.engine.cpu.vector import at, fma, full, load, put, store, total

SIX = 6
"""The number of results in registers.

The maps and the taps are padded to a multiple of six, with weights of 0.
"""

TAPS_AT_A_TIME = 30
"""The number of taps in a block of `affine_backward_weight`.

The part of x that a block reads stays in the cache while the function goes through all maps.
"""

OPTIONS: dict[str, Any] = {
    "error_model": "numpy",
    "nogil": True,
    "no_cpython_wrapper": True,  # Python does not call functions with these options.
    "no_cfunc_wrapper": True,
}
INLINE = OPTIONS | {"forceinline": True}


@njit(**OPTIONS)
def affine(net: Any, k: int, slot: int) -> None:
    """Compute y = W x at every site, without the bias, which is added where y is read.

    The weights are read in the order of ``packed``, in which `pack` has written the weights: for
    each tap, the weights of six maps lie next to each other.
    """
    stage, values, tables = net.stages[k], net.values, net.tables
    count, first_tap, plane = stage.taps, stage.first_tap, stage.y_plane
    for s in range(stage.rows * stage.columns):
        site = stage.x + slot * stage.x_size + at(tables, stage.first_site + 2 * s)
        for o in range(0, stage.maps, SIX):
            y0 = y1 = y2 = y3 = y4 = y5 = full(values, 0.0)
            w = stage.packed + o * count
            for r in range(count):
                seen = load(values, site + at(tables, first_tap + r))
                y0 = fma(at(values, w), seen, y0)
                y1 = fma(at(values, w + 1), seen, y1)
                y2 = fma(at(values, w + 2), seen, y2)
                y3 = fma(at(values, w + 3), seen, y3)
                y4 = fma(at(values, w + 4), seen, y4)
                y5 = fma(at(values, w + 5), seen, y5)
                w += SIX
            to = stage.y + slot * stage.y_size + o * plane + s
            store(values, to, y0)
            store(values, to + plane, y1)
            store(values, to + 2 * plane, y2)
            store(values, to + 3 * plane, y3)
            store(values, to + 4 * plane, y4)
            store(values, to + 5 * plane, y5)


@njit(**OPTIONS)
def affine_backward_x(net: Any, k: int, slot: int, scratch: int) -> None:
    """Compute dx = Wᵀ dy, summed over the sites, and store dx in the vectors from ``scratch`` on.

    The weights are read in the order of ``transposed``, in which `pack` has written the weights:
    for each map, the weights of six taps lie next to each other. If the last group of six taps is
    not full, the group repeats its first tap, with weights of 0. For that reason the first tap of a
    group is stored last.
    """
    stage, values, tables = net.stages[k], net.values, net.tables
    count, maps, plane = stage.taps, stage.maps, stage.y_plane
    zero = full(values, 0.0)
    for i in range(stage.x_size):
        store(values, scratch + i, zero)
    for s in range(stage.rows * stage.columns):
        site = scratch + at(tables, stage.first_site + 2 * s)
        first = stage.z + slot * stage.y_size + s
        for r in range(0, count, SIX):
            tap = stage.first_tap + r
            to0, to1 = site + at(tables, tap), site + at(tables, tap + 1)
            to2, to3 = site + at(tables, tap + 2), site + at(tables, tap + 3)
            to4, to5 = site + at(tables, tap + 4), site + at(tables, tap + 5)
            dx0, dx1, dx2 = load(values, to0), load(values, to1), load(values, to2)
            dx3, dx4, dx5 = load(values, to3), load(values, to4), load(values, to5)
            w = stage.transposed + r * maps
            place = first
            for _ in range(maps):
                dy = load(values, place)
                dx0 = fma(at(values, w), dy, dx0)
                dx1 = fma(at(values, w + 1), dy, dx1)
                dx2 = fma(at(values, w + 2), dy, dx2)
                dx3 = fma(at(values, w + 3), dy, dx3)
                dx4 = fma(at(values, w + 4), dy, dx4)
                dx5 = fma(at(values, w + 5), dy, dx5)
                w += SIX
                place += plane
            store(values, to5, dx5)
            store(values, to4, dx4)
            store(values, to3, dx3)
            store(values, to2, dx2)
            store(values, to1, dx1)
            store(values, to0, dx0)


@njit(**OPTIONS)
def affine_backward_weight(
    net: Any, k: int, first_map: int, last_map: int, chunk: int, out: int
) -> None:
    """Compute dW of some maps, and add the result to the dW that is stored from ``out`` on.

    For a convolution, the sum goes over the sites of the chunk with the index ``chunk``. A linear
    layer has only one site in a chunk. So for a linear layer the sum goes over all chunks, and
    ``chunk`` is the number of chunks.

    The inner loop computes two maps and three taps at a time: five loads serve six results.

    Args:
        net: the arrays of the model.
        k: the index of the stage.
        first_map, last_map: the range of the maps; ``last_map`` is excluded.
        chunk: the index of the chunk for a convolution, the number of chunks for a linear layer.
        out: the place of the stored dW, that is, of its row for map 0.
    """
    stage, values, tables = net.stages[k], net.values, net.tables
    plane, width, first_site = stage.y_plane, stage.padded_taps, stage.first_site
    x = stage.x if stage.linear else stage.x + chunk * stage.x_size
    dy = stage.z if stage.linear else stage.z + chunk * stage.y_size
    sites = chunk if stage.linear else stage.rows * stage.columns
    for block in range(0, stage.taps, TAPS_AT_A_TIME):
        for o in range(first_map, last_map, 2):
            for r in range(block, min(block + TAPS_AT_A_TIME, stage.taps), 3):
                tap = stage.first_tap + r
                x0, x1 = x + at(tables, tap), x + at(tables, tap + 1)
                x2 = x + at(tables, tap + 2)
                a0 = a1 = a2 = b0 = b1 = b2 = full(values, 0.0)
                for s in range(first_site, first_site + 2 * sites, 2):
                    site, place = at(tables, s), dy + o * plane + at(tables, s + 1)
                    a, b = load(values, place), load(values, place + plane)
                    seen = load(values, x0 + site)
                    a0 = fma(a, seen, a0)
                    b0 = fma(b, seen, b0)
                    seen = load(values, x1 + site)
                    a1 = fma(a, seen, a1)
                    b1 = fma(b, seen, b1)
                    seen = load(values, x2 + site)
                    a2 = fma(a, seen, a2)
                    b2 = fma(b, seen, b2)
                to = out + o * width + r
                put(values, to, at(values, to) + total(a0))
                put(values, to + 1, at(values, to + 1) + total(a1))
                put(values, to + 2, at(values, to + 2) + total(a2))
                to += width
                put(values, to, at(values, to) + total(b0))
                put(values, to + 1, at(values, to + 1) + total(b1))
                put(values, to + 2, at(values, to + 2) + total(b2))


@njit(**OPTIONS)
def pack(net: Any, k: int, first: int) -> None:
    """Copy the weights of six maps, from ``first`` on, into the orders that the kernels read.

    `affine` reads ``packed``, and `affine_backward_x` reads ``transposed``.
    """
    stage, values = net.stages[k], net.values
    maps, taps, zero = stage.maps, stage.taps, values.dtype.type(0)
    for o in range(first, first + SIX):
        weight = stage.weight + o * taps
        to = stage.packed + first * taps + o - first
        if o >= maps:
            for r in range(taps):
                put(values, to + r * SIX, zero)
            continue
        for r in range(taps):
            put(values, to + r * SIX, at(values, weight + r))
        for r in range(0, stage.padded_taps, SIX):
            to = stage.transposed + r * maps + o * SIX
            for i in range(SIX):
                put(values, to + i, at(values, weight + r + i) if r + i < taps else zero)
