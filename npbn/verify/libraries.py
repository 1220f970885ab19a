"""Check gradients of functions that are written with PyTorch or JAX.

`check_torch` and `check_jax` pass a function to `npbn.verify.check_gradients`. The function is the
forward pass. The backward pass is `torch.autograd.grad` or `jax.vjp` of the function. So the check
covers a backward pass that a person wrote as a ``torch.autograd.Function`` or for
``jax.custom_vjp``.

The numeric derivatives are central differences, because few functions of these libraries are fit
for the complex step. A proof needs float64. If the code takes or computes less precise numbers, the
bound allows for their rounding, so a right gradient may get the verdict "can't tell".

`check_torch` also computes the gradients for an upstream gradient that is not contiguous in memory.

All outputs of a function are checked together. Each output is divided by about its largest element.
So a mistake in the gradient of a small output is as visible as a mistake in that of a large output.

PyTorch and JAX are imported only when a function is checked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from npbn.verify.checker import Report, agree, check_gradients
from npbn.verify.rounding import CoarseArray

Arrays = Mapping[str, np.ndarray]
Pullback = Callable[[Sequence[np.ndarray]], Sequence[np.ndarray]]
Run = Callable[[Arrays], tuple[Sequence[np.ndarray], Pullback]]
"""A function that maps the inputs, by name, to the outputs and a pullback. The pullback is another
function, which maps the upstream gradients of the outputs to the gradients of the inputs."""


def check_torch(function: Any, /, *arguments: Any, **named: Any) -> Report:
    r"""Compare the gradients that PyTorch computes for a function with numeric derivatives.

    ```python
    import npbn.verify

    print(npbn.verify.check_torch(MyBatchNorm.apply, x=x, gamma=gamma, beta=beta))
    ```

    Args:
        function: a function of tensors, a ``torch.autograd.Function`` or its ``apply``, or a
            module. For a module, the gradients of the parameters that require grad are also
            checked. The module stays as it is: each evaluation gets copies of the module's buffers
            (moving averages).
        arguments, named: the arguments of the function. If some tensors require grad, the gradients
            of these tensors are checked. If no tensor requires grad, the gradients of all tensors
            and NumPy arrays of floating-point numbers are checked. The function gets a copy of each
            tensor, with the same dtype, device and memory order. NumPy arrays are converted to
            tensors. The function gets all other arguments unchanged.

    Returns:
        A report, which can be printed. Notes in it name the gradients that are not checked.

    Raises:
        ValueError: no output has a gradient, or `npbn.verify.check_gradients` raises a ValueError,
            for example because the function is random.
        TypeError: no output is a tensor of floating-point numbers, or an argument is complex.
        Exception: the function, or PyTorch, raises this error.
    """
    import torch

    module = function if isinstance(function, torch.nn.Module) else None
    owner = function if inspect.isclass(function) else getattr(function, "__self__", None)
    if inspect.isclass(owner) and issubclass(owner, torch.autograd.Function):
        kernel: Any = owner
        function = kernel.apply
        # ``apply`` takes no keyword arguments. Its arguments are those of ``forward``.
        signature = inspect.signature(kernel.forward)
        if kernel.setup_context is torch.autograd.Function.setup_context:
            signature = signature.replace(parameters=list(signature.parameters.values())[1:])
        bound = signature.bind(*arguments, **named)
        if bound.kwargs:  # An optional argument before these was left out.
            bound.apply_defaults()
        arguments, named = bound.args, {}
    else:
        signature = _signature(function.forward if module is not None else function)
    values = {**_by_name(signature, arguments), **named}

    parameters = dict(module.named_parameters()) if module is not None else {}
    buffers = dict(module.named_buffers()) if module is not None else {}
    tensors = [v for v in (*values.values(), *parameters.values()) if torch.is_tensor(v)]
    for name, value in values.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
            values[name] = torch.tensor(value, device=tensors[0].device if tensors else None)
        if torch.is_tensor(values[name]) and values[name].is_complex():
            raise TypeError(f"expected {name} of real numbers, got {values[name].dtype}")
    floating = {n: v for n, v in values.items() if torch.is_tensor(v) and v.is_floating_point()}
    chosen = {n: v for n, v in floating.items() if v.requires_grad} or floating
    notes = [
        f"d{n} is not checked: {n} does not require grad, but {', '.join(chosen)} does"
        for n in floating
        if n not in chosen
    ]
    # A parameter of the module may have the same name as an argument of the function.
    places = {(f"module.{n}" if n in chosen else n): n for n in parameters}
    checked = {**chosen, **{n: parameters[p] for n, p in places.items()}}
    checked = {n: v for n, v in checked.items() if n in chosen or v.requires_grad}

    def copied(value: Any) -> Any:
        return value.detach().clone() if torch.is_tensor(value) else value

    def tensor(array: np.ndarray, original: Any) -> Any:
        """Return an array as a tensor with the dtype, device and memory order of ``original``."""
        return torch.empty_like(original, requires_grad=False).copy_(torch.tensor(np.array(array)))

    def call(given: Mapping[str, Any]) -> Any:
        """Call the function with the given tensors, and with copies of all other tensors."""
        every = {n: given[n] if n in chosen else copied(v) for n, v in values.items()}
        positional = [every.pop(n) for n in list(every)[: len(arguments)]]
        if module is None:
            return function(*positional, **every)
        state = {p: given[n] if n in given else copied(parameters[p]) for n, p in places.items()}
        state.update({n: copied(b) for n, b in buffers.items()})
        return torch.func.functional_call(module, state, tuple(positional), every)

    def run(inputs: Arrays, watched: Any = None) -> tuple[list[np.ndarray], Any]:
        coarse = next((x for x in inputs.values() if isinstance(x, CoarseArray)), None)
        watch = watched or (_arithmetic(coarse.generator) if coarse is not None else None)
        leaves = {n: tensor(inputs[n], v).requires_grad_() for n, v in checked.items()}
        with torch.enable_grad():
            # The function gets clones, because PyTorch forbids changes of a leaf in place.
            given = {n: leaf.clone() for n, leaf in leaves.items()}
            with watch or contextlib.nullcontext():
                result = [*_elements(call(given))]
        found = [y for y in result if torch.is_tensor(y) and y.is_floating_point()]
        if not found:
            raise TypeError(_no_outputs("tensor", result))
        outputs = [y for y in found if y.requires_grad]
        if not outputs:
            raise ValueError(
                "expected an output with a gradient, got outputs that do not require grad: they "
                "were detached, or computed under no_grad or by another library"
            )
        left_out = len(found) - len(outputs)
        text = f"{left_out} of {len(found)} outputs do not require grad, and are not checked"
        _note(notes, text, left_out > 0)

        def pullback(dys: Sequence[np.ndarray], spread: bool = False) -> list[np.ndarray]:
            upstream = [tensor(dy, y) for dy, y in zip(dys, outputs, strict=True)]
            if spread:  # In memory, a NaN follows each element.
                nothing = [torch.full_like(dy, math.nan) for dy in upstream]
                pairs = zip(upstream, nothing, strict=True)
                upstream = [torch.stack(pair, dim=-1)[..., 0] for pair in pairs]
            kept = [dy.clone() for dy in upstream]
            with watch or contextlib.nullcontext():
                gradients = torch.autograd.grad(
                    outputs, list(leaves.values()), upstream, allow_unused=True
                )
            same = all(map(torch.equal, kept, upstream))
            _note(notes, "the backward pass changes the upstream gradient in place", not same)
            for n, gradient in zip(leaves, gradients, strict=True):
                text = f"PyTorch has no gradient for {n} (None), which counts as 0"
                _note(notes, text, gradient is None)
            pairs = zip(leaves.values(), gradients, strict=True)
            return [_numpy(torch.zeros_like(x) if dx is None else dx) for x, dx in pairs]

        return [_numpy(y) for y in outputs], pullback

    inputs = {n: _numpy(v) for n, v in checked.items()}
    precision = max((torch.finfo(v.dtype).eps for v in checked.values()), default=0.0)
    watched = _arithmetic(None)
    # If the function raises an error, the check below raises it again.
    with contextlib.suppress(Exception):
        outputs, pullback = run(inputs, watched)
        pullback([np.ones_like(y) for y in outputs])
    precision = max(precision, watched.precision)
    report = _check(run, inputs, precision, notes)

    # Kernels often expect a contiguous upstream gradient, but the one of y.sum() or y.T is not.
    outputs, pullback = run(inputs)
    generator = np.random.default_rng(0)
    dys = [generator.standard_normal(y.shape) for y in outputs]
    findings = []
    for finding, a, b in zip(
        report.findings, pullback(dys), run(inputs)[1](dys, spread=True), strict=True
    ):
        allowed = math.sqrt(precision) * np.abs(a).max() + finding.bound * finding.scale
        if finding.within and not np.abs(a - b).max() <= allowed:
            problem = "is wrong if the upstream gradient is not contiguous in memory"
            finding = dataclasses.replace(finding, problem=problem)
        findings.append(finding)
    return Report(tuple(findings), report.notes)


def _numpy(tensor: Any) -> np.ndarray:
    """Return a copy of a float64 tensor as a float64 array, and of any other as a float32 array."""
    host = tensor.detach().cpu()
    return np.array((host if host.dtype.itemsize == 8 else host.float()).numpy())


def _arithmetic(generator: np.random.Generator | None) -> Any:
    """Return a context that measures the precision of PyTorch's operations, and may reduce it.

    The context looks for results that are less precise than an argument of their operation. The
    attribute ``precision`` is the largest machine epsilon of these results. For example, this is
    the epsilon of float32 if code for float64 computes in float32. With a generator, the context
    multiplies each result by random numbers that are nearly 1; see `npbn.verify.rounding`.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Arithmetic(TorchDispatchMode):
        precision = 0.0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            results = func(*args, **(kwargs or {}))
            given = [_unit(value) for value in _elements((args, kwargs or {}))]
            finest = min((unit for unit in given if unit > 0), default=1.0)
            for returned, result in zip(func._schema.returns, _elements(results), strict=False):
                unit = _unit(result)
                if unit > finest:
                    self.precision = max(self.precision, unit)
                # A result that is a view, or was changed in place, is not made coarser.
                if generator is not None and unit > 0 and returned.alias_info is None:
                    factors = 1 + math.sqrt(unit) * generator.uniform(-1, 1, tuple(result.shape))
                    result.mul_(torch.as_tensor(factors).to(result))
            return results

    def _unit(value: Any) -> float:
        """Return the machine epsilon of a floating-point tensor, and 0 for any other value."""
        floating = torch.is_tensor(value) and value.is_floating_point()
        return float(torch.finfo(value.dtype).eps) if floating else 0.0

    return Arithmetic()


