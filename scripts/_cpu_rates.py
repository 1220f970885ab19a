"""Count the operations of a training step, and measure the CPU's peak of operations per second.

The quotient of the two is the floor, the least time that a training step can take. A multiplication
and an addition count as two operations, even if one instruction does both.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from _machine import features
from npbn import backend
from npbn.layers import Conv2d, Linear, Sequential

CHAINS = 12
"""The number of vectors that the kernel works on independently of each other.

A multiply-add instruction takes 4 cycles, and a core starts two instructions in each cycle, so that
8 vectors would be enough. 12 vectors and a constant fit into the 16 registers of AVX2.
"""

PRODUCT = 2048


def training_operations(model: Sequential, image: tuple[int, ...], batch_size: int) -> int:
    """Return the number of operations in the layers' products in one training step.

    A convolution or a linear layer computes up to three products: the output, the gradient of the
    loss with respect to the weights, and the gradient of the loss with respect to the layer's
    input. The first layer does not compute the last of these. Each product takes one multiplication
    and one addition for each pair of a weight and an output position to which the weight
    contributes. Multiplications by the zeros of the padding are counted.
    """
    products = []
    training = model.training
    model.eval()  # In training mode, batch norm cannot normalize one image.
    x: Any = np.zeros((1, *image), np.float32)
    for layer in model.layers:
        x = layer.forward(x)
        if isinstance(layer, Conv2d | Linear):
            weight = layer.weight.data
            products.append(int(weight.size) // int(weight.shape[0]) * int(x.size))
    if training:
        model.train()
    first, *others = products
    return 2 * batch_size * (2 * first + 3 * sum(others))


def multiply_add_kernel() -> Callable[[int], float]:
    """Return a compiled function that, called with n, does `operations_of(n)` operations.

    The function works in registers only, without memory traffic, and releases the GIL. Its code
    contains the vectors and the fused multiply-adds explicitly, because in a loop over numbers the
    compiler would choose the width of the vectors.

    Raises:
        ImportError: Numba is missing or does not work here.
    """
    # Imported as Any: Numba's types describe neither intrinsics nor all of cgutils.
    numba: Any = importlib.import_module("numba")
    cgutils: Any = importlib.import_module("numba.core.cgutils")
    extending: Any = importlib.import_module("numba.extending")
    ir: Any = importlib.import_module("llvmlite.ir")
    float32, int64 = numba.float32, numba.int64

    vector = ir.VectorType(ir.FloatType(), lanes())

    # Numba's decorators have no types.
    @extending.intrinsic  # type: ignore[untyped-decorator]
    def chains(context: Any, count: Any, factor: Any) -> Any:
        def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
            count, factor = arguments
            multiply_add = cgutils.get_or_insert_function(
                builder.module,
                ir.FunctionType(vector, (vector,) * 3),
                f"llvm.fmuladd.v{vector.count}f32",  # one instruction if it has FMA
            )
            factors = ir.Constant(vector, ir.Undefined)
            for lane in range(vector.count):
                factors = builder.insert_element(factors, factor, ir.IntType(32)(lane))
            # x ← x·factor + factor, from a different start in each chain
            places = [cgutils.alloca_once(builder, vector) for _ in range(CHAINS)]
            for i, place in enumerate(places):
                builder.store(ir.Constant(vector, [float(i)] * vector.count), place)
            with cgutils.for_range(builder, count):
                for place in places:
                    builder.store(
                        builder.call(multiply_add, [builder.load(place), factors, factors]), place
                    )
            total = builder.load(places[0])
            for place in places[1:]:
                total = builder.fadd(total, builder.load(place))
            result = builder.extract_element(total, ir.IntType(32)(0))
            for lane in range(1, vector.count):
                result = builder.fadd(result, builder.extract_element(total, ir.IntType(32)(lane)))
            return result

        return float32(int64, float32), generate

    @numba.njit(float32(int64, float32), nogil=True)  # type: ignore[untyped-decorator]
    def compiled(count: int, factor: float) -> Any:
        return chains(count, factor)

    return lambda count: float(compiled(count, 0.5))


def lanes() -> int:
    """Return the number of float32 values in the kernel's vectors: 16 with AVX512F, otherwise 8.

    A processor with shorter vectors uses several of its vectors for one vector of the kernel.
    """
    return 16 if "AVX512F" in features() else 8


def operations_of(count: int) -> int:
    """Return the number of operations of the kernel when it is called with ``count``."""
    return 2 * lanes() * CHAINS * count


class Peaks:
    """A meter of the CPU's operations per second in float32, with two ways of measuring.

    The way "multiply-add" is the kernel of `multiply_add_kernel`, and needs Numba. The way
    "product" is NumPy's product of two matrices of 2,048 × 2,048.
    """

    def __init__(self) -> None:
        backend.limit_blas_threads(1)
        generator = np.random.default_rng(0)
        self._matrix = generator.random((PRODUCT, PRODUCT), np.float32)
        self._product = np.empty_like(self._matrix)
        self._kernel: Callable[[int], float] | None
        try:
            self._kernel = multiply_add_kernel()
        except ImportError:
            self._kernel = None

    def measure(self, threads: int, seconds: float = 0.03) -> dict[str, float]:
        """Measure several loops of operations; return the operations per second of each loop.

        The value of "multiply-add" is the highest of three measurements, which take about
        ``seconds`` each; the value of "product" is a single measurement.
        """
        rates = {}
        if self._kernel is not None:
            rates["multiply-add"] = self._multiply_add(self._kernel, threads, seconds)
        backend.limit_blas_threads(threads)
        started = time.perf_counter()
        np.matmul(self._matrix, self._matrix, out=self._product)
        rates["product"] = 2 * PRODUCT**3 / (time.perf_counter() - started)
        return rates

    @staticmethod
    def _multiply_add(kernel: Callable[[int], float], threads: int, seconds: float) -> float:
        count = 100_000
        with ThreadPoolExecutor(threads) as pool:

            def elapsed(count: int) -> float:
                started = time.perf_counter()
                for _ in pool.map(kernel, [count] * threads):
                    pass
                return time.perf_counter() - started

            elapsed(count)  # This is not measured, because the threads start here.
            count = max(count, round(count * seconds / elapsed(count)))
            return max(threads * operations_of(count) / elapsed(count) for _ in range(3))


def fastest_way(rates: Sequence[dict[str, float]]) -> str:
    """Return the way with the highest median, given the measurements of several rounds.

    If "product" is the fastest way, the kernel does not reach the peak of this processor.
    """
    return max(rates[0], key=lambda way: statistics.median(rate[way] for rate in rates))
