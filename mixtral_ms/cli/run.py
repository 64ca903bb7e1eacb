"""`run`: train, evaluate and predict from a YAML."""

import sys
from collections.abc import Sequence

from mixtral_ms.cli.describe import describe
from mixtral_ms.cli.main_guard import run_command
from mixtral_ms.cli.run_options import load_from_args, parse_args
from mixtral_ms.config.checks import check_config
from mixtral_ms.config.render import render_config
from mixtral_ms.errors import UserError

_SIGNAL_STATUS = 128  # a shell's status of a process that a signal ended


def main(argv: Sequence[str]) -> int:
    """The command; returns the exit status. Raises UserError for bad input."""
    args = parse_args(argv)
    config = load_from_args(args)
    if args.print_config:
        print(render_config(config))
        return 0
    if args.check_config:
        check_config(config, world_size=None, needs_paths=False)
        print(describe(config))
        return 0
    if config.run_mode == "finetune":
        raise UserError("run_mode finetune is not part of this version; train, eval, predict are")
    # MindSpore takes seconds to import: looking at a configuration should not wait for it.
    if config.run_mode == "predict":
        from mixtral_ms.cli.predict import run_predict  # noqa: PLC0415

        return run_predict(config)
    from mixtral_ms.train.trainer import Trainer  # noqa: PLC0415

    trainer = Trainer(config)
    if config.run_mode == "eval":
        result = trainer.evaluate()
        print(f"loss {result.loss:.6f} perplexity {result.perplexity:.6f} tokens {result.tokens}")
        return 0
    outcome = trainer.train()
    return 0 if outcome.signal_number is None else _SIGNAL_STATUS + outcome.signal_number


def command() -> int:
    """Entry point of the launcher."""
    return run_command(main, sys.argv[1:])
