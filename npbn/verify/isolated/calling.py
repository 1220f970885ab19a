"""Call other people's forward and backward passes, whatever the names of their arguments are.

Each argument has a *role*. For example, ``W``, ``weights`` and ``kernel`` have the role "weight".
Roles are guessed from the names (`NAMES`). Layouts of arrays are found by trying those that are
known (`npbn.verify.operations`).

- *functions*: ``forward(x, …) -> y, cache`` and ``backward(dy, cache) -> gradients``. The gradients
  are a dict, or a tuple in the order of the operation or of the arguments of forward. Options are
  arguments (``stride``, ``padding``, ``eps``, ``training``, …) or the entries of a dict, as in
  ``batchnorm_forward(x, gamma, beta, bn_param)``, ``conv_forward(x, w, b, conv_param)``,
  ``max_pool_forward(x, pool_param)`` and ``conv_forward(A_prev, W, b, hparameters)``.
  gamma is (1, D) or (D,), and for feature maps (1, C, 1, 1) or (C,); the weight of a linear layer
  is (out, in) or (in, out); examples may be columns, and channels may be the last axis.
- *a loss with its gradient*: ``softmax_loss(x, y) -> loss, dx``, given as
  ``softmax_loss,softmax_loss``.
- *classes*: ``BatchNormalization(gamma, beta, momentum).forward(x, train_flg)`` and
  ``.backward(dout)``, with gradients in attributes such as ``dgamma``, ``dW``, ``dLdW`` and
  ``grad_W``. Parameters are arguments of the constructor or attributes, which are then set.

Code is examined only with the arguments that it takes. Code without ``training`` is examined in
training only, and code without ``padding`` with a padding of 0.

- *any other code*, by an adapter that you write: ``adapt(forward, backward)`` gets two functions,
  or a class twice, and returns two functions with npbn's arguments, or some of them. If these raise
  `npbn.verify.NotExaminedError`, the input is left out. For a class with a list of parameters::

      from npbn.verify import NotExaminedError

      def adapt(forward, backward):
          def batch_norm(x, gamma, beta, training, eps):
              if not training:
                  raise NotExaminedError("prediction is another exercise")
              layer = forward(gamma.size, eps)
              layer.theta = [gamma.ravel(), beta.ravel()]
              return layer.forward(x), layer

          def batch_norm_backward(dy, layer):
              dx = layer.backward(dy)
              return dx, *layer.dtheta

          return batch_norm, batch_norm_backward
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import re
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

Values = dict[str, Any]
"""Arguments by role, such as "weight"."""

NAMES: dict[str, list[str]] = {
    role: names.split()
    for role, names in {
        "x": """
            x xin input inputs inp a z aprev indata data in feature features image
            images img imgs inputdata xinput inputtensor prev layerinput batch h
            activation activations inputarray s logits scores score predictions pred
            preds yhat ypred output outputs
        """,
        "weight": "w weight weights kernel kernels filter filters k f ws",
        "bias": "b bias biases bs",
        "gamma": "gamma g bw scale weight w gammas",
        "beta": "beta bb shift bias b betas offset",
        "moving_mean": """
            movingmean runningmean runningm movingaverage runmean runmu runningmu
            meanmoving emamean globalmean rollingmean popmean runningavg
        """,
        "moving_var": """
            movingvar runningvar runningv movingvariance runningvariance runvar emavar
            globalvar rollingvar popvar rollingvariance
        """,
        "training": """
            training train istraining trainflg istrain trainmode trainflag ontrain
            savecache keepcache intraining trainingmode
        """,
        "prediction": "eval test iseval inference istest testing evalmode",
        "mode": "mode phase",
        "eps": "eps epsilon e epsil veps",
        "momentum": "momentum m decay alpha rho",
        "stride": "stride strides s",
        "padding": "padding pad p pads paddingsize padsize",
        "kernel_size": """
            kernelsize poolsize size kernel k ksize filtersize windowsize filterdim
            fsize kerneldim pooldim poolsz filtershape windowshape pool window f
            poolshape kernelshape
        """,
        "kernel_height": "poolheight poolh ph kernelheight kh filterheight height h",
        "kernel_width": "poolwidth poolw pw kernelwidth kw filterwidth width w",
        "labels": """
            y t labels label target targets ytrue true truth yb c gt ts answer answers
            groundtruth actual classes
        """,
        "input_shape": "inputshape inshape shape xshape dims inputdims insize inputsize",
        "inputs": """
            infeatures inputsize insize nin inputdim indim numfeatures dim d
            inchannels inchannel channels numchannels features fanin infeature
            inputchannels inputchannel cin numinput numinputs size inputfeatures
            inchans inch numin rows inputchans inputunits inputdims nchannels
            nfeatures inputs ninputs inputnum n shape dims inputshape c inshape channelsin
            ninchannels ninputschannels ni input inputnum
        """,
        "outputs": """
            outfeatures outputsize outsize nout outputdim outdim outchannels
            outchannel fanout units numfilters nfilters outfeature outputchannels
            outputchannel cout numoutput numoutputs neurons nneurons filternum
            outchans outch numout cols numkernels nkernels kernelnum filtersnum
            outputs noutputs outputnum nodes numneurons outputfeatures filters hidden
            filterscount neuronscount channelsout noutchannels depth nunits unitscount
            hiddensize hiddendim hiddenunits no output
        """,
        "classes": "numclasses nclasses numclass classnum nclass cls",
        "weight_initializer": "weightinitfn weightinit winit",
        "bias_initializer": "biasinitfn biasinit binit",
        "mask": "mask dropmask",
        "p": "p rate dropout dropoutratio dropoutrate ratio prob dropprob keepprob",
        "slope": "slope alpha negativeslope leak",
        "hidden": "prevh hprev h hidden h0 ht1 hprevt",
        "weight_x": "wx wxh wi wax wih kernel",
        "weight_h": "wh whh waa recurrentkernel",
        "groups": "g groups numgroups ngroups",
    }.items()
}
"""For each role, the names that arguments of this role have in other people's code.

