"""Mistakes that a kernel could have: each must be seen.

A mutant is a function, a text that occurs once in it, and what takes its place. `fixed_models` run
by it in plain Python (`python_kernels`) must differ from the layers, or use memory that is not
theirs; those of `IN_FLOAT32` are mistakes of rounding, which `large_mean` must see, those of
`EXPONENTIAL` such that its error in units must show.

Survivors, and why nothing can see them:

- `pack`: 0 for maps beyond the last (or no weights at all): nobody reads their y.
- `pack`: weights other than 0 for the taps that repeat a last six's first: what they give is
  overwritten, because the first tap's is stored last.
- `run`: another mask in `cross_entropy` of PREDICT (no gradient is read then), `statistics` of a
  frozen batch norm (nobody reads them), `normalize_backward` without batch norm (there it changes
  nothing), parts always in the same direction (that is for the cache).
- `gather`: another finite number for an example that is not there: masks keep it out.
- `statistics`: no mask in the first pass, whose mean needs to be near only: the second corrects it.
- `update`: ``stage.bias > 0``: the first parameter is never a bias.
"""

from __future__ import annotations

import re

import exponential_accuracy
import fixed_models
import large_mean
import numpy as np
import pytest
import python_kernels

Mutant = tuple[str, str, str]

PRODUCTS: list[Mutant] = [
    ("affine", "range(stage.rows * stage.columns)", "range(stage.rows * stage.columns - 1)"),
    ("affine", "stage.first_site + 2 * s)", "stage.first_site + 2 * s + 1)"),
    ("affine", "slot * stage.x_size", "0"),
    ("affine", "range(0, stage.maps, SIX)", "range(0, SIX, SIX)"),
    ("affine", "stage.packed + o * count", "stage.packed"),
    ("affine", "range(count)", "range(count - 1)"),
    ("affine", "range(count)", "range(1, count)"),
    ("affine", "first_tap + r", "first_tap"),
    ("affine", "y5 = fma(at(values, w + 5)", "y5 = fma(at(values, w + 4)"),
    ("affine", "seen, y3)", "seen, 0 * y3)"),
    ("affine", "w += SIX", "w += SIX - 1"),
    ("affine", "o * plane + s", "o * plane"),
    ("affine", "+ o * plane", "+ plane"),
    ("affine", "to + 2 * plane, y2", "to + 2 * plane, y1"),
    ("affine_backward_x", "store(values, scratch + i, zero)", "pass"),
    ("affine_backward_x", "range(stage.x_size)", "range(stage.x_size - 1)"),
    ("affine_backward_x", "range(stage.rows * stage.columns)", "range(1, stage.rows)"),
    ("affine_backward_x", "stage.z +", "stage.y +"),
    ("affine_backward_x", "range(0, count, SIX)", "range(0, count - SIX, SIX)"),
    ("affine_backward_x", "range(maps)", "range(maps - 1)"),
    ("affine_backward_x", "stage.transposed + r * maps", "stage.transposed + r"),
    ("affine_backward_x", "stage.transposed", "stage.packed"),
    ("affine_backward_x", "dy, dx2)", "dy, 0 * dx2)"),
    ("affine_backward_x", "w + 4), dy", "w + 5), dy"),
    ("affine_backward_x", "place += plane", "place += plane - 1"),
    ("affine_backward_x", "at(tables, tap + 3)", "at(tables, tap + 2)"),
    ("affine_backward_x", "store(values, to0, dx0)", "store(values, to5, dx5)"),
    ("affine_backward_weight", "stage.x + chunk * stage.x_size", "stage.x"),
    ("affine_backward_weight", "stage.z + chunk * stage.y_size", "stage.y + chunk * stage.y_size"),
    ("affine_backward_weight", "dy = stage.z if", "dy = stage.y if"),
    ("affine_backward_weight", "chunk if stage.linear", "chunk - 1 if stage.linear"),
    ("affine_backward_weight", "stage.rows * stage.columns", "stage.rows"),
    ("affine_backward_weight", "range(0, stage.taps, TAPS_AT", "range(0, TAPS_AT_A_TIME, TAPS_AT"),
    ("affine_backward_weight", "min(block + TAPS_AT_A_TIME, stage.taps)", "stage.taps"),
    ("affine_backward_weight", "min(block + TAPS_AT_A_TIME, stage.taps)", "block + TAPS_AT_A_TIME"),
    (
        "affine_backward_weight",
        "range(first_map, last_map, 2)",
        "range(first_map, last_map - 1, 2)",
    ),
    ("affine_backward_weight", "range(first_map, last_map, 2)", "range(0, last_map, 2)"),
    ("affine_backward_weight", "x + at(tables, tap + 2)", "x + at(tables, tap + 1)"),
    ("affine_backward_weight", "dy + o * plane", "dy"),
    ("affine_backward_weight", "tables, s + 1)", "tables, s)"),
    ("affine_backward_weight", "seen, a1)", "seen, 0 * a1)"),
    ("affine_backward_weight", "b1 = fma(b,", "b1 = fma(a,"),
    ("affine_backward_weight", "load(values, place + plane)", "load(values, place)"),
    ("affine_backward_weight", "at(values, to + 1) + total(a1)", "total(a1)"),
    ("affine_backward_weight", "+ total(b2)", "- total(b2)"),
    ("affine_backward_weight", "to += width", "pass"),
    ("pack", "stage.weight + o * taps", "stage.weight + first * taps"),
    ("pack", "first * taps + o - first", "first * taps"),
    ("pack", "o >= maps", "o > maps"),
    ("pack", "r * maps + o * SIX", "r * maps + o"),
    ("pack", "at(values, weight + r))", "at(values, weight))"),
]

