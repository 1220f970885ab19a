"""Train LeNet with batch norm on Fashion-MNIST: the command ``npbn train``."""

from _command_line import start

if __name__ == "__main__":
    start("train", "train.py")
