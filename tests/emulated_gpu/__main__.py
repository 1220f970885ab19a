"""python -m emulated_gpu SCRIPT ARGUMENTS: run a program whose CuPy has an emulated GPU."""

import runpy
import sys
from pathlib import Path

import emulated_gpu

emulated_gpu.install()
del sys.argv[0]
sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
runpy.run_path(sys.argv[0], run_name="__main__")
