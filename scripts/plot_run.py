"""Draw runs: the command ``npbn plot``."""

from _command_line import start

if __name__ == "__main__":
    start("plot", "plot_run.py")
