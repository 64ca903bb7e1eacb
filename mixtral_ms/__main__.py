"""`python -m mixtral_ms COMMAND`: every command of the suite."""

import importlib
import sys

from mixtral_ms.cli.main_guard import run_command

COMMANDS = {
    "run": ("mixtral_ms.cli.run", "train, evaluate or predict from a YAML"),
    "complete": ("mixtral_ms.cli.complete", "prompts and their answers as framed examples"),
    "chat": ("mixtral_ms.cli.chat", "talk to an instruction-tuned model"),
    "preprocess": ("mixtral_ms.cli.preprocess", "text and conversations to MindRecord"),
    "alpaca": ("mixtral_ms.cli.alpaca", "Alpaca rows to conversations"),
    "transform": ("mixtral_ms.cli.transform", "cut a checkpoint for other devices, or merge it"),
    "plan": ("mixtral_ms.cli.plan", "rank grids that fit a cluster, and why others do not"),
    "inspect": ("mixtral_ms.cli.inspect", "what a checkpoint holds, and what is wrong with it"),
    "convert": ("mixtral_ms.cli.convert", "weights between formats"),
}


def main() -> int:
    """Dispatch to a command's `main`."""
    names = sys.argv[1:2]
    if not names or names[0] in ("-h", "--help"):
        print("usage: python -m mixtral_ms COMMAND [--help]\n\ncommands:")
        for name, (_, text) in COMMANDS.items():
            print(f"  {name:12} {text}")
        print("\nexample:\n  python -m mixtral_ms run --help")
        return 0
    if names[0] not in COMMANDS:
        print(f"error: no command {names[0]!r}: there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module = importlib.import_module(COMMANDS[names[0]][0])
    return run_command(module.main, sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
