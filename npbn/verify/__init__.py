"""Check gradients: those of npbn, and those of other people's code.

- `npbn.verify.check_gradients` checks whether a backward pass computes the gradient of a forward
  pass. The check works for any pair of array functions. If the forward pass works for complex
  numbers, the check uses the complex step, which is the most accurate numeric derivative.
- `npbn.verify.check_model` checks the gradients of the loss of a whole network.
- `npbn.verify.check_torch` and `npbn.verify.check_jax` check the gradients of a function that is
  written with PyTorch or JAX.
- `npbn.verify.complex_step` and `npbn.verify.central_difference` compute numeric derivatives. They
  only evaluate the function.
- `npbn.verify.examine_file` finds the mistake in a file of homework. It compares the results of the
  homework with those of code that has a mistake of the catalogue `npbn.verify.mutants`.
"""

from npbn.verify.checker import Finding, Report, check_gradients
from npbn.verify.examination import Examination
from npbn.verify.libraries import check_jax, check_torch
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
    "check_jax",
    "check_model",
    "check_torch",
    "complex_step",
    "examine_file",
]
