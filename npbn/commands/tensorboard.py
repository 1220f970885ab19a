"""Write the metrics of a training for TensorBoard. This needs the extra ``tensorboard``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from npbn.errors import NpbnError


def check_tensorboard() -> ModuleType:
    """Return the module tensorboardX.

    Raises:
        NpbnError: tensorboardX is not installed.
    """
    try:
        import tensorboardX
    except ImportError as error:
        raise NpbnError(
            f"--tensorboard: tensorboardX cannot be loaded ({error}): pip install tensorboardX"
        ) from None
    module: ModuleType = tensorboardX
    return module


class EventFile:
    """An event file of TensorBoard in the folder ``tensorboard`` of a run.

    Args:
        run: the folder of the run.
        epoch: the number of finished epochs. TensorBoard hides what was written about later epochs.
    """

    def __init__(self, run: Path, epoch: int) -> None:
        module = check_tensorboard()
        self._writer = module.SummaryWriter(str(run / "tensorboard"), purge_step=epoch + 1)

    def add(self, metrics: Mapping[str, Any], layers: Mapping[str, Any]) -> None:
        """Write the scalars of an epoch, and histograms of γ and β of each batch norm."""
        number = metrics["number"]
        self._writer.add_scalar("lr", metrics["lr"], number)
        for split in ("train", "test"):
            for quantity in ("loss", "accuracy") if metrics[split] else ():
                self._writer.add_scalar(f"{quantity}/{split}", metrics[split][quantity], number)
        for k, norm in enumerate(layers["batch_norm"], 1):
            for name, values in norm.items():
                self._writer.add_histogram(f"batch_norm_{k}/{name}", np.array(values), number)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
