"""Define a Numba type for a vector of numbers: one number for each of several examples.

A vector has 64 bytes, the size of a cache line: the numbers of 16 examples in float32, or of 8
examples in float64. The kernels read and write the activations of a batch vector by vector. In the
code of a kernel, a vector looks like one number: ``y = fma(w, x, y)`` multiplies and adds for all
examples of the vector at once. In the processor, a vector takes two registers of AVX2, one register
of AVX-512 or four registers of NEON.

LLVM would also make vectors by itself from loops over scalars. But LLVM would not keep several rows
of results in registers while a loop goes through the terms of a sum. Products are fast only if the
results stay in registers.

An array is a flat row of vectors. The index of `load` and `store` counts in vectors.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

BYTES = 64
"""The size of a vector in bytes."""


class Vector(types.Type):
    """The Numba type of a vector of numbers of ``dtype``."""

    def __init__(self, dtype: types.Float) -> None:
        self.dtype = dtype
        self.lanes = 8 * BYTES // dtype.bitwidth
        super().__init__(name=f"Vector({dtype})")


@register_model(Vector)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        number = manager.lookup(vector.dtype).get_value_type()
        super().__init__(manager, vector, ir.VectorType(number, vector.lanes))


# These functions read vectors and numbers from arrays, and write vectors and numbers to arrays.


@intrinsic
def load(typing_context: Any, array: Any, index: Any) -> Any:
    """Return the vector with the given index, counted in vectors."""
    vector = Vector(array.dtype)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = _place(context, builder, signature.args[0], vector, *values)
        return builder.load(place, align=BYTES)

    return vector(array, types.intp), generate


@intrinsic
def store(typing_context: Any, array: Any, index: Any, vector: Any) -> Any:
    """Write a vector to the given index, counted in vectors."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = _place(context, builder, signature.args[0], vector, *values[:2])
        builder.store(values[2], place, align=BYTES)
        return context.get_dummy_value()

    return types.none(array, types.intp, vector), generate


@intrinsic
def at(typing_context: Any, array: Any, index: Any) -> Any:
    """Return ``array[index]`` for an index that must not be negative.

    This is faster than Numba's own ``array[index]``, which tests whether the index is negative.
    """

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, values[0]).data
        return builder.load(builder.gep(data, [values[1]]))

    return array.dtype(array, types.intp), generate


@intrinsic
def put(typing_context: Any, array: Any, index: Any, value: Any) -> Any:
    """Do ``array[index] = value`` for an index that must not be negative."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, values[0]).data
        number = context.cast(builder, values[2], value, array.dtype)
        builder.store(number, builder.gep(data, [values[1]]))
        return context.get_dummy_value()

    return types.none(array, types.intp, value), generate


@intrinsic
def full(typing_context: Any, array: Any, value: Any) -> Any:
    """Return a vector of the dtype of ``array`` with ``value`` in every lane."""
    vector = Vector(array.dtype)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return _as_vector(context, builder, vector, value, values[1])

    return vector(array, value), generate


@intrinsic
def total(typing_context: Any, vector: Any) -> Any:
    """Return the sum of the numbers of a vector.

    The lower half of the vector is added to the upper half; then the result is halved and added in
    the same way, until one number is left.
    """

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        (value,) = values
        lanes = vector.lanes
        while lanes > 1:
            lanes //= 2
            low, high = (_lanes(builder, value, range(i, i + lanes)) for i in (0, lanes))
            value = builder.fadd(low, high)
        return builder.extract_element(value, _INDEX(0))

    return vector.dtype(vector), generate


# These functions compute with vectors, lane by lane. An operand may also be a number, which then
# stands for a vector with that number in every lane.


@intrinsic
def fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a · b + c, rounded only once if the processor has an instruction for that."""
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
    """Return x where a > b, and y elsewhere. The result is y where a or b is NaN."""
    return _choice(">", a, b, x, y)


@intrinsic
def where_equal(typing_context: Any, a: Any, b: Any, x: Any, y: Any) -> Any:
    """Return x where a = b, and y elsewhere."""
    return _choice("==", a, b, x, y)


@intrinsic
def power_of_two(typing_context: Any, shifted: Any) -> Any:
    """Return 2^k, where ``shifted`` is k + 1.5 · 2^23 in float32 and k + 1.5 · 2^52 in float64.

    The last bits of ``shifted`` are the integer k.
    """
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
    """Return the first vector type among the given types, or None if there is none."""
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


# The functions below generate code in LLVM's language for the functions above.

_INDEX = ir.IntType(32)


def _place(context: Any, builder: Any, array_type: Any, vector: Any, array: Any, index: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    vectors = builder.bitcast(data, context.get_value_type(vector).as_pointer())
    return builder.gep(vectors, [index])


def _lanes(builder: Any, value: Any, lanes: Any) -> Any:
    mask = ir.Constant(ir.VectorType(_INDEX, len(lanes)), list(lanes))
    return builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), mask)


def _as_vector(context: Any, builder: Any, vector: Vector, type_: Any, value: Any) -> Any:
    """Return a vector unchanged; for a number, return a vector with that number in every lane."""
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