NORMALIZATION: list[Mutant] = [
    ("_exponential", "p = fma(r, p, D5)", "p = fma(r, p, D6)"),
    ("_exponential", "k = shifted - MAGIC64", "k = shifted - MAGIC64 + 1"),
    ("constant", "which * stage.maps + o", "which + CONSTANTS * o"),
    ("activate", "constant(net, k, MEAN, o)", "constant(net, k, REST, o)"),
    ("activate", "constant(net, k, SCALE, o)", "constant(net, k, INVERSE, o)"),
    ("activate", "constant(net, k, SHIFT, o)", "0.0"),
    ("activate", "exponential(0 - z)", "exponential(z)"),
    ("activate", "where_greater(0, z, 0, z)", "where_greater(0, z, z, 0)"),
    ("activate", "stage.rows // height", "stage.rows // height - 1"),
    ("activate", "count = height * columns", "count = columns"),
    ("activate", "h * following.x_row", "h * (columns // stage.window_w)"),
    ("activate", "o * following.x_plane + following.inside", "o * following.x_plane"),
    ("pool_row", "range(columns // width)", "range(columns // width - 1)"),
    (
        "pool_row",
        "where_greater(one, pooled, one, pooled)",
        "where_greater(one, pooled, pooled, one)",
    ),
    ("pool_row", "where_equal(one, one, larger, one)", "larger"),
    ("pool_row", "one = load(values, a + i * columns", "one = load(values, a + i * width"),
    ("pool_row", "pooled + load(values, a + i * columns", "pooled + load(values, a + i * width"),
    ("pool_row", "pooled = pooled * share", "pass"),
    ("pool_row", "pooled = pooled + load", "pooled = load"),
    ("pool_row", "store(values, x + w, pooled)", "store(values, x, pooled)"),
    ("unpool_row", "range(columns // width)", "range(1)"),
    ("unpool_row", "largest = load(values, x + w)", "largest = load(values, x)"),
    ("unpool_row", "g = load(values, dx + w)", "g = load(values, dx)"),
    ("unpool_row", "where_equal(one, largest, g, 0)", "g"),
    ("unpool_row", "g = where_equal(one, largest, 0, g)", "pass"),  # to all maxima
    # To the last maximum.
    (
        "unpool_row",
        "place = i * columns + w * width + j",
        "place = (height - 1 - i) * columns + w * width + width - 1 - j",
    ),
    ("unpool_row", "g = g * share", "pass"),
    ("activate_backward", "da = scratch + following.x_size", "da = scratch"),
    ("activate_backward", "scratch + pooled + row", "scratch + pooled"),
    ("activate_backward", "x + row,", "x,"),
    ("activate_backward", "following.x_plane + following.inside", "following.x_plane"),
    ("activate_backward", "slot * following.x_size", "0"),
    ("activate_backward", "mean = constant(net, k, MEAN, o)", "mean = constant(net, k, REST, o)"),
    ("activate_backward", "one * (1 - one)", "one * (1 + one)"),
    ("activate_backward", "one * (1 - one)", "(1 - one)"),
    ("activate_backward", "where_greater(load(values, a + i)", "where_greater(load(values, y + i)"),
    ("activate_backward", "store(values, a + i, dz)", "pass"),
    ("activate_backward", "row_dbeta = row_dbeta + dz", "row_dbeta = dz"),
    (
        "activate_backward",
        "fma(dz, load(values, y + i) - mean, row_dgamma)",
        "dz * (load(values, y + i) - mean)",
    ),
    ("activate_backward", "load(values, y + i) - mean", "load(values, y + i)"),
    ("activate_backward", "dbeta = dbeta + row_dbeta", "dbeta = row_dbeta"),
    ("activate_backward", "dgamma = dgamma + row_dgamma", "dgamma = row_dgamma"),
    ("activate_backward", "total(dbeta)", "total(dgamma)"),
    ("activate_backward", "DGAMMA * stage.maps + o", "DGAMMA * stage.maps"),
    ("normalize_backward", "constant(net, k, SCALE, o)", "constant(net, k, INVERSE, o)"),
    ("normalize_backward", "-constant(net, k, SLOPE, o)", "constant(net, k, SLOPE, o)"),
    ("normalize_backward", "slope, offset)", "slope, 0)"),
    ("normalize_backward", "load(values, place + to_y) - mean", "load(values, place + to_y)"),
    ("normalize_backward", "load(values, place + to_y)", "load(values, place)"),
    ("normalize_backward", "* mask", "* 1"),
    ("normalize_backward", "plane + stage.rows * stage.columns", "plane + stage.columns"),
    ("statistics", "examples * stage.rows * columns", "examples * columns"),
    ("statistics", "examples * stage.rows", "len(mask) * stage.rows"),
    ("statistics", "total(q * mask)", "total(q)"),
    ("statistics", "q = q + row_q", "q = row_q"),
    ("statistics", "fma(centred, centred, row_q)", "fma(centred, mean, row_q)"),
    ("statistics", "mean + correction", "correction"),
    ("statistics", "plane + stage.rows * columns", "plane + columns"),
    ("merge", "-bias, 1.0, 1.0, 0.0", "bias, 1.0, 1.0, 0.0"),
    ("merge", "-bias, 1.0, 1.0, 0.0", "-bias, 1.0, 1.0, bias"),
    ("merge", "training and stage.norm == BATCH_NORM", "stage.norm == BATCH_NORM"),
    ("merge", "training and stage.norm == BATCH_NORM", "training"),
    ("merge", "min(lanes, examples - m * lanes) * (means", "lanes * (means"),
    ("merge", "min(lanes, examples - m * lanes) * (means", "sites * (means"),
    ("merge", "s += min", "s = min"),
    ("merge", "means[0] + s", "means[0] - s"),
    ("merge", "s / examples", "s / chunks"),
    ("merge", "sites * min(lanes, examples - m * lanes)", "min(lanes, examples - m * lanes)"),
    ("merge", "sites * min(lanes, examples - m * lanes)", "sites * lanes"),
    ("merge", "squares[m] + count * (means[m] - mean) ** 2", "squares[m]"),
    ("merge", "squares[m] + count", "squares[0] + count"),
    ("merge", "(means[m] - mean) ** 2", "(means[m] - means[0]) ** 2"),
    ("merge", "q / (sites * examples)", "q / (sites * examples - 1)"),
    ("merge", "keep = stage.momentum", "keep = 1 - stage.momentum"),
    ("merge", "(mean + bias)", "mean"),
    ("merge", "(1 - keep) * var", "(1 - keep) * q"),
    ("merge", "keep * values[moving] +", "keep +"),
    (
        "merge",
        "values[moving + stage.maps] = keep * values[moving + stage.maps]",
        "values[moving + stage.maps] = keep * values[moving]",
    ),
    ("merge", "mean, var = values[moving] - bias", "mean, var = values[moving]"),
    ("merge", "var + stage.eps", "var"),
    ("merge", "math.sqrt(var + stage.eps)", "(math.sqrt(var) + stage.eps)"),
    ("merge", "scale = values[stage.gamma + o] * inverse", "scale = inverse"),
    ("merge", "values[stage.beta + o]", "values[stage.gamma + o]"),
    (
        "merge",
        "values[to + INVERSE * stage.maps] = inverse",
        "values[to + INVERSE * stage.maps] = scale",
    ),
    ("merge", "values[to + SLOPE * stage.maps] = 0", "pass"),
    ("merge", "values[to + OFFSET * stage.maps] = 0", "pass"),
    ("merge_backward", "examples * stage.rows * stage.columns", "stage.rows * stage.columns"),
    ("merge_backward", "examples * stage.rows * stage.columns", "examples"),
    ("merge_backward", "examples + lanes - 1", "examples"),
    ("merge_backward", "dbeta += found", "dbeta = found"),
    ("merge_backward", "stage.found + DGAMMA", "stage.found + DBETA"),
    ("merge_backward", "constant(net, k, INVERSE, o)", "constant(net, k, SCALE, o)"),
    ("merge_backward", "(q - rest * dbeta) * inverse", "q - rest * dbeta"),
    ("merge_backward", "dbias = scale * dbeta", "dbias = dbeta"),
    ("merge_backward", "stage.gradient + o] = dgamma", "stage.gradient + o] = dbeta"),
    ("merge_backward", "stage.gradient + o] = dbeta", "o] = dbeta"),
    ("merge_backward", "stage.norm == BATCH_NORM", "stage.norm != NO_NORM"),
    ("merge_backward", "scale * dgamma * inverse / m", "scale * dgamma / m"),
    ("merge_backward", "inverse / m", "inverse"),
    ("merge_backward", "- scale * dbeta / m", "+ scale * dbeta / m"),
    ("merge_backward", "- scale * dbeta / m", "- dbeta / m"),
    ("merge_backward", "dbias = 0.0", "pass"),
    ("merge_backward", "stage.gradient + o] = dbias", "stage.gradient + o] = 0"),
]

