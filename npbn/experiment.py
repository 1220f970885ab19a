"""Experiments: a configuration, what it stands for, and a run's folder back to a model.

    import npbn

    data = npbn.data.load("digits")
    training = npbn.train(npbn.models.LeNet(), data, epochs=3, on_epoch=print)
    print(training.best)

`Config` says what is trained on what and how. `build_training` makes a `npbn.training.Training` of
it, with the engine that fits; `load` gives the model of a run's folder back.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from npbn import backend, data, engine, inspection, layers, models, optim, runs
from npbn.data import Dataset
from npbn.engine.layers import LayersEngine
from npbn.errors import CheckpointError, DataError, UnsupportedError
from npbn.training import Epoch, Training, steps_per_epoch

FORMAT = 2
"""The format of a configuration in JSON. Format 1 had no number."""


LARGEST = sys.float_info.max


@dataclass(frozen=True)
class Check:
    """The values that a field of `Config` may have.

    Attributes:
        description: completes "expected ".
        type: of its values; an int will do for a float.
        holds: whether a value of that type is allowed.
        choices: all values that are allowed, if they can be listed.
    """

    description: str
    type: type
    holds: Callable[[Any], bool] = lambda value: True
    choices: tuple[str, ...] | None = None

    def __call__(self, value: Any) -> bool:
        """Whether a value is allowed."""
        allowed = (int, float) if self.type is float else (self.type,)
        if type(value) not in allowed or (self.type is float and not abs(value) <= LARGEST):
            return False
        return value in self.choices if self.choices else self.holds(value)


def integer(minimum: int) -> Check:
    return Check(f"an integer >= {minimum}", int, lambda value: bool(value >= minimum))


def one_of(*choices: str) -> Check:
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
    """A field of `Config`; with the default None, None is allowed as well."""
    return dataclasses.field(default=default, metadata={"check": check})


@dataclass(frozen=True)
class Config:
    """A model, its data and its training. ``npbn train --help`` explains the options.

    The last three follow from the data; a model needs them to predict without the data.

    Raises:
        ValueError: a value is not allowed; the message names the field.
    """

    backend: str = option("auto", one_of(*backend.NAMES))
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
        """Return what JSON can hold, with the number of the format."""
        return {"format": FORMAT} | dataclasses.asdict(self) | {"classes": list(self.classes)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Config:
        """Return the configuration that `to_json` has written.

        Raises:
            ValueError: it is of another format, lacks a field, or has one that is not allowed.
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
        """Return the configuration with what follows from the data: model, classes, sizes.

        Raises:
            DataError: no model takes such images.
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
    """Return the data set, with no more training examples than the configuration allows."""
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
    """Return the model of a fitted configuration, with initial weights from ``generator``."""
    options: dict[str, Any] = {
        "batch_norm": not config.no_batch_norm,
        "activation": layers.ACTIVATIONS[config.activation],
        "generator": generator,
    }
    if config.model == "lenet":
        return models.LeNet(**options)
    assert config.channels is not None and config.side is not None
    return models.BLeNet(config.channels, config.side, len(config.classes), **options)


def build_schedule(config: Config, steps: int) -> optim.Schedule:
    """Return the learning rate as a function of the step; an epoch has ``steps`` steps."""
    if config.schedule == "step":
        return optim.StepDecay(config.lr, (config.lr_epochs or 3) * steps, config.lr_factor or 0.1)
    if config.schedule == "cosine":
        return optim.Cosine(config.lr, config.epochs * steps)
    return optim.Constant(config.lr)


def build_training(
    config: Config,
    dataset: Dataset,
    device: backend.Backend,
    *,
    model: layers.Sequential | None = None,
    report: Callable[[str], None] | None = None,
    fallback: bool = False,
) -> Training:
    """Return model, optimizer, data and engine on ``device``, at the start of the training.

    Args:
        config: a fitted one, unless there is a model.
        dataset: what to train and to test on.
        device: from `npbn.backend.get_backend`.
        model: what to train, in place of what the configuration names; it is moved to the device.
        report: called with lines to show while kernels are compiled.
        fallback: whether layers do where the fused engine is wanted and cannot.

    Raises:
        UnsupportedError: the fused engine is wanted and cannot.
    """
    model = model or build_model(config, np.random.default_rng(config.seed))
    model.to(device, config.dtype)
    optimizer = optim.SGD(
        model.parameters(),
        build_schedule(config, steps_per_epoch(len(dataset.train), config.batch_size)),
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    what = model, optimizer, dataset.train.to(device), dataset.test.to(device)
    how: dict[str, Any] = {"batch_size": config.batch_size, "backend": device}
    try:
        chosen = engine.build(config.engine, *what, threads=config.threads, report=report, **how)
    except UnsupportedError as error:
        if not fallback:
            raise
        chosen = LayersEngine(*what, reason=str(error), **how)
    return Training(*what, engine=chosen, seed=config.seed, precise_bn=config.precise_bn, **how)


def train(
    model: layers.Sequential,
    dataset: Dataset,
    *,
    on_epoch: Callable[[Epoch], None] | None = None,
    **options: Any,
) -> Training:
    """Train a model of yours on data of yours, with the engine that fits.

    Args:
        model: it is moved to the backend, and trained in place.
        dataset: from `npbn.data`.
        on_epoch: called after each epoch with what it found, `print` for instance.
        options: fields of `Config` (epochs=10, lr=1.0, batch_size=256, seed=0, momentum=0, …);
            the seed is that of the order of the examples.

    Returns:
        The training at its end: ``best`` is the best test accuracy, ``run(epochs=…)`` goes on.

    Raises:
        ValueError, TypeError: an option is not allowed, or model and data do not fit.
        NpbnError: something on this machine is not as needed, or the loss became NaN.
    """
    config = Config(**options)
    device = backend.get_backend(config.backend)
    training = build_training(config, dataset, device, model=model)
    training.run(
        config.epochs,
        max_steps=config.max_steps or math.inf,
        eval_every=config.eval_every,
        target_accuracy=config.target_accuracy or math.inf,
        on_epoch=on_epoch,
    )
    return training


# A run's folder, back to what it stands for.


def open_run(path: str | os.PathLike[str]) -> tuple[runs.Run, Config]:
    """Return the run in a folder, and its configuration.

    Raises:
        CheckpointError: it is no run, or its configuration is damaged or of another npbn.
    """
    run = runs.Run.open(path)
    try:
        return run, Config.from_json(run.config)
    except ValueError as error:
        raise CheckpointError(f"{run.path / 'config.json'}: {error}") from None


def load_training(
    run: runs.Run, config: Config, dataset: Dataset, device: backend.Backend, **options: Any
) -> tuple[Training, dict[str, Any]]:
    """Return what a run had come to, and the record of its last checkpoint.

    Args:
        run, dataset, device: where it is, on what it trains, and where.
        config: the run's, perhaps with another engine or number of threads.
        options: of `build_training`.

    Raises:
        CheckpointError: the checkpoint is damaged, or does not fit the configuration.
    """
    arrays, record = run.load()
    training = build_training(config, dataset, device, fallback=True, **options)
    try:
        training.load_state(arrays, record)
    except (ValueError, TypeError, KeyError) as error:
        raise _misfit(run, "last", error) from None
    return training, record


@dataclass(frozen=True)
class Loaded:
    """A model of a run, in prediction mode on the CPU, and what belongs to it.

    Attributes:
        run: where it is from.
        model: it takes images / 255, (N, channels, side, side), in ``config.dtype``.
        config: that of the run: ``classes``, ``channels``, ``side`` among others.
        epoch: after which it was saved.
    """

    run: runs.Run
    model: layers.Sequential
    config: Config
    epoch: int

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Return the probability of each class, (N, classes), for uint8 images (N, C, H, W).

        Raises:
            ValueError, TypeError: images of another shape or dtype.
        """
        channels, side = self.config.channels, self.config.side
        if images.shape[1:] != (channels, side, side):
            raise ValueError(
                f"expected images of shape (N, {channels}, {side}, {side}), got {images.shape}"
            )
        split = data.Split(images, np.zeros(len(images), np.int64))
        return inspection.probabilities(self.model, split, dtype=self.config.dtype)


def load(path: str | os.PathLike[str], which: str | None = None) -> Loaded:
    """Return the model of the run in a folder.

    Args:
        path: the folder.
        which: "last" or "best" checkpoint; None is the best, or the last as long as nothing was
            evaluated.

    Raises:
        CheckpointError: there is no run, or something in it is damaged.
    """
    run, config = open_run(path)
    which = which or ("best" if os.path.exists(run.path / "best.safetensors") else "last")
    arrays, record = run.load(which)
    prefix = "model."
    state = {n.removeprefix(prefix): v for n, v in arrays.items() if n.startswith(prefix)}
    try:
        model = build_model(config, np.random.default_rng(0))
        model.to(backend.get_backend("numpy"), config.dtype)
        model.load_state_dict(state)
        epoch = int(record["epoch"])
    except (ValueError, TypeError, KeyError) as error:
        raise _misfit(run, which, error) from None
    model.eval()
    return Loaded(run, model, config, epoch)


def _misfit(run: runs.Run, which: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{run.path / which}.safetensors does not fit {run.path / 'config.json'}: {error}"
    )
