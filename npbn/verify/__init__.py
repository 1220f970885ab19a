"""Proof of gradients: npbn's own, and anybody's.

- `npbn.verify.check_gradients`: does a backward pass give the gradient of a forward pass? For any
  pair of array functions, by the complex step where the forward pass is fit for it.
- `npbn.verify.check_model`: the same for a whole network and its loss.
- `npbn.verify.complex_step`, `npbn.verify.central_difference`: derivatives by evaluation.
- `npbn.verify.examine_file`: which mistake is in this homework? It is compared with the catalogue
  `npbn.verify.mutants`.
"""

from npbn.verify.checker import Finding, Report, check_gradients
from npbn.verify.examination import Examination
from npbn.verify.model import check_model
from npbn.verify.numeric import central_difference, complex_step
from npbn.verify.operations import NotExaminedError
from npbn.verify.submission import examine_file

__all__ = [
    "Examination",
    "Finding",
    "NotExaminedError",
    "Report",
    "central_difference",
    "check_gradients",
    "check_model",
    "complex_step",
    "examine_file",
]