LAUNCHES: list[Mutant] = [
    ("training_program", "reversed(range(stages))", "range(stages)"),
    ("training_program", "(PACK, 0), ", ""),
    ("prepare", "merge(net, k - 1, batch, kernel != PREDICT)", "merge(net, k - 1, batch, False)"),
    ("prepare", "merge(net, stage, batch, kernel != PREDICT)", "merge(net, stage, batch, True)"),
    ("prepare", "kernel in (FORWARD, LOSS)", "kernel == FORWARD"),
    ("prepare", "len(net.stages) - 1", "len(net.stages) - 2"),
    ("prepare", "merge_backward(net, k, batch)", "pass"),
    ("prepare", "set_masks(net, batch)", "pass"),
    ("run", "(batch + lanes - 1) // lanes", "batch // lanes"),
    (
        "run",
        "task in range(begin + thread, end, threads)",
        "task in range(begin, end, threads)",
    ),
    (
        "run",
        "task in range(begin + thread, end, threads)",
        "task in range(begin + thread, end - 1, threads)",
    ),
    ("run", "thread * stages[0].dx_size", "0"),
    ("run", "m in range(begin + thread, end, threads)", "m in range(begin, end, threads)"),
    ("run", "range(last + 1)", "range(last)"),
    ("run", "gather(net, thread, images, order, m * lanes", "gather(net, thread, images, order, 0"),
    ("run", "part = begin + thread + threads *", "part = begin + thread +"),
    ("run", "- thread + threads - 1) // threads", "- thread) // threads"),
    ("run", "clear_part(net, k, part)", "pass"),
    ("run", "part * size + size", "part * size + 1"),
    ("run", "np.int64(examples < lanes)", "0"),
    ("run", "activate(net, k - 1, m)", "pass"),
    ("run", "stages[k].norm == BATCH_NORM", "stages[k].norm == NO_NORM"),
    ("run", "m * lanes, examples, mask, scratch", "m * lanes, examples, whole, scratch"),
    ("run", "activate_backward(net, last, m, scratch)", "pass"),
    ("run", "stages[k].norm != NO_NORM", "stages[k].norm == BATCH_NORM"),
    ("run", "stages[k].partials + part * stages[k].partials_size", "stages[k].partials"),
    ("run", "stages[k].maps, m, out", "stages[k].maps - 1, m, out"),
    ("run", "affine_backward_x(net, k, m, scratch)", "affine_backward_x(net, k, 0, scratch)"),
    ("run", "k > 0", "k > 1"),
    ("cut", "(chunks + MOST_PARTS - 1) // MOST_PARTS", "max(1, chunks // MOST_PARTS)"),
    ("cut", "(chunks + size - 1) // size", "max(1, chunks // size)"),
    ("gather", "divmod(row, stage.height)", "divmod(row, stage.channels)"),
    ("gather", "h * stage.x_row", "h * width"),
    ("gather", "+ stage.inside", ""),
    ("gather", "at(order, first + lane)", "at(order, lane)"),
    ("gather", "at(order, first + lane)", "(first + lane)"),
    ("gather", "range(examples, lanes)", "range(examples, lanes - 1)"),
    ("cross_entropy", "largest = where_greater(z, largest, z, largest)", "pass"),
    ("cross_entropy", "exponentials = exponentials + e", "exponentials = e"),
    ("cross_entropy", "(exponentials * batch)", "exponentials"),
    ("cross_entropy", "mask / (exponentials", "mask * (exponentials"),
    ("cross_entropy", "1 / batch", "1"),
    ("cross_entropy", "-= 1 / batch", "= 1 / batch"),
    ("cross_entropy", "> values[z + best * lanes]", ">= values[z + best * lanes]"),
    ("cross_entropy", "0 <= label < classes", "0 <= label <= classes"),
    ("cross_entropy", "0 <= label < classes", "label < classes"),
    ("cross_entropy", "loss = math.nan", "pass"),
    ("cross_entropy", "loss += math.log", "loss = math.log"),
    ("cross_entropy", "- np.float64(shifted)", "+ np.float64(shifted)"),
    ("cross_entropy", "labels[order[first + lane]]", "labels[first + lane]"),
    ("cross_entropy", "best == label", "best != label"),
    ("update", "min(first + SIX, stage.maps)", "first + SIX"),
    ("sum_up", "range(begin, begin + SIX * row)", "range(begin, begin + row)"),
    ("sum_up", "affine_backward_weight(net, k, first,", "affine_backward_weight(net, k, 0,"),
    ("sum_up", "parts = 1", "pass"),
    ("sum_up", "range(1, parts)", "range(2, parts)"),
    ("sum_up", "place + part * stage.partials_size", "place + stage.partials_size"),
    ("sum_up", "at(values, place + r) + at(values, other + r)", "at(values, other + r)"),
    ("update", "stage.taps, True)", "stage.taps - 1, True)"),
    (
        "update",
        "stage.bias + first, last - first, False",
        "stage.bias + first, last - first, True",
    ),
    ("update", "stage.bias + first, last", "stage.bias, last"),
    ("update", "stage.norm != NO_NORM", "stage.norm == BATCH_NORM"),
    ("update", "move(net, stage.beta", "move(net, stage.gamma"),
    ("move", "stage.settings + 2] * at(values, w)", "stage.settings + 2] * -at(values, w)"),
    ("move", "v += momentum", "v = momentum"),
    ("move", "momentum > 0", "momentum > 1"),
    ("move", "put(values, w + velocity, v)", "pass"),
    ("move", "at(values, w) - rate * v", "at(values, w) + rate * v"),
    ("move", "range(first, first + count)", "range(first, first + count - 1)"),
    ("set_masks", "lane < batch % lanes", "lane <= batch % lanes"),
    ("set_masks", "first + lanes + lane", "first + lane"),
    ("summed_up", "(batch + lanes - 1) // lanes", "batch // lanes"),
    ("summed_up", "loss +=", "loss ="),
    ("summed_up", "correct +=", "correct ="),
]

