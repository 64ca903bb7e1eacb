"""MindFormers' transform_ckpt.py: cut a checkpoint for other devices, or merge it. See --help."""

import sys
from pathlib import Path

# Works from a checkout without installation, whatever the current folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mixtral_ms.cli.commands.transform import command  # noqa: E402

if __name__ == "__main__":
    sys.exit(command())
