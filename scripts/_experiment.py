"""What the options of train.py stand for: from a run's configuration to what is trained."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from _command_line import say
from npbn import data, layers, models, optim, training
from npbn.backend import Backend, get_backend
from npbn.engine import build
from npbn.engine.layers import LayersEngine
from npbn.errors import CheckpointError, NpbnError, UnsupportedError
from npbn.runs import Run

ACTIVATIONS = {"sigmoid": layers.Sigmoid, "relu": layers.ReLU}


def load_data(config: Mapping[str, Any], **options: Any) -> data.Dataset:
    """The data set, with no more training examples than asked for."""
    dataset = data.load(config["dataset"], config["data"], **options)
    limit = config["limit_train"]
    if limit is None:
        return dataset
    if limit > len(dataset.train):
        raise NpbnError(f"--limit-train {limit}: there are {len(dataset.train):,} examples")
    return dataset.limited(limit)


def build_model(config: Mapping[str, Any], generator: np.random.Generator) -> layers.Sequential:
    options: dict[str, Any] = {
        "batch_norm": not config["no_batch_norm"],
        "activation": ACTIVATIONS[config["activation"]],
        "generator": generator,
    }
    if config["model"] == "lenet":
        return models.LeNet(**options)
    return models.BLeNet(config["channels"], config["side"], len(config["classes"]), **options)


def build_schedule(config: Mapping[str, Any], steps_per_epoch: int) -> optim.Schedule:
    if config["schedule"] == "step":
        every = config["lr_epochs"] * steps_per_epoch
        return optim.StepDecay(config["lr"], every, config["lr_factor"])
    if config["schedule"] == "cosine":
        return optim.Cosine(config["lr"], config["epochs"] * steps_per_epoch)
    return optim.Constant(config["lr"])


def build_training(
    config: Mapping[str, Any], dataset: data.Dataset, device: Backend, *, fallback: bool = False
) -> training.Training:
    """Model, optimizer, data and engine on ``device``, at the start of the run.

    Args:
        fallback: whether layers do where the fused engine is wanted and cannot.

    Raises:
        UnsupportedError: the fused engine is wanted and cannot.
    """
    model = build_model(config, np.random.default_rng(config["seed"]))
    model.to(device, config["dtype"])
    steps_per_epoch = training.steps_per_epoch(len(dataset.train), config["batch_size"])
    optimizer = optim.SGD(
        model.parameters(),
        build_schedule(config, steps_per_epoch),
        momentum=config["momentum"],
        weight_decay=config["weight_decay"],
    )
    train, test = dataset.train.to(device), dataset.test.to(device)
    what = model, optimizer, train, test
    how: dict[str, Any] = {"batch_size": config["batch_size"], "backend": device}
    try:
        engine = build(config["engine"], *what, threads=config["threads"], report=say, **how)
    except UnsupportedError as error:
        if not fallback:
            raise
        engine = LayersEngine(*what, reason=str(error), **how)
    return training.Training(
        *what,
        engine=engine,
        seed=config["seed"],
        **how,
        precise_bn=config["precise_bn"],
    )


def load_training(
    run: Run, dataset: data.Dataset, device: Backend, **changes: Any
) -> tuple[training.Training, dict[str, Any]]:
    """What a run had come to, and the record of its last checkpoint.

    Args:
        changes: configuration overrides for the rest of the run.
    """
    arrays, record = run.load()
    state = build_training(run.config | changes, dataset, device, fallback=True)
    try:
        state.load_state(arrays, record)
    except (ValueError, TypeError, KeyError) as error:
        raise _misfit(run, "last", error) from None
    return state, record


def load_model(run: Run, which: str | None) -> tuple[layers.Sequential, dict[str, Any]]:
    """A run's model on the CPU, in prediction mode, and the record of its checkpoint.

    Args:
        run: to load from.
        which: "last" or "best"; None is the best, or the last as long as nothing was evaluated.
    """
    which = which or ("best" if os.path.exists(run.path / "best.safetensors") else "last")
    arrays, record = run.load(which)
    prefix = "model."
    state = {n.removeprefix(prefix): v for n, v in arrays.items() if n.startswith(prefix)}
    try:
        model = build_model(run.config, np.random.default_rng(0))
        model.to(get_backend("numpy"), run.config["dtype"])
        model.load_state_dict(state)
    except (ValueError, TypeError, KeyError) as error:
        raise _misfit(run, which, error) from None
    model.eval()
    return model, record


def _misfit(run: Run, which: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{run.path / which}.safetensors does not fit {run.path / 'config.json'}: {error}"
    )