IN_FLOAT32: list[Mutant] = [
    ("statistics", "row_s = row_s + load(values, place)", "row_s = load(values, place)"),
    ("statistics", "- count * correction * correction", ""),
    ("statistics", "mean + correction", "mean"),
    (
        "merge",
        "mean = means[0] + s / examples",
        "mean = values.dtype.type(means[0] + s / examples)",
    ),
    ("merge", "- np.float64(values.dtype.type(mean))", "- mean"),
    ("merge", "beta - rest * scale", "beta + rest * scale"),
    ("merge", "values[to + REST * stage.maps] = rest", "values[to + REST * stage.maps] = 0"),
    ("merge_backward", "q - rest * dbeta", "q"),
    ("merge_backward", "slope * rest - scale", "-scale"),
]


EXPONENTIAL: list[Mutant] = [
    *(("_exponential", f"p, F{i})", f"p, F{i + 1})") for i in range(2, 6)),
    *(("_exponential", f"p, D{i})", f"p, D{i + 1})") for i in range(2, 12)),
    ("_exponential", "fma(r, F7, F6)", "fma(r, F7, F7)"),
    ("_exponential", "p = fma(r, F7, F6)", "p = F6"),
    ("_exponential", "fma(r, D13, D12)", "fma(r, D13, D13)"),
    ("_exponential", "p = fma(r, D13, D12)", "p = D12"),
    ("_exponential", "fma(k, -LOW32, fma(k, -HIGH32, x))", "fma(k, -HIGH32, x)"),
    ("_exponential", "fma(k, -LOW64, fma(k, -HIGH64, x))", "fma(k, -HIGH64, x)"),
    ("_exponential", "-LOW64", "LOW64"),
    ("_exponential", "where_greater(x, LIMIT32, LIMIT32, x)", "x"),
    ("_exponential", "where_greater(x, LIMIT64, LIMIT64, x)", "x"),
    ("_exponential", "where_greater(-LIMIT32, x, -LIMIT32, x)", "x"),
    ("_exponential", "where_greater(-LIMIT64, x, -LIMIT64, x)", "x"),
    # NaN becomes the limit.
    ("_exponential", "(x, LIMIT32, LIMIT32, x)", "(LIMIT32, x, x, LIMIT32)"),
    ("_exponential", "(-LIMIT64, x, -LIMIT64, x)", "(x, -LIMIT64, x, -LIMIT64)"),
    ("_exponential", "shifted = fma(x, INVERSE_LN2_32, MAGIC32)", "shifted = x + MAGIC32"),
]