They are in lower case, without underscores. Of several roles, the one in whose list a name comes
first is taken.
"""

FORWARD_METHODS = (
    *("forward", "__call__", "forward_propagate", "forward_propagation", "forward_pass"),
    *("propagate", "call", "forward_prop", "feedforward", "feed_forward", "fprop", "cal_loss"),
    *("calc_loss", "calculate_loss", "compute_loss", "forward_loss"),
)
BACKWARD_METHODS = (
    *("backward", "back_propagate", "backpropagate", "backward_pass", "backprop"),
    *("backward_propagate", "backward_propagation", "back_propagation", "backpropagation"),
    *("backward_prop", "back_prop", "bprop", "derivative", "gradient", "grad"),
    *("calc_gradient", "calculate_gradient", "compute_gradient", "cal_gradient"),
)
"""The names that the backward method of a class may have. The first one that exists is called."""
BUILDERS = ("build", "init_params", "initialize", "init_weights", "initialize_weights", "init")
"""The names of methods that make the parameters of a layer."""
CONTENTS = ("data", "value", "val")
"""If a parameter is an object, the names of the attribute that may hold its array."""
OUTPUT = ("a", "y", "out", "output", "outputs", "yout", "activation", "s", "h", "result")
"""The names that the output y may have as an argument of a backward function."""
LEARNING_RATE = ("learningrate", "lr", "rate", "alpha", "eta", "learnrate")

PARAMETERS = (
    *("weight", "weight_x", "weight_h", "bias", "gamma", "beta", "moving_mean", "moving_var"),
)
DICTIONARY = re.compile(r"param(eter)?s?$|hyper|^config$|^options?$|^hp$")


class BadResultError(Exception):
    """The error that is raised if the code returns an unusable result.

    The message is the rest of a sentence that begins with "it": "returned None from backward".
    """


class NotExaminedError(Exception):
    """The error that is raised if code is not meant for an input. The message says why."""


class MisfitError(NotExaminedError):
    """The error that is raised if the weight of a layer has another shape than the given one."""


class UnknownError(NotExaminedError):
    """The error that is raised if the roles of some arguments of a function are not known.

    Attributes:
        names: the names of these arguments.
        given: the values of the other arguments, by name.
    """

    def __init__(self, parameters: list[str], names: list[str], given: dict[str, Any]) -> None:
        super().__init__(
            f"its arguments ({', '.join(parameters)}) are not known: what is {names[0]}? "
            "An adapter is needed"
        )
        self.names, self.given = names, given


class RaisedError(Exception):
    """The error that is raised if the code raises an error, which is the ``__cause__``."""


def plain(name: str) -> str:
    """Return a name in lower case, without underscores."""
    return name.lower().replace("_", "")


def role_of(name: str, roles: Mapping[str, Any]) -> str | None:
    """Return which of these roles an argument of this name has, or None."""
    name = plain(name)
    found = [(NAMES[role].index(name), role) for role in roles if name in NAMES.get(role, ())]
    return min(found)[1] if found else None


def called(function: Callable[..., Any], *values: Any, **arguments: Any) -> Any:
    """Call other people's code.

    Raises:
        RaisedError: the code raised an error, which is the ``__cause__``.
    """
    try:
        found = function(*values, **arguments)
        return (
            None if found is NotImplemented else found
        )  # Templates of homework return NotImplemented.
    except NotExaminedError:
        raise
    except (Exception, SystemExit) as error:
        raise RaisedError from error


class Asked(dict[str, Any]):
    """A dictionary of options that notes which of them the code reads.

    Args:
        values: the options by key.
        roles: the role of each key.
        taken: a set, to which the role of a key is added when the code reads the key.
    """

    def __init__(
        self, values: Mapping[str, Any], roles: Mapping[str, str], taken: set[str]
    ) -> None:
        super().__init__(values)
        self._roles, self._taken = roles, taken

    def _note(self, key: Any) -> None:
        if key in self._roles:
            self._taken.add(self._roles[key])

    def __getitem__(self, key: Any) -> Any:
        self._note(key)
        if key not in self and key in DICTIONARY_NAMES["kernel_size"]:
            raise NotExaminedError("it takes one size of the kernel")
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        self._note(key)
        return super().get(key, default)

    def pop(self, key: Any, *default: Any) -> Any:
        self._note(key)
        return super().pop(key, *default)

    def setdefault(self, key: Any, default: Any = None) -> Any:
        self._note(key)
        return super().setdefault(key, default)


DICTIONARY_NAMES = {
    "stride": ("stride", "strides"),
    "padding": ("pad", "padding"),
    "kernel_height": ("pool_height", "kernel_h"),
    "kernel_width": ("pool_width", "kernel_w"),
    "kernel_size": ("f", "kernel_size", "pool_size"),
    "eps": ("eps", "epsilon"),
    "momentum": ("momentum",),
    "moving_mean": ("running_mean", "moving_mean"),
    "moving_var": ("running_var", "moving_var"),
    "mode": ("mode",),
    "training": ("training",),
    "mask": ("mask",),
    "p": ("p",),
    "slope": ("slope", "alpha"),
}


def dictionary(values: Values, taken: set[str]) -> Asked:
    """Return options as a dictionary such as ``bn_param``, with the keys that homework uses.

    Args:
        values: the options by role.
        taken: a set, to which the roles of the keys are added that the code reads.
    """
    sizes = values.get("kernel_size")
    if isinstance(sizes, tuple) and sizes[0] != sizes[1]:  # There are keys for both lengths.
        values = {role: value for role, value in values.items() if role != "kernel_size"}
    values = numbers(values)
    keys = {
        key: role for role, names in DICTIONARY_NAMES.items() if role in values for key in names
    }
    return Asked({key: values[role] for key, role in keys.items()}, keys, taken)


def derived(values: Values) -> Values:
    """Return arguments, together with others that follow from them, such as "kernel_height"."""
    found = dict(values)
    if "training" in found:
        found["prediction"] = not found["training"]
        found["mode"] = "train" if found["training"] else "test"
    if "kernel_size" in found:
        size = found["kernel_size"]
        height, width = size if isinstance(size, tuple) else (size, size)
        found["kernel_height"], found["kernel_width"] = height, width
    if "weight" in found:
        found["weight_initializer"] = lambda *_, **__: np.array(values["weight"])
    if "bias" in found:
        found["bias_initializer"] = lambda *_, **__: np.array(values["bias"])
    return found


def lengths(values: Values) -> list[Values]:
    """Return the arguments of constructors that follow from the shapes of arrays.

    They are the numbers of inputs and outputs, the kernel's size and the number of classes. If the
    layout of the weight is not clear, there are several results.
    """
    x, weight = np.shape(values["x"]), np.shape(values.get("weight", ()))
    if len(weight) == 2:
        transposed = x[-1] == weight[0]
        return [{"outputs": weight[transposed], "inputs": weight[not transposed]}]
    if len(weight) == 4:
        # The layouts (out, in, h, w), (h, w, in, out) and (out, h, w, in).
        axes = {1: (2, 0), 2: (0, 3), 3: (1, 0)}
        inputs = x[1] if x[1] == weight[1] else x[-1]  # channels first, or last
        return [
            {
                "outputs": weight[output],
                "inputs": inputs,
                "kernel_size": (weight[first], weight[first + 1]),
            }
            for axis, (first, output) in axes.items()
            if weight[axis] == inputs
        ] or [{}]
    if "weight_x" in values:
        inputs, outputs = np.shape(values["weight_x"])
        return [{"inputs": inputs, "outputs": outputs}]
    if "labels" in values:
        return [{"classes": x[-1]}]
    return [{"inputs": np.size(values["gamma"])} if "gamma" in values else {}]


def numbers(values: Values) -> Values:
    """Return the arguments with a number, such as 2, in place of a pair, such as (2, 2).

    Raises:
        NotExaminedError: the numbers of a pair are not equal.
    """
    pairs = {
        k: v
        for k, v in values.items()
        if isinstance(v, tuple) and len(v) == 2 and k != "input_shape"
    }
    for role, (height, width) in pairs.items():
        if height != width:
            raise NotExaminedError(f"it takes one number for {role}")
    return values | {role: height for role, (height, _) in pairs.items()}


class Code:
    """Other people's forward and backward pass, to be called with arguments by role.

    Args:
        forward, backward: two functions, a class twice, or twice a function that returns the loss
            and its gradient.
        gradients: the names of the gradients, such as "dx", in the usual order.
        by_name: whether the forward pass has npbn's arguments, which are passed by their names.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        backward: Callable[..., Any],
        gradients: list[str],
        by_name: bool = False,
    ) -> None:
        self.function, self.function_backward = forward, backward
        self.gradients, self.by_name = gradients, by_name
        self.taken: set[str] = set()
        self.values: Values = {}
        self.order = list(gradients)
        self.without_dy = False
        self.unknown: UnknownError | None = None  # about the constructor
        self.single = forward is backward and not inspect.isclass(forward)

    def has_dictionary(self) -> bool:
        """Return whether the forward function has an argument for a dictionary of options.

        The dictionary is recognized by the name of the argument, such as ``bn_param``.
        """
        if inspect.isclass(self.function) or self.by_name:
            return False
        names = inspect.signature(self.function).parameters
        return any(DICTIONARY.search(plain(name)) for name in names)

    # Forward.

    def forward(self, values: Values, instance: Any = None) -> tuple[dict[str, Any], Any]:
        """Call the forward pass with values by role; return the outputs by name, and the cache.

        The cache of a class is the instance.
        """
        self.taken, self.values = set(), values
        if self.by_name:
            parameters = inspect.signature(self.function).parameters.values()
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                values = {p.name: values[p.name] for p in parameters if p.name in values}
            self.taken = set(values)
            return self._outputs(called(self.function, **values), {})
        if inspect.isclass(self.function):
            return self._forward_of_class(derived(values), instance)
        try:
            return self._forward_of_function(derived(values))
        except RaisedError as error:
            # The code may expect a number in place of a pair, such as 2 for a stride of (2, 2).
            if not isinstance(error.__cause__, TypeError) or numbers(values) == values:
                raise
            try:
                return self._forward_of_function(derived(numbers(values)))
            except RaisedError:
                raise error from error.__cause__

    def _forward_of_function(self, values: Values) -> tuple[dict[str, Any], Any]:
        arguments, asked = self.arguments(self.function, values)
        return self._outputs(called(self.function, **arguments), asked)

    def arguments(self, function: Callable[..., Any], values: Values) -> tuple[Values, Values]:
        """Return the arguments of a function by name, and the dictionary of options among them.

        Raises:
            UnknownError: the role of an argument cannot be guessed from its name.
        """
        parameters = inspect.signature(function).parameters
        given: Values = {}
        asked: Values = {}
        unknown = []
        free = dict(values)
        for name, parameter in parameters.items():
            if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                continue
            role = role_of(name, free)
            if role is None and DICTIONARY.search(plain(name)):
                asked = given[name] = dictionary(values, self.taken)
            elif role in PARAMETERS and isinstance(parameter.default, bool):
                continue  # It is a flag, such as bias=True, not an array.
            elif role is not None:
                given[name] = free.pop(role)
                self.taken.add(role)
            elif parameter.default is parameter.empty:
                unknown.append(name)
        if unknown and len(unknown) == len(parameters):  # No name is known: take the order of npbn.
            for name, role in zip(unknown, values, strict=False):
                given[name] = values[role]
                self.taken.add(role)
            unknown = unknown[len(values) :]
        if unknown and "labels" in free and len(unknown) == 1:
            given[unknown.pop()] = free.pop("labels")
            self.taken.add("labels")
        if unknown and "x" in free and len(unknown) == 1:
            given[unknown.pop()] = free.pop("x")
            self.taken.add("x")
        if unknown:
            raise UnknownError(list(parameters), unknown, given)
        wanted = [name for name in parameters if name in given]
        roles = [role_of(name, values) or "" for name in wanted]
        ordered = [f"d{role}" for role in roles if f"d{role}" in self.gradients]
        if sorted(ordered) == sorted(self.gradients):
            self.order = ordered
        return given, asked

    def _outputs(self, result: Any, asked: Values) -> tuple[dict[str, Any], Any]:
        """Return the outputs by name, and the cache, from what a forward function returned."""
        parts = result if isinstance(result, (tuple, list)) else (result, None)
        if parts[0] is None:
            raise BadResultError("returned None from forward")
        outputs = {"y": parts[0]}
        for role in ("moving_mean", "moving_var"):
            name = next((n for n in DICTIONARY_NAMES[role] if n in asked), None)
            if name is None:
                continue
            value = dict.__getitem__(asked, name)
            if role in self.taken or value is not self.values.get(role):
                outputs[role] = value
        if len(parts) > 2 and isinstance(parts[2], (tuple, list)) and len(parts[2]) == 2:
            outputs["moving_mean"], outputs["moving_var"] = parts[2]
        return outputs, parts[1] if len(parts) > 1 else None

    # Classes.

    def make(self, values: Values) -> Any:
        """Return an instance of the class with its parameters set to the given values."""
        options = dict(values)
        options.pop("x", None)
        arguments = self._constructor_arguments(options)
        layer = called(self.function, **arguments)
        if any(f"d{r}" in self.gradients and r not in self.taken for r in self._set(layer, values)):
            self._prepare(layer, options | {"x": values["x"]})
            self._set(layer, values)
        self.order = list(self.gradients)
        return layer

    def _constructor_arguments(self, options: Values) -> Values:
        """Return the arguments of the constructor by name, with None for those that are unknown."""
        try:
            return self.arguments(self.function, options)[0]
        except UnknownError as error:
            self.unknown = error
            return error.given | dict.fromkeys(error.names)

    def _set(self, layer: Any, values: Values) -> list[str]:
        """Set the parameters of a layer to the given values of their roles.

        Returns:
            The roles of the parameters that the layer does not have.
        """
        missing = []
        for role in (role for role in PARAMETERS if role in values):
            places = list(self._attributes(layer, role))
            for holder, name in places:
                shape = np.shape(holder[name])
                if len(shape) == 4 and role == "weight" and shape != np.shape(values[role]):
                    raise MisfitError(f"its constructor makes a weight of the shape {shape}")
                holder[name] = np.array(values[role])
                self.taken.add(role)
            missing += [] if places else [role]
        return missing

    def _prepare(self, layer: Any, options: Values) -> None:
        """Call the method in which a layer makes its parameters: ``build``, or else ``forward``."""
        shape = np.shape(options["x"])
        methods = [getattr(layer, name, None) for name in (*BUILDERS, *FORWARD_METHODS)]
        for method, sizes in itertools.product(filter(callable, methods), (shape[1:], shape)):
            with contextlib.suppress(RaisedError, NotExaminedError):
                called(method, **self.arguments(method, options | {"input_shape": sizes})[0])
                return

    def _options(self, values: Values) -> Iterator[Values]:
        """Yield arguments for a constructor: numbers or pairs, and several shapes of the input."""
        sizes = []  # numbers; numbers, but a pair for the kernel; pairs
        for whole in (values | found for found in lengths(values)):
            kernel = {k: v for k, v in whole.items() if k == "kernel_size"}
            with contextlib.suppress(NotExaminedError):
                sizes.append(numbers(whole))
            with contextlib.suppress(NotExaminedError):
                sizes.append(numbers({k: v for k, v in whole.items() if k not in kernel}) | kernel)
            sizes.append(whole)
        shapes: list[tuple[int, ...]] = [()]
        if any(role_of(n, {"input_shape": 0}) for n in inspect.signature(self.function).parameters):
            shape = np.shape(values["x"])
            shapes = [shape[1:], shape, ()]  # of an example, of the batch, or none
        # An argument "filters" may be an array of weights, or a number.
        words = ("filters", "filter", "kernels", "kernel", "k", "f")
        numeric = any(plain(n) in words for n in inspect.signature(self.function).parameters)
        for left_out in ((), ("weight", "bias"))[: 1 + numeric]:
            for given, shape in itertools.product(sizes, shapes):
                given = given | ({"input_shape": shape} if shape else {})
                yield derived({k: v for k, v in given.items() if k not in left_out})

    def _forward_of_class(self, values: Values, layer: Any) -> tuple[dict[str, Any], Any]:
        if "training" not in values:
            values |= {"training": True, "prediction": False}
        if layer is not None:
            return self._forward_of_layer(values, layer)
        first: RaisedError | None = None
        misfit: MisfitError | None = None
        for options in self._options(values):
            self.taken, self.unknown = set(), None
            try:
                return self._forward_of_layer(values, self.make(options))
            except MisfitError as error:
                misfit = error
            except RaisedError as error:
                first = first or error
                if not isinstance(error.__cause__, TypeError | ValueError | IndexError):
                    break
        if misfit is not None:
            raise misfit
        if self.unknown is not None:
            raise NotExaminedError(f"its constructor: {self.unknown}")
        assert first is not None
        raise first from first.__cause__

    def _forward_of_layer(self, values: Values, layer: Any) -> tuple[dict[str, Any], Any]:
        if "training" in values:
            self._set_mode(layer, values)
        method = self._method(layer, FORWARD_METHODS)
        first = ("x", "labels", "training", "prediction", "mode")
        arguments, _ = self.arguments(method, {r: values[r] for r in first if r in values} | values)
        result = called(method, **arguments)
        parts = result if isinstance(result, (tuple, list)) else (result,)
        y = parts[0] if parts else None
        if y is None:  # The method may store the output in an attribute.
            found = (v for name, v in vars(layer).items() if plain(name) in ("out", "output"))
            y = next((v for v in found if isinstance(v, np.ndarray)), None)
        if y is None:
            raise BadResultError("returned None from forward")
        outputs = {"y": y}
        for role in ("moving_mean", "moving_var"):
            if role in values:
                for holder, name in self._attributes(layer, role):
                    outputs[role] = holder[name]
        return outputs, layer

    @staticmethod
    def _method(layer: Any, names: tuple[str, ...]) -> Callable[..., Any]:
        """Return the layer's first method with one of these names.

        Raises:
            NotExaminedError: the layer has no method of these names.
        """
        for name in names:
            method: Callable[..., Any] | None = getattr(layer, name, None)
            if callable(method):
                return method
        raise NotExaminedError(f"the class has no method {names[0]}")

    def _backward_method(self, layer: Any) -> Callable[..., Any]:
        """Return the method that computes gradients.

        A method whose first argument is a learning rate only updates the parameters. It is returned
        if there is no other.
        """
        for name in BACKWARD_METHODS:
            method: Callable[..., Any] | None = getattr(layer, name, None)
            if callable(method):
                names = list(inspect.signature(method).parameters)
                if not names or plain(names[0]) not in LEARNING_RATE or names[0] == "eta":
                    return method
        return self._method(layer, BACKWARD_METHODS)

    def _set_mode(self, layer: Any, values: Values) -> None:
        training = values["training"]
        for name, value in list(vars(layer).items()):
            role = role_of(name, {"training": 0, "prediction": 0, "mode": 0})
            if role is not None and isinstance(value, (bool, str, int)):
                layer.__dict__[name] = values[role]
                self.taken.add("training")
        method = getattr(layer, "train" if training else "eval", None)
        if callable(method):
            called(method)
            self.taken.add("training")

    def _attributes(self, layer: Any, role: str) -> Iterator[tuple[Any, Any]]:
        """Yield each place where a layer may store the parameter of a role.

        Each result is a dictionary or list, and the key or index in it.

        A place is an attribute of the layer or of one of its parts, an entry of a dictionary, or an
        element of a list ``params``.
        """
        known = {r: 0 for r in PARAMETERS if f"d{r}" in self.gradients or "moving" in r}
        for holder in _holders(layer):
            for name, value in list(holder.items()):
                if not isinstance(name, str) or role_of(name, known) != role:
                    continue
                inner = next((key for key in CONTENTS if key in getattr(value, "__dict__", {})), "")
                if inner:
                    yield vars(value), inner
                elif value is None or role.startswith("moving") or _is_list(value):
                    yield holder, name
        params = vars(layer).get("params")
        roles = [r for r in PARAMETERS if f"d{r}" in self.gradients]
        if isinstance(params, list) and len(params) == len(roles) and role in roles:
            yield params, roles.index(role)

    # Backward.

    def backward(self, dy: Any, cache: Any) -> dict[str, Any] | list[Any]:
        """Return the gradients: a dict if the code names them, else a list in the code's order."""
        if self.single:
            return [cache]
        if inspect.isclass(self.function):
            return self._backward_of_class(dy, cache)
        function = self.function_backward
        names = _positional(function)
        values: list[Any] = [1.0 if dy is None else dy, cache]
        if dy is None and len(names) == 1:
            values = [cache]
        elif cache is None and len(names) > 1:  # Backward gets arguments of forward.
            roles = [
                "y" if plain(name) in OUTPUT else role_of(name, self.values) for name in names[1:]
            ]
            if all(role is not None for role in roles):
                values[1:] = [self.values[role] for role in roles if role is not None]
        more = {k: v for k, v in self.values.items() if k in ("mode", "slope", "stride", "padding")}
        options = {
            name: more[role]
            for name in inspect.signature(function).parameters
            if name not in names and (role := role_of(name, more)) is not None
        }
        return self._gradients(called(function, *values, **options))

    def _backward_of_class(self, dy: Any, layer: Any) -> dict[str, Any] | list[Any]:
        method = self._backward_method(layer)
        names = list(inspect.signature(method).parameters)
        rates = {name: 1.0 for name in names if plain(name) in LEARNING_RATE}
        if names[:1] == ["eta"]:  # The first argument is the upstream gradient.
            del rates["eta"]
        if dy is None:  # The backward pass of a loss may get the arguments of forward again.
            known = {role: value for role, value in self.values.items() if role in ("x", "labels")}
            for name in names:
                role = role_of(name, known)
                if role is not None:
                    rates[name] = known[role]
        takes_dy = any(name not in rates for name in names)
        for name in _positional(method)[1:] if dy is not None else ():
            role = "y" if plain(name) in OUTPUT else role_of(name, self.values)
            if name not in rates and role is not None:
                rates[name] = self.values[role]
        # `derivative()` and `backward(state=None)` get no upstream gradient.
        if getattr(method, "__name__", "") == "derivative" or names[:1] == ["state"]:
            takes_dy = bool(_positional(method))
        before = {
            role: np.array(holder[name])
            for role in PARAMETERS
            for holder, name in self._attributes(layer, role)
            if holder[name] is not None
        }
        if takes_dy and (dy is not None or _positional(method)):
            result = called(method, 1.0 if dy is None else dy, **rates)
        else:
            result = called(method, **rates)
        if not takes_dy and dy is not None and len(self.gradients) == 1 and result is not None:
            # The method returns the derivative, to be multiplied by the upstream gradient.
            self.without_dy = True
            return [result * dy]
        self.without_dy = not takes_dy
        if isinstance(result, (tuple, list)) and len(result) == len(self.gradients):
            return list(result)
        inputs = [g for g in self.gradients if g.removeprefix("d") not in PARAMETERS]
        returned = result if isinstance(result, (tuple, list)) else [result]
        of_inputs = dict(zip(inputs or self.gradients[:1], returned, strict=False))
        found: dict[str, Any] = {}
        for gradient in self.gradients:
            role = gradient.removeprefix("d")
            value = of_inputs.get(gradient)
            if value is None:
                value = self._gradient(layer, role)
            if value is None and rates and dy is not None and role in before:
                # An update with a learning rate of 1 has subtracted the gradient.
                for holder, name in self._attributes(layer, role):
                    value = before[role] - holder[name]
            if value is not None:
                found[gradient] = value
        return found

    def _gradient(self, layer: Any, role: str) -> Any:
        """Return the gradient of a parameter, which a layer stores in an attribute, or None."""
        prefixes, suffixes = (
            ("dld", "d", "grad", "gradient", "delta", "g"),
            ("grad", "gradient", "g"),
        )
        known = {r: 0 for r in PARAMETERS if f"d{r}" in self.gradients}
        own = {plain(name): value for name, value in vars(layer).items()}
        for grads in (own.get("grads"), own.get("gradients")):
            if isinstance(grads, dict):
                for name, value in grads.items():
                    if isinstance(name, str) and role_of(name, known) == role:
                        return value
            elif isinstance(grads, list) and isinstance(own.get("params"), list):
                for parameter, value in zip(own["params"], grads, strict=False):
                    if np.array_equal(parameter, self.values.get(role, np.nan)):
                        return value
        for holder in _holders(layer):
            for name, value in holder.items():
                own = getattr(value, "__dict__", {})
                if isinstance(name, str) and role_of(name, known) == role and "grad" in own:
                    return own["grad"]
                short = plain(str(name))
                stems = [short.removeprefix(p) for p in prefixes if short.startswith(p)]
                stems += [short.removesuffix(s) for s in suffixes if short.endswith(s)]
                if value is not None and any(stem in NAMES[role] for stem in stems):
                    return value
        return None

    def _gradients(self, result: Any) -> dict[str, Any] | list[Any]:
        if result is None:
            raise BadResultError("returned None from backward")
        if isinstance(result, Mapping):
            named = {}
            for key, value in result.items():
                short = plain(str(key)).removeprefix("grad").removeprefix("d")
                role = role_of(short, {g.removeprefix("d"): 0 for g in self.gradients})
                if role is not None:
                    named[f"d{role}"] = value
            return named
        return list(result) if isinstance(result, (tuple, list)) else [result]


def _is_list(value: Any) -> bool:
    """Return whether a value is an array, or a list, of at least one dimension."""
    return isinstance(value, np.ndarray | list) and np.ndim(value) > 0


def _holders(layer: Any) -> list[dict[Any, Any]]:
    """Return the dictionaries in which a layer may store arrays.

    These are the attributes of the layer, the attributes of its parts, and its own dictionaries.
    """
    others = np.ndarray | type | types.ModuleType | types.FunctionType
    values = list(vars(layer).values())
    parts = [vars(v) for v in values if hasattr(v, "__dict__") and not isinstance(v, others)]
    return [vars(layer), *parts, *[v for v in values if isinstance(v, dict)]]


def _positional(function: Callable[..., Any]) -> list[str]:
    """Return the names of the positional arguments without a default, in their order."""
    return [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
