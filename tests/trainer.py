"""Trains as scripts/train.py does, as often as asked, in a process of its own each time.

Those processes are forked from this one, which has imported everything already: a training of a
second is not preceded by seconds of imports. Each line of standard input is a request in JSON,
each line of the output the answer; see ``commands.Trainer``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import sys

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, if in the background
from npbn import data
from npbn.commands import command_line, train

digits = data.load("digits")
digits = dataclasses.replace(
    digits, test=data.Split(digits.test.images[:100], digits.test.labels[:100])
)
load = data.load


@functools.wraps(load)
def load_at_once(name, directory=None, **options):
    return digits if (name, directory) == ("digits", None) else load(name, directory, **options)


data.load = load_at_once


def become(request: dict) -> None:
    """The process that was asked for."""
    os.chdir(request["cwd"])
    for descriptor, name in enumerate(("/dev/null", request["stdout"], request["stderr"])):
        flags = os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT
        os.dup2(os.open(name, flags), descriptor)
    exec(request["prelude"], {"__name__": "prelude"})
    sys.argv = ["train.py", *request["arguments"]]
    command_line.run("train.py", lambda: train.main("train.py", request["arguments"]))


for line in sys.stdin:
    child = os.fork()
    if child == 0:
        become(json.loads(line))
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
