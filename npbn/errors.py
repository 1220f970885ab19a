"""Define the errors that a caller may want to catch. Other errors are ValueError or TypeError."""

from __future__ import annotations


class NpbnError(Exception):
    """Something outside of the program is missing or wrong. The message says what to do."""


class BackendError(NpbnError):
    """The chosen array library cannot be used on this machine, or its device failed."""


class DataError(NpbnError):
    """A data set is missing, or its files are damaged, wrong or in another format."""


class CheckpointError(NpbnError):
    """A checkpoint or a run cannot be read or written, is damaged, or is another than expected."""


class RunExistsError(CheckpointError):
    """A new run was to be created in a folder that exists."""


class SubmissionError(NpbnError):
    """A submission could not be examined, because the request names a wrong file or function."""


class NonFiniteError(NpbnError):
    """A number became NaN or infinite during training."""


class UnsupportedError(NpbnError):
    """A fused engine cannot train this model or cannot run on this machine. The layers can."""


class DistributedError(NpbnError):
    """The processes of a training cannot work together."""