def check_jax(function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Report:
    """Compare the gradients that JAX computes for a function with numeric derivatives.

    ```python
    import npbn.verify

    print(npbn.verify.check_jax(my_batch_norm, x, gamma, beta))
    ```

    The gradients are those of `jax.vjp`, so rules by ``jax.custom_vjp`` and ``jax.custom_jvp`` are
    checked. JAX computes in float32, unless the program begins with
    ``jax.config.update("jax_enable_x64", True)``.

    Args:
        function: a function of arrays, or of dicts, lists and tuples of arrays.
        arguments, named: the arguments of the function. The gradients of all JAX and NumPy arrays
            of floating-point numbers in the arguments are checked. The function gets all other
            arguments unchanged.

    Returns:
        A report, which can be printed.

    Raises:
        ValueError: `npbn.verify.check_gradients` raises a ValueError, or the forward rule of
            ``jax.custom_vjp`` returns other outputs than the function.
        TypeError: no output is an array of floating-point numbers, or an array is complex.
        Exception: the function, or JAX, raises this error.
    """
    import jax
    import jax.numpy as jnp

    values = {**_by_name(_signature(function), arguments), **named}
    leaves, structure = jax.tree_util.tree_flatten_with_path(list(values.values()))
    notes: list[str] = []
    checked: dict[str, int] = {}
    everything = [leaf for _, leaf in leaves]
    for k, (path, value) in enumerate(leaves):
        name = list(values)[path[0].idx] + jax.tree_util.keystr(path[1:])
        if not isinstance(value, (np.ndarray, jax.Array)):
            continue
        if jnp.issubdtype(value.dtype, jnp.complexfloating):
            raise TypeError(f"expected {name} of real numbers, got {value.dtype}")
        if jnp.issubdtype(value.dtype, jnp.floating):
            checked[name] = k  # The index of this array among all leaves of the arguments.
            if value.dtype == np.float64 and not jax.config.jax_enable_x64:
                text = "JAX computed in float32; float64 needs "
                _note(notes, text + 'jax.config.update("jax_enable_x64", True), early')
                value = value.astype(np.float32)
            everything[k] = jnp.asarray(value)
    dtypes = {n: everything[k].dtype for n, k in checked.items()}

    def call(*given: Any) -> list[Any]:
        """Return the floating-point outputs of the function for values of the checked arrays."""
        every = list(everything)
        for k, value in zip(checked.values(), given, strict=True):
            every[k] = value
        rebuilt = jax.tree_util.tree_unflatten(structure, every)
        keywords = dict(zip(list(values)[len(arguments) :], rebuilt[len(arguments) :], strict=True))
        result = jax.tree_util.tree_leaves(function(*rebuilt[: len(arguments)], **keywords))
        arrays = [y for y in result if isinstance(y, jax.Array)]
        outputs = [y for y in arrays if jnp.issubdtype(y.dtype, jnp.floating)]
        if not outputs:
            raise TypeError(_no_outputs("JAX array", result))
        return outputs

    def numpy(array: Any) -> np.ndarray:
        return np.array(array, np.float64 if array.dtype == np.float64 else np.float32)

    def run(inputs: Arrays) -> tuple[list[np.ndarray], Pullback]:
        given = [jnp.asarray(np.array(inputs[n]), dtype) for n, dtype in dtypes.items()]
        outputs = call(*given)

        def pullback(dys: Sequence[np.ndarray]) -> list[np.ndarray]:
            again, vjp = jax.vjp(call, *given)
            if not all(
                agree(numpy(y), numpy(z), precision) for y, z in zip(outputs, again, strict=True)
            ):
                raise ValueError(
                    "expected the same outputs with and without a gradient, got other outputs "
                    "with: the forward rule of custom_vjp differs from the function"
                )
            upstream = [jnp.asarray(dy, y.dtype) for dy, y in zip(dys, outputs, strict=True)]
            return [numpy(gradient) for gradient in vjp(upstream)]

        return [numpy(y) for y in outputs], pullback

    inputs = {n: numpy(everything[k]) for n, k in checked.items()}
    used = list(dtypes.values())
    if inputs:
        used += [y.dtype for y in call(*(everything[k] for k in checked.values()))]
    precision = max((float(jnp.finfo(dtype).eps) for dtype in used), default=0.0)
    return _check(run, inputs, precision, notes)


def _check(run: Run, inputs: Arrays, precision: float, notes: list[str]) -> Report:
    """Check the gradients of a function with any number of outputs.

    Args:
        run: the function, in the form of `Run`.
        inputs: the inputs by name.
        precision: the machine epsilon of the function's arithmetic.
        notes: notes for the report. Each call of ``run`` may append to this list.
    """
    sizes: list[float] = []

    def forward(**values: np.ndarray) -> tuple[np.ndarray, Any]:
        outputs, pullback = run(values)
        if len(outputs) == 1:
            return outputs[0], (pullback, [outputs[0].shape])
        sizes.extend(_size(y) for y in outputs[len(sizes) :])
        parts = [y.ravel() / size for y, size in zip(outputs, sizes, strict=True)]
        return np.concatenate(parts), (pullback, [y.shape for y in outputs])

    def backward(dy: np.ndarray, cache: Any) -> tuple[np.ndarray, ...]:
        pullback, shapes = cache
        if len(shapes) == 1:
            return tuple(pullback([dy]))
        ends = np.cumsum([math.prod(shape) for shape in shapes])
        parts = zip(np.split(dy, ends[:-1]), sizes, shapes, strict=True)
        return tuple(pullback([part.reshape(shape) / size for part, size, shape in parts]))

    report = check_gradients(
        forward, backward, inputs, method="central difference", precision=precision
    )
    return Report(report.findings, (*report.notes, *notes))


def _size(array: np.ndarray) -> float:
    """Return the largest absolute value of an array, rounded down to a power of 2.

    The result is 1 if the largest absolute value is 0 or not finite.
    """
    largest = float(np.max(np.abs(array), initial=0.0))
    return 2.0 ** math.floor(math.log2(largest)) if 0 < largest < math.inf else 1.0


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of a function, or an empty one if Python does not know it."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return inspect.Signature()


def _by_name(signature: inspect.Signature, arguments: Sequence[Any]) -> dict[str, Any]:
    """Return positional arguments by name. Without a name, the argument at index i is called xi."""
    names = [p.name for p in signature.parameters.values() if p.kind in NAMED]
    names += [f"x{i}" for i in range(len(names), len(arguments))]
    return dict(zip(names, arguments, strict=False))


NAMED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _elements(value: Any) -> Iterator[Any]:
    """Yield the values inside nested tuples, lists and dicts."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if not isinstance(value, (tuple, list)):
        yield value
        return
    for element in value:
        yield from _elements(element)


def _no_outputs(wanted: str, outputs: Sequence[Any]) -> str:
    """Return the message for a function without an output that can be checked."""
    found = ", ".join(str(getattr(y, "dtype", type(y).__name__)) for y in outputs) or "nothing"
    return (
        f"expected a {wanted} of real floating-point numbers as output, got {found}: what leaves "
        "the library, for example by item() or float(), has no gradient"
    )


def _note(notes: list[str], text: str, applies: bool = True) -> None:
    """Add a note to the report if a condition holds, but not twice."""
    if applies and text not in notes:
        notes.append(text)
