"""Define the configuration of a training, build the training from it, and load finished runs.

    import npbn

    data = npbn.data.load("digits")
    training = npbn.train(npbn.models.LeNet(), data, epochs=3, on_epoch=print)
    print(training.best)

A `Config` names the model, the data and the settings of a training. `build_training` makes a
`npbn.training.Training` from it and chooses the engine. `load` returns the trained model of a run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from npbn import __version__, data, engine, inspection, layers, models, optim, runs
from npbn.backend import NAMES, Backend, get_backend
from npbn.data import Dataset
from npbn.distributed import ALONE, Group, agree, join
from npbn.errors import CheckpointError, DataError
from npbn.training import Epoch, Training, steps_per_epoch

FORMAT = 2
"""The number of the format of a configuration in JSON. Files of format 1 contain no number."""
LARGEST = sys.float_info.max


@dataclass(frozen=True)
class Check:
    """The rule for the values of one field of `Config`.

    Attributes:
        description: the allowed values in words, to follow "expected " in a message.
        type: the type of the values. If the type is float, an int is allowed as well.
        holds: a function that returns whether a value of this type is allowed.
        choices: the list of all allowed values, or None if they cannot be listed.
    """

    description: str
    type: type
    holds: Callable[[Any], bool] = lambda value: True
    choices: tuple[str, ...] | None = None

    def __call__(self, value: Any) -> bool:
        """Return whether a value is allowed."""
        allowed = (int, float) if self.type is float else (self.type,)
        if type(value) not in allowed or (self.type is float and not abs(value) <= LARGEST):
            return False
        return value in self.choices if self.choices else self.holds(value)


def integer(minimum: int) -> Check:
    """Return the rule for integers of at least ``minimum``."""
    return Check(f"an integer >= {minimum}", int, lambda value: bool(value >= minimum))


def one_of(*choices: str) -> Check:
    """Return the rule for one of these texts."""
    return Check(f"one of {', '.join(choices)}", str, choices=choices)


FLAG = Check("true or false", bool)
TEXT = Check("a text", str)
POSITIVE = Check("a number > 0", float, lambda value: bool(value > 0))
SHARE = Check("a number in (0, 1]", float, lambda value: bool(0 < value <= 1))
PART = Check("a number in (0, 1)", float, lambda value: bool(0 < value < 1))
COLOURS = Check("1 or 3", int, lambda value: value in (1, 3))
FRACTION = Check("a number in [0, 1)", float, lambda value: bool(0 <= value < 1))
NOT_NEGATIVE = Check("a number >= 0", float, lambda value: bool(value >= 0))


def option(default: Any, check: Check) -> Any:
    """Return a field of `Config` with a rule. If the default is None, None is allowed as well."""
    return dataclasses.field(default=default, metadata={"check": check})


@dataclass(frozen=True)
class Config:
    """The configuration of a training: its model, its data, its optimizer and its engine.

    The fields are the options of ``npbn train``; ``npbn train --help`` explains each of them. The
    fields ``channels``, ``side`` and ``classes`` follow from the data. They are stored because a
    model that was loaded needs them to predict without the data.

    Raises:
        ValueError: a value is not allowed. The message names the field.
    """

    backend: str = option("auto", one_of(*NAMES))
    engine: str = option("auto", one_of(*engine.KINDS))
    threads: int | None = option(None, integer(1))
    dtype: str = option("float32", one_of("float32", "float64"))
    dataset: str = option("auto", one_of(*data.DATASETS))
    data: str | None = option(None, TEXT)
    channels: int | None = option(None, COLOURS)
    side: int | None = option(None, integer(1))
    test_fraction: float | None = option(None, PART)
    limit_train: int | None = option(None, integer(2))
    model: str = option("auto", one_of("auto", "lenet", "blenet"))
    no_batch_norm: bool = option(False, FLAG)
    activation: str = option("sigmoid", one_of(*layers.ACTIVATIONS))
    epochs: int = option(10, integer(1))
    batch_size: int = option(256, integer(1))
    lr: float = option(1.0, POSITIVE)
    schedule: str = option("constant", one_of("constant", "step", "cosine"))
    lr_epochs: int | None = option(None, integer(1))
    lr_factor: float | None = option(None, SHARE)
    momentum: float = option(0.0, FRACTION)
    weight_decay: float = option(0.0, NOT_NEGATIVE)
    max_steps: int | None = option(None, integer(1))
    target_accuracy: float | None = option(None, SHARE)
    eval_every: int = option(1, integer(1))
    precise_bn: bool = option(False, FLAG)
    seed: int = option(0, integer(0))
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, check = getattr(self, field.name), field.metadata.get("check")
            if check is not None and not (value is None is field.default) and not check(value):
                raise ValueError(f"{field.name}: expected {check.description}, got {value!r}")
        if not all(type(name) is str for name in self.classes):
            raise ValueError(f"classes: expected the names of the classes, got {self.classes!r}")
        if self.schedule != "step" and (self.lr_epochs or self.lr_factor):
            raise ValueError("lr_epochs, lr_factor: expected schedule step with these")

    def to_json(self) -> dict[str, Any]:
        """Return the fields and the number of the format, as values that JSON can hold."""
        return {"format": FORMAT} | dataclasses.asdict(self) | {"classes": list(self.classes)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Config:
        """Return the configuration that `to_json` has written.

        Raises:
            ValueError: the format number is not `FORMAT` (another version of npbn wrote the
                configuration), a field is missing or unknown, or a value is not allowed.
        """
        if values.get("format") != FORMAT:
            raise ValueError(
                f"format: expected {FORMAT}, got {values.get('format')}: another version of npbn "
                "has written this"
            )
        names = [field.name for field in dataclasses.fields(cls)]
        for name in (*names, *values):
            if (name in values) != (name in names) and name != "format":
                raise ValueError(f"{name}: {'missing' if name in names else 'no such field'}")
        if not isinstance(values["classes"], list):
            raise ValueError(f"classes: expected a list, got {values['classes']!r}")
        return cls(**{name: values[name] for name in names} | {"classes": tuple(values["classes"])})

    def fitted(self, dataset: Dataset) -> Config:
        """Return a copy whose model, classes, channels and side are those of a data set.

        Raises:
            DataError: no model can be trained on images of this size.
        """
        _, channels, height, width = dataset.train.images.shape
        size = f"images of {height} × {width}"
        if height != width:
            raise DataError(f"{size}: expected square ones")
        known = (channels, height, len(dataset.classes)) == (1, 28, 10)
        model = self.model if self.model != "auto" else "lenet" if known else "blenet"
        if model == "lenet" and not known:
            raise DataError(
                f"{size}, {channels} channels, {len(dataset.classes)} classes: LeNet takes images "
                "of 28 × 28, 1 channel, 10 classes; BLeNet takes others"
            )
        if height % 4 or height < 12:
            half = height / 2
            raise DataError(
                f"{size}: BLeNet halves {height} → {half:g}, takes 4 off → {half - 4:g}, halves → "
                f"{(half - 4) / 2:g}; expected a multiple of 4, at least 12, such as "
                f"{max(12, height // 4 * 4)} or {max(16, height // 4 * 4 + 4)}"
            )
        return dataclasses.replace(
            self,
            dataset=dataset.key,
            model=model,
            channels=channels,
            side=height,
            classes=tuple(dataset.classes),
        )


def load_data(config: Config, on_download: Callable[[str], None] | None = None) -> Dataset:
    """Return the data set of a configuration, with at most ``limit_train`` training examples."""
    options: dict[str, Any] = {}
    if config.dataset == "folder":
        options = {name: getattr(config, name) for name in ("channels", "side", "test_fraction")}
        options["seed"] = config.seed
    dataset = data.load(config.dataset, config.data, on_download=on_download, **options)
    if config.limit_train is None:
        return dataset
    if config.limit_train > len(dataset.train):
        raise DataError(
            f"expected at most {len(dataset.train):,} training examples, as many as there are, "
            f"got {config.limit_train}"
        )
    return dataset.limited(config.limit_train)


def build_model(config: Config, generator: np.random.Generator) -> layers.Sequential:
    """Return the model of a fitted configuration; ``generator`` draws its initial weights.

    Raises:
        ValueError: the configuration is not fitted, or its model takes no such images.
    """
    options: dict[str, Any] = {
        "batch_norm": not config.no_batch_norm,
        "activation": layers.ACTIVATIONS[config.activation],
        "generator": generator,
    }
    if config.channels is None or config.side is None or len(config.classes) < 2:
        raise ValueError("channels, side, classes: missing; expected a fitted configuration")
    if config.model == "lenet":
        if (config.channels, config.side, len(config.classes)) != (1, 28, 10):
            raise ValueError("LeNet takes images of 28 × 28, 1 channel, 10 classes")
        return models.LeNet(**options)
    return models.BLeNet(config.channels, config.side, len(config.classes), **options)


def build_schedule(config: Config, steps: int) -> optim.Schedule:
    """Return the learning rate as a function of the step, where an epoch has ``steps`` steps."""
    if config.schedule == "step":
        return optim.StepDecay(config.lr, (config.lr_epochs or 3) * steps, config.lr_factor or 0.1)
    if config.schedule == "cosine":
        end = config.epochs * steps
        return optim.Cosine(config.lr, min(end, config.max_steps or end))
    return optim.Constant(config.lr)


def build_training(
    config: Config,
    dataset: Dataset,
    device: Backend,
    *,
    model: layers.Sequential | None = None,
    report: Callable[[str], None] | None = None,
    fallback: bool = False,
    group: Group = ALONE,
) -> Training:
    """Return a training at its start: model, optimizer, data and engine on ``device``.

    Args:
        config: the configuration. If ``model`` is None, the configuration must be fitted to the
            data (`Config.fitted`).
        dataset: the data set to train and to test on.
        device: the backend, from `npbn.backend.get_backend`.
        model: a model to train instead of the model that the configuration names. The model is
            moved to the device.
        report: a function that is called with lines to show to the user while kernels are compiled.
        fallback: whether to train by layers if the configuration asks for the fused engine and the
            fused engine cannot train this model.
        group: the processes that train together. By default, this process is alone.

    Raises:
        UnsupportedError: the configuration asks for the fused engine, which cannot train this
            model, and ``fallback`` is false.
        DistributedError: the ranks of the group have different versions, configurations or data.
    """
    agree(group, lambda: _facts(config, dataset))
    model = model or build_model(config, np.random.default_rng(config.seed))
    model.to(device, config.dtype)
    optimizer = optim.SGD(
        model.parameters(),
        build_schedule(config, steps_per_epoch(len(dataset.train), config.batch_size)),
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    what = model, optimizer, dataset.train.to(device), dataset.test.to(device)
    how: dict[str, Any] = {"batch_size": config.batch_size, "backend": device, "group": group}
    kind = "auto" if fallback and config.engine == "fused" else config.engine
    chosen = engine.build(kind, *what, threads=config.threads, report=report, **how)
    return Training(*what, engine=chosen, seed=config.seed, precise_bn=config.precise_bn, **how)


def _facts(config: Config, dataset: Dataset) -> dict[str, str]:
    """Return what must be equal on all ranks: versions, and digests of configuration and data."""
    modules = (name for name in ("numpy", "numba") if importlib.util.find_spec(name))
    facts = {name: importlib.metadata.version(name) for name in modules}
    shared = dataclasses.replace(config, data=None, threads=None).to_json()
    facts["configuration"] = hashlib.sha256(repr(sorted(shared.items())).encode()).hexdigest()
    digest = hashlib.sha256()
    for split in (dataset.train, dataset.test):
        for array in (split.images, split.labels):
            digest.update(repr(array.shape).encode())
            digest.update(np.ascontiguousarray(array).data)
    versions = {"npbn": __version__, "Python": platform.python_version()}
    return versions | facts | {"data": digest.hexdigest()}


def train(
    model: layers.Sequential,
    dataset: Dataset,
    *,
    epochs: int = Config.epochs,
    lr: float = Config.lr,
    batch_size: int = Config.batch_size,
    seed: int = Config.seed,
    momentum: float = Config.momentum,
    weight_decay: float = Config.weight_decay,
    schedule: str = Config.schedule,
    dtype: str = Config.dtype,
    backend: str = Config.backend,
    engine: str = Config.engine,
    threads: int | None = Config.threads,
    on_epoch: Callable[[Epoch], None] | None = None,
    group: Group | None = None,
) -> Training:
    """Train a model on a data set and return the finished training.

    Args:
        model: the model. It is moved to the backend and trained in place.
        dataset: the data set, from `npbn.data`.
        epochs: the number of epochs.
        lr: the learning rate.
        batch_size: the number of examples in a batch.
        seed: the seed of the order of the examples.
        momentum, weight_decay: as in `npbn.optim.SGD`.
        schedule: "constant", "step" (a tenth of the learning rate after every third epoch) or
            "cosine".
        dtype: "float32" or "float64".
        backend: "auto", "numpy" or "cupy".
        engine: "auto", "layers" or "fused".
        threads: the number of threads of the fused engine on the CPU. By default, the number of
            CPUs that this process may use. For several trainings at the same time, use 1.
        on_epoch: a function that is called with the `npbn.training.Epoch` after each epoch, for
            instance ``print``.
        group: the processes that train this model together. By default, these are all processes
            that a launcher such as mpiexec has started (`npbn.distributed.join`). For a training of
            its own in each process, this is `npbn.distributed.ALONE`.

    Returns:
        The training. Its attribute ``best`` is the best test accuracy. Its method ``run(n)``
        trains on until the training has n epochs in all.

    Raises:
        ValueError, TypeError: an option is not allowed, or the model does not fit the data.
        NpbnError: this machine lacks something that the training needs, or the loss became NaN.
    """
    config = Config(
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        seed=seed,
        momentum=momentum,
        weight_decay=weight_decay,
        schedule=schedule,
        dtype=dtype,
        backend=backend,
        engine=engine,
        threads=threads,
    )
    device = get_backend(backend)
    training = build_training(config, dataset, device, model=model, group=group or join())
    training.run(epochs, on_epoch=on_epoch)
    return training


# Loading and comparing runs.


NOT_COMPARED = ("classes", "channels", "side", "data")
"""The fields of `Config` in which `differences` does not look."""


def differences(configs: Sequence[Config]) -> list[str]:
    """Return for each configuration the fields in which the configurations differ, as words.

    The words of a configuration are, for instance, "lr=0.5 seed=1".
    """
    names = [
        field.name
        for field in dataclasses.fields(Config)
        if field.name not in NOT_COMPARED
        and len({getattr(config, field.name) for config in configs}) > 1
    ]
    words = {
        ("no_batch_norm", True): "without batch norm",
        ("no_batch_norm", False): "with batch norm",
    }

    def word(name: str, value: Any) -> str:
        return words.get((name, value), f"{name}={value}")

    return [" ".join(word(name, getattr(config, name)) for name in names) for config in configs]


def open_run(path: str | os.PathLike[str]) -> tuple[runs.Run, Config]:
    """Return the run in a folder and its configuration.

    Raises:
        CheckpointError: the folder contains no run, or the configuration is damaged or was written
            by another version of npbn.
    """
    run = runs.Run.open(path)
    try:
        return run, Config.from_json(run.config)
    except ValueError as error:
        raise CheckpointError(f"{run.path / 'config.json'}: {error}") from None


def load_training(
    run: runs.Run,
    config: Config,
    dataset: Dataset,
    device: Backend,
    *,
    report: Callable[[str], None] | None = None,
    group: Group = ALONE,
) -> tuple[Training, dict[str, Any]]:
    """Return the training of a run at its last checkpoint, and the record of this checkpoint.

    Args:
        run: the run.
        config: the configuration of the run; the engine and the number of threads may differ.
        dataset, device, report, group: as in `build_training`. Rank 0 reads the checkpoint.

    Raises:
        CheckpointError: the checkpoint is damaged, or it does not fit the configuration.
    """
    arrays, record = group.broadcast(run.load)
    try:
        _check_numbers(arrays)
        check_images(config, dataset)
        training = build_training(
            config, dataset, device, report=report, fallback=True, group=group
        )
        training.load_state(arrays, record)
    except (ValueError, TypeError, KeyError) as error:
        raise _misfit(run, "last", error) from None
    return training, record


@dataclass(frozen=True)
class Loaded:
    """A trained model from a run, in prediction mode on the CPU.

    Attributes:
        run: the run that contains the model.
        model: the model. Its input has the shape (N, channels, side, side), the dtype
            ``config.dtype`` and values in [0, 1]: pixels / 255.
        config: the configuration of the run, which has ``classes``, ``channels`` and ``side``.
        epoch: the number of epochs after which the model was saved.
    """

    run: runs.Run
    model: layers.Sequential
    config: Config
    epoch: int

    def dataset(self) -> Dataset:
        """Return the data set of the run.

        Raises:
            DataError: the data set is missing, or it has other images than the model takes.
        """
        found = load_data(self.config)
        check_images(self.config, found)
        return found

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Return the probability of each class, (N, classes), for uint8 images (N, C, H, W).

        Raises:
            ValueError, TypeError: the images have another shape or dtype.
        """
        channels, side = self.config.channels, self.config.side
        if images.shape[1:] != (channels, side, side):
            raise ValueError(
                f"expected images of shape (N, {channels}, {side}, {side}), got {images.shape}"
            )
        split = data.Split(images, np.zeros(len(images), np.int64))
        return inspection.probabilities(self.model, split, dtype=self.config.dtype)


