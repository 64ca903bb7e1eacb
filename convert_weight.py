"""MindFormers' convert_weight.py: weights between PyTorch and MindSpore. See --help."""

import sys
from pathlib import Path

# Works from a checkout without installation, whatever the current folder.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from mixtral_ms.cli.commands.convert import command  # noqa: E402

if __name__ == "__main__":
    sys.exit(command())