def kernels_with(mutant: Mutant | None) -> python_kernels.Kernels:
    edits = [] if mutant is None else [edit(*mutant)]
    return python_kernels.load((*python_kernels.SMALL_CONSTANTS, *edits))


def edit(function: str, text: str, replacement: str) -> python_kernels.Edit:
    """The function's whole source, and what takes its place."""
    for module in ("products", "normalization", "launches"):
        source = python_kernels.edited(module)
        found = re.search(
            rf"^def {function}\(.*?(?=\n\n\n)|^def {function}\(.*", source, re.M | re.S
        )
        if found:
            before = found[0]
            count = before.count(text)
            assert count == 1, f"{function} has {count} times: {text}"
            return module, before, before.replace(text, replacement)
    raise AssertionError(f"there is no {function}")


def is_caught(mutant: Mutant | None) -> bool:
    kernels = kernels_with(mutant)
    try:
        return any(
            python_kernels.difference(kernels.CpuEngine, model, splits, **options) > 1e-8
            for model, splits, options in (make() for make in reversed(fixed_models.ALL))
        )
    except (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError):
        return True


@pytest.mark.parametrize("mutant", [*PRODUCTS, *NORMALIZATION, *LAUNCHES], ids=" | ".join)
def test_a_mistake_is_seen(mutant):
    assert is_caught(mutant)


@pytest.mark.parametrize("mutant", IN_FLOAT32, ids=" | ".join)
def test_a_mistake_of_rounding_is_seen(mutant):
    assert not is_caught(mutant)  # else it belongs to the others
    try:
        errors = large_mean.errors(kernels_with(mutant).CpuEngine)
    except ValueError:  # the root of a negative variance
        return
    assert max(errors.values()) > 1e3


def error_of_exponential(mutant: Mutant | None) -> float:
    """The larger one of float32's and float64's."""
    exponential = kernels_with(mutant).modules["normalization"].exponential
    with np.errstate(all="ignore"):
        return max(
            exponential_accuracy.error_of_exponential(exponential, dtype)
            for dtype in ("float32", "float64")
        )


@pytest.mark.parametrize("mutant", EXPONENTIAL, ids=" | ".join)
def test_a_mistake_in_the_exponential_is_seen(mutant):
    assert error_of_exponential(mutant) > exponential_accuracy.EXPONENTIAL


def test_without_a_mistake_nothing_is_seen():
    assert not is_caught(None)
    assert max(large_mean.errors(kernels_with(None).CpuEngine).values()) < 10
    assert error_of_exponential(None) <= exponential_accuracy.EXPONENTIAL
