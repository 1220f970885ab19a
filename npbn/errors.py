"""The errors that a caller would want to catch; everything else is a ValueError or TypeError."""

from __future__ import annotations


class NpbnError(Exception):
    """Something outside the program is not as needed; the message says what, and what to do."""


class BackendError(NpbnError):
    """The array library asked for cannot be used on this machine, or its device failed."""


class DataError(NpbnError):
    """A data set cannot be found, or is not what it should be."""


class CheckpointError(NpbnError):
    """A checkpoint or a run cannot be read or written, or is not what it should be."""


class SubmissionError(NpbnError):
    """A submission could not be examined because of the request: a wrong file or function name."""


class NonFiniteError(NpbnError):
    """Training came to NaN or infinite numbers."""


class UnsupportedError(NpbnError):
    """A fused engine cannot train a model, or cannot run on this machine; layers can."""
