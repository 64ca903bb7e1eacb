"""Where a run's tokenizer.model lies."""

from pathlib import Path

from mixtral_ms.config.sections.run_section import RunConfig

TOKENIZER_FILE = "tokenizer.model"


def find_tokenizer(config: RunConfig) -> Path | None:
    """processor.tokenizer.vocab_file, else tokenizer.model in or beside load_checkpoint.

    A vocab_file that was named is returned whether it exists or not.
    """
    if named := config.processor.tokenizer.vocab_file:
        return Path(named)
    if not config.load_checkpoint:
        return None
    weights = Path(config.load_checkpoint)
    paths = (weights / TOKENIZER_FILE, weights.parent / TOKENIZER_FILE)
    return next((path for path in paths if path.is_file()), None)