def load(path: str | os.PathLike[str], which: str | None = None) -> Loaded:
    """Return the trained model of the run in a folder.

    Args:
        path: the folder.
        which: the checkpoint, "last" or "best". The default is the best checkpoint, or the last one
            as long as nothing was evaluated.

    Raises:
        CheckpointError: the folder contains no run, or one of its files is damaged.
    """
    run, config = open_run(path)
    which = which or ("best" if os.path.exists(run.path / "best.safetensors") else "last")
    arrays, record = run.load(which)
    prefix = "model."
    state = {n.removeprefix(prefix): v for n, v in arrays.items() if n.startswith(prefix)}
    try:
        _check_numbers(arrays)
        model = build_model(config, np.random.default_rng(0))
        model.to(get_backend("numpy"), config.dtype)
        model.load_state_dict(state)
        epoch = int(record["epoch"])
    except (ValueError, TypeError, KeyError) as error:
        raise _misfit(run, which, error) from None
    model.eval()
    return Loaded(run, model, config, epoch)


def check_images(config: Config, dataset: Dataset) -> None:
    """Raise an error if a data set has other images or classes than a fitted configuration.

    Raises:
        DataError: they differ. The message gives the images and the classes of both.
    """
    _, channels, height, width = dataset.train.images.shape
    theirs, ours = (
        f"images of {rows} × {columns}, channels {channels}, in {classes} classes"
        for channels, rows, columns, classes in (
            (config.channels, config.side, config.side, len(config.classes)),
            (channels, height, width, len(dataset.classes)),
        )
    )
    if theirs != ours:
        raise DataError(f"the model takes {theirs}; the data has {ours}")


def _check_numbers(arrays: Mapping[str, np.ndarray]) -> None:
    """Raise an error if an array of a checkpoint has a number that no training gives.

    Raises:
        ValueError: an array contains NaN or infinity, or a variance is negative.
    """
    for name, array in arrays.items():
        if not np.all(np.isfinite(array)):
            raise ValueError(f"{name} contains NaN or infinity")
        if name.endswith(".moving_var") and np.any(array < 0):
            raise ValueError(f"{name} contains a negative variance")


def _misfit(run: runs.Run, which: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{run.path / which}.safetensors does not fit {run.path / 'config.json'}: {error}"
    )
