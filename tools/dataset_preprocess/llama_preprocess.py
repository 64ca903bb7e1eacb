"""MindFormers' llama_preprocess.py: text and conversations to MindRecord. See --help."""

import sys
from pathlib import Path

# Works from a checkout without installation, whatever the current folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mixtral_ms.cli.commands.preprocess import command  # noqa: E402

if __name__ == "__main__":
    sys.exit(command())
