"""MindFormers' launcher name for `python -m mixtral_ms run`."""

import sys

from mixtral_ms.cli.commands.run import command

if __name__ == "__main__":
    sys.exit(command())
