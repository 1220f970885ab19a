"""Judge a pair of functions in npbn's signature, without a file and without a process."""

from __future__ import annotations

import numpy as np

from npbn.verify.examination import Examination, Facts, Ran, examine, outputs
from npbn.verify.operations import probes

SEED = 2015


def results(operation, forward, backward) -> dict[str, Ran]:
    """What two functions give on every probe, or how they fail."""
    found = {}
    for probe in probes(operation, SEED):
        try:
            with np.errstate(all="ignore"):
                found[probe.name] = Ran(outputs(operation, (forward, backward), probe, SEED))
        except Exception as error:
            found[probe.name] = Ran(failure=f"raised {type(error).__name__}: {error}")
    return found


def judged(operation, forward, backward, beyond=None) -> Examination:
    """The examination, where nothing is beyond what is asked."""
    taken = {name: None for probe in probes(operation, SEED) for name in probe.arguments}
    found = results(operation, forward, backward)
    return examine(operation, found, Facts(taken=taken), SEED, beyond or {})
