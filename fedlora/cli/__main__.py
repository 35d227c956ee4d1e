"""``python -m fedlora.cli``: the command ``fedlora``."""

from fedlora.cli import main

main()
