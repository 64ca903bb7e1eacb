"""`python -m mixtral_ms COMMAND`: every command of the suite."""

import importlib
import sys
from collections.abc import Callable, Sequence

from mixtral_ms.cli.support.exit_status import run_command
from mixtral_ms.errors import UserError

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
    return run_command(_dispatch, sys.argv[1:])


def _dispatch(argv: Sequence[str]) -> int | None:
    names = argv[:1]
    if not names or names[0] in ("-h", "--help"):
        print("usage: python -m mixtral_ms COMMAND [--help]\n\ncommands:")
        for name, text in COMMANDS.items():
            print(f"  {name:14} {text}")
        print("\nexample:\n  python -m mixtral_ms run --help")
        return None
    if names[0] not in COMMANDS:
        raise UserError(f"no command {names[0]!r}: there are {', '.join(COMMANDS)}")
    module = importlib.import_module(f"mixtral_ms.cli.commands.{names[0].replace('-', '_')}")
    run: Callable[[Sequence[str]], int | None] = module.main
    return run(argv[1:])


if __name__ == "__main__":
    sys.exit(main())
