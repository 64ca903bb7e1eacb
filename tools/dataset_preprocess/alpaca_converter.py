"""MindFormers' alpaca_converter.py: Alpaca rows to conversations. See --help."""

import sys
from pathlib import Path

# Works from a checkout without installation, whatever the current folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mixtral_ms.cli.commands.alpaca import command  # noqa: E402

if __name__ == "__main__":
    sys.exit(command())
