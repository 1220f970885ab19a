"""Check gradients, npbn's or yours: the command ``npbn check``."""

from _command_line import start

if __name__ == "__main__":
    start("check", "check_gradients.py")
