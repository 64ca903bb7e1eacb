"""`python -m mixtral_ms COMMAND`: every command of the suite."""

import importlib
import sys

from mixtral_ms.cli.support.exit_status import run_command

COMMANDS = {
    "run": "train, evaluate or predict from a YAML",
    "complete": "prompts and their answers as framed examples",
    "chat": "talk to an instruction-tuned model",
    "preprocess": "text and conversations to MindRecord",
    "alpaca": "Alpaca rows to conversations",
    "transform": "cut a checkpoint for other devices, or merge it",
    "plan": "rank grids that fit a cluster, and why others do not",
    "check-graphs": "an Ascend run's graphs, compiled without a device",
    "inspect": "what a checkpoint holds, and what is wrong with it",
    "convert": "weights between formats",
}
"""Files of cli/commands, with what each is for."""


def main() -> int:
    """Dispatch to a command's `main`."""
    names = sys.argv[1:2]
    if not names or names[0] in ("-h", "--help"):
        print("usage: python -m mixtral_ms COMMAND [--help]\n\ncommands:")
        for name, text in COMMANDS.items():
            print(f"  {name:14} {text}")
        print("\nexample:\n  python -m mixtral_ms run --help")
        return 0
    if names[0] not in COMMANDS:
        print(f"error: no command {names[0]!r}: there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"mixtral_ms.cli.commands.{names[0].replace('-', '_')}")
    return run_command(module.main, sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
