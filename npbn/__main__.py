"""``python -m npbn`` is the command ``npbn``."""

from npbn.commands import main

if __name__ == "__main__":
    main()
