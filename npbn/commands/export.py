"""Write a run's model for PyTorch (FILE.safetensors) or for ONNX Runtime (FILE.onnx).

FILE.safetensors has the parameter names of a torch.nn.Sequential with modules in the order of
npbn's layers: sequential.load_state_dict(safetensors.torch.load_file(FILE)) loads the file. The
network in FILE.onnx takes float32 images, pixels / 255, of shape (N, channels, side, side), and
returns logits and classes.
"""

from __future__ import annotations

import argparse

from npbn import experiment
from npbn.checkpoint import export_torch, write_file
from npbn.commands.command_line import ArgumentParser, say
from npbn.errors import NpbnError
from npbn.runs import CHECKPOINTS


def parse_arguments(program: str, words: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog=program,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument("file", metavar="FILE", help="its name ends with .safetensors or .onnx")
    parser.add_argument(
        "--checkpoint",
        choices=CHECKPOINTS,
        help="whose model to use (default: best, or last as long as nothing was evaluated)",
    )
    arguments = parser.parse_args(words)
    if not arguments.file.endswith((".safetensors", ".onnx")):
        parser.error(f"expected a file name with .safetensors or .onnx, got {arguments.file}")
    return arguments


def main(program: str, words: list[str]) -> None:
    arguments = parse_arguments(program, words)
    loaded = experiment.load(arguments.run, arguments.checkpoint)
    if arguments.file.endswith(".safetensors"):
        export_torch(loaded.model, arguments.file)
    else:
        write_onnx(loaded, arguments.file)
    say(f"{arguments.file}: the model after epoch {loaded.epoch}")


def write_onnx(loaded: experiment.Loaded, path: str) -> None:
    try:
        from npbn.onnx_graph import onnx_graph
    except ImportError as error:
        raise NpbnError(f"the onnx package is needed ({error}): pip install onnx") from None
    channels, side = loaded.config.channels, loaded.config.side
    assert channels is not None and side is not None
    try:
        write_file(path, onnx_graph(loaded.model, (channels, side, side)))
    except OSError as error:
        raise NpbnError(f"{path} cannot be written: {error.strerror}") from None
