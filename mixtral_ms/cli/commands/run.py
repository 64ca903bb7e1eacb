"""`run`: train, evaluate and predict from a YAML."""

import sys
from collections.abc import Sequence

from mixtral_ms.cli.support.exit_status import run_command
from mixtral_ms.cli.support.run_flags import load_from_args, looked_at, parse_args

_SIGNAL_STATUS = 128  # a shell's status of a process that a signal ended


def main(argv: Sequence[str]) -> int:
    """The command; returns the exit status. Raises UserError for bad input."""
    args = parse_args(argv)
    config = load_from_args(args)
    if looked_at(args, config):
        return 0
    # Looking at a configuration should not wait for the imports of what computes.
    if config.mode.answers:
        from mixtral_ms.cli.support.answers.predict_mode import run_predict  # noqa: PLC0415

        return run_predict(config, args.config)
    from mixtral_ms.train.trainer import Trainer  # noqa: PLC0415

    trainer = Trainer(config)
    if not config.mode.trains:
        result = trainer.evaluate()
        if trainer.mesh.rank:
            return 0  # the first rank prints for all
        print(f"loss {result.loss:.6f} perplexity {result.perplexity:.6f} tokens {result.tokens}")
        if (exact := result.exact_perplexity) is not None:
            print(_rounding_text(exact, result.perplexity, config.weight_dtype))
        return 0
    outcome = trainer.train()
    return 0 if outcome.signal_number is None else _SIGNAL_STATUS + outcome.signal_number


def _rounding_text(exact: float, rounded: float, dtype: str) -> str:
    change = 100 * (rounded / exact - 1)
    return f"perplexity {exact:.4f} -> {rounded:.4f} ({change:+.3f} %) with {dtype}"


def command() -> int:
    """Entry point of the launcher."""
    return run_command(main, sys.argv[1:])
