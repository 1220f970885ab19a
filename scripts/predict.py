"""Classify images with the network of a run: the command ``npbn predict``."""

from _command_line import start

if __name__ == "__main__":
    start("predict", "predict.py")
