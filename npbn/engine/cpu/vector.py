"""A vector of numbers, one for each of several examples, as a type of Numba's.

The kernels go through the arrays of a batch by vectors: 64 bytes, a cache line, of 16 examples in
float32 or 8 in float64. To a kernel a vector is one number: ``y = fma(w, x, y)`` multiplies and
adds in all examples at once, in the registers that the processor has (two of AVX2's, one of
AVX-512's, four of NEON's).

LLVM would find vectors by itself in loops over scalars, but not keep several rows of results in
registers while it goes through what is summed up, which is what makes a product fast.

An array is a flat row of vectors: `load` and `store` count in vectors.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

BYTES = 64
"""The size of a vector."""


class Vector(types.Type):
    """Numba's type of a vector of ``dtype``."""

    def __init__(self, dtype: types.Float) -> None:
        self.dtype = dtype
        self.lanes = 8 * BYTES // dtype.bitwidth
        super().__init__(name=f"Vector({dtype})")


@register_model(Vector)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        number = manager.lookup(vector.dtype).get_value_type()
        super().__init__(manager, vector, ir.VectorType(number, vector.lanes))


# Between arrays and vectors.


@intrinsic
def load(typing_context: Any, array: Any, index: Any) -> Any:
    """The vector of that index."""
    vector = Vector(array.dtype)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = _place(context, builder, signature.args[0], vector, *values)
        return builder.load(place, align=BYTES)

    return vector(array, types.intp), generate


@intrinsic
def store(typing_context: Any, array: Any, index: Any, vector: Any) -> Any:
    """Write the vector of that index."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = _place(context, builder, signature.args[0], vector, *values[:2])
        builder.store(values[2], place, align=BYTES)
        return context.get_dummy_value()

    return types.none(array, types.intp, vector), generate


@intrinsic
def at(typing_context: Any, array: Any, index: Any) -> Any:
    """``array[index]`` of an index that is not negative: there is nothing to be found out."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, values[0]).data
        return builder.load(builder.gep(data, [values[1]]))

    return array.dtype(array, types.intp), generate


@intrinsic
def put(typing_context: Any, array: Any, index: Any, value: Any) -> Any:
    """``array[index] = value`` of an index that is not negative."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, values[0]).data
        number = context.cast(builder, values[2], value, array.dtype)
        builder.store(number, builder.gep(data, [values[1]]))
        return context.get_dummy_value()

    return types.none(array, types.intp, value), generate


@intrinsic
def full(typing_context: Any, array: Any, value: Any) -> Any:
    """A vector of ``array``'s dtype with ``value`` everywhere."""
    vector = Vector(array.dtype)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return _as_vector(context, builder, vector, value, values[1])

    return vector(array, value), generate


@intrinsic
def total(typing_context: Any, vector: Any) -> Any:
    """The sum over all examples: of halves, then of quarters, and on."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        (value,) = values
        lanes = vector.lanes
        while lanes > 1:
            lanes //= 2
            low, high = (_lanes(builder, value, range(i, i + lanes)) for i in (0, lanes))
            value = builder.fadd(low, high)
        return builder.extract_element(value, _INDEX(0))

    return vector.dtype(vector), generate


# Arithmetic, in every example; with vectors, or with numbers that are the same in all.


@intrinsic
def fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c, rounded once where the processor can."""
    vector = _vector(a, b, c)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        operands = _as_vectors(context, builder, vector, signature.args, values)
        type_ = context.get_value_type(vector)
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(type_, [type_] * 3),
            f"llvm.fmuladd.v{vector.lanes}f{vector.dtype.bitwidth}",
        )
        return builder.call(function, operands)

    return vector(a, b, c), generate


@intrinsic
def where_greater(typing_context: Any, a: Any, b: Any, x: Any, y: Any) -> Any:
    """x where a > b, otherwise y; so y, where a or b is NaN."""
    return _choice(">", a, b, x, y)


@intrinsic
def where_equal(typing_context: Any, a: Any, b: Any, x: Any, y: Any) -> Any:
    """x where a = b, otherwise y."""
    return _choice("==", a, b, x, y)


@intrinsic
def power_of_two(typing_context: Any, shifted: Any) -> Any:
    """2^k, where ``shifted`` is k + 1.5 · 2^23 (in float64: 2^52), so that k is its last bits."""
    bits, mantissa = shifted.dtype.bitwidth, {32: 23, 64: 52}[shifted.dtype.bitwidth]

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        integers = ir.VectorType(ir.IntType(bits), shifted.lanes)
        shift = ir.Constant(integers, [mantissa] * shifted.lanes)
        bias = (1 << (bits - mantissa - 2)) - 1  # the exponent of 1
        one = ir.Constant(integers, [bias << mantissa] * shifted.lanes)
        exponent = builder.shl(builder.bitcast(values[0], integers), shift)
        return builder.bitcast(builder.add(exponent, one), values[0].type)

    return shifted(shifted), generate


def _vector(*operands: Any) -> Any:
    """Return the type of the vectors among these types; None if there are none."""
    return next((type_ for type_ in operands if isinstance(type_, Vector)), None)


def _arithmetic(operation: Any, instruction: str) -> None:
    @type_callable(operation)
    def types_of(context: Any) -> Any:
        def typed(a: Any, b: Any) -> Any:
            return _vector(a, b)

        return typed

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        operands = _as_vectors(context, builder, signature.return_type, signature.args, values)
        return getattr(builder, instruction)(*operands)

    for operands in ((Vector, Vector), (Vector, types.Number), (types.Number, Vector)):
        lower_builtin(operation, *operands)(generate)


for _operation, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _arithmetic(_operation, _instruction)


# The code that is generated for these functions, in LLVM's language.

_INDEX = ir.IntType(32)


def _place(context: Any, builder: Any, array_type: Any, vector: Any, array: Any, index: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    vectors = builder.bitcast(data, context.get_value_type(vector).as_pointer())
    return builder.gep(vectors, [index])


def _lanes(builder: Any, value: Any, lanes: Any) -> Any:
    mask = ir.Constant(ir.VectorType(_INDEX, len(lanes)), list(lanes))
    return builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), mask)


def _as_vector(context: Any, builder: Any, vector: Vector, type_: Any, value: Any) -> Any:
    """A vector as it is; a number in every lane of one."""
    if isinstance(type_, Vector):
        return value
    number = context.cast(builder, value, type_, vector.dtype)
    nothing = ir.Constant(context.get_value_type(vector), ir.Undefined)
    return _lanes(builder, builder.insert_element(nothing, number, _INDEX(0)), [0] * vector.lanes)


def _as_vectors(context: Any, builder: Any, vector: Any, types_: Any, values: Any) -> list[Any]:
    pairs = zip(types_, values, strict=True)
    return [_as_vector(context, builder, vector, type_, value) for type_, value in pairs]


def _choice(comparison: str, a: Any, b: Any, x: Any, y: Any) -> Any:
    vector = _vector(a, b, x, y)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        a, b, x, y = _as_vectors(context, builder, vector, signature.args, values)
        return builder.select(builder.fcmp_ordered(comparison, a, b), x, y)

    return vector(a, b, x, y), generate
