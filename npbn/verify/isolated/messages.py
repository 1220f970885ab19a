"""Send values and arrays through a pipe, and read them without trusting the sender.

A message is a JSON value and arrays by name. It is sent as

    the length of the text, the length of the arrays    two 8-byte integers
    the text: {"value": …, "arrays": [[name, dtype, shape], …]}
    the bytes of the arrays, one after another

The reader checks the lengths, the names, the dtypes and the shapes before it makes an array.
Nothing is unpickled.
"""

from __future__ import annotations

import json
import math
import os
import re
import select
import struct
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

MOST_TEXT = 10**6
MOST_BYTES = 10**8
_LENGTHS = struct.Struct("<QQ")
_DTYPE = re.compile(r"[<>|=]?[biufc]\d{1,2}")
"""The dtypes that are accepted: booleans, integers, and real and complex numbers."""

Message = tuple[Any, dict[str, np.ndarray]]
"""A value for JSON, and arrays by name."""


class MessageError(Exception):
    """The error that is raised if a pipe ends, or contains bytes that are no message."""


def send(descriptor: int, value: Any, arrays: Mapping[str, np.ndarray] | None = None) -> None:
    """Write a message to a file descriptor. The arrays are of numbers or booleans."""
    # NumPy's ascontiguousarray would turn a number into an array of one element.
    whole = {name: np.asarray(array, order="C") for name, array in (arrays or {}).items()}
    listed = [[name, array.dtype.str, array.shape] for name, array in whole.items()]
    text = json.dumps({"value": value, "arrays": listed}).encode()
    body = b"".join(array.tobytes() for array in whole.values())
    content = memoryview(_LENGTHS.pack(len(text), len(body)) + text + body)
    while content:
        content = content[os.write(descriptor, content) :]


def receive(descriptor: int, seconds: float = math.inf) -> Message:
    """Read a message from a file descriptor.

    Raises:
        MessageError: the pipe ended, or contains bytes that are no message.
        TimeoutError: the message was not complete after this many seconds.
    """
    end = time.monotonic() + seconds
    text_length, length = _LENGTHS.unpack(_read(descriptor, _LENGTHS.size, end))
    if text_length > MOST_TEXT or length > MOST_BYTES:
        raise MessageError("too long")
    try:
        header = json.loads(_read(descriptor, text_length, end))
        value, listed = header["value"], header["arrays"]
        body, arrays, start = _read(descriptor, length, end), {}, 0
        for name, dtype, shape in listed:
            if not _DTYPE.fullmatch(dtype):
                raise MessageError(f"the dtype {dtype}")
            if not all(type(size) is int and size >= 0 for size in shape):
                raise MessageError(f"the shape {shape}")
            kind = np.dtype(dtype)
            count = math.prod(shape)
            stop = start + count * kind.itemsize
            if stop > length:
                raise MessageError("too few bytes")
            found = np.frombuffer(body, kind, count, start)
            arrays[str(name)] = found.reshape(shape).astype(kind.newbyteorder("="))
            start = stop
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise MessageError(f"no message: {error}") from None
    return value, arrays


def _read(descriptor: int, length: int, end: float) -> bytes:
    """Return exactly ``length`` bytes."""
    found = bytearray()
    while len(found) < length:
        if end < math.inf:
            left = end - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                raise TimeoutError
        part = os.read(descriptor, min(length - len(found), 1 << 20))
        if not part:
            raise MessageError("the pipe ended")
        found += part
    return bytes(found)
