"""One logger, one line per fact, rank 0 only by default."""

import logging
import os
import sys
from typing import TextIO

from mixtral_ms.printable import printable_block

LOGGER_NAME = "mixtral_ms"


def rank_from_environment() -> int:
    """Rank of this process among several as msrun sets it; else 0, whatever RANK_ID was left over.

    What is no number is left to whoever needs it to say so: the log should not fail.
    """
    try:
        several = int(os.environ.get("MS_WORKER_NUM", "1")) > 1
        return int(os.environ.get("RANK_ID", "0")) if several else 0
    except ValueError:
        return 0


class _ToStderr(logging.StreamHandler):
    """Writes to what sys.stderr is at that moment, which notebooks replace."""

    @property
    def stream(self) -> TextIO:
        """Not kept from the first use, whose stream may be closed by now."""
        return sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        """For StreamHandler's own __init__."""


class _OneMessage(logging.Formatter):
    """Lets no name or text in a message look like a message of its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return printable_block(super().formatMessage(record))


def get_logger() -> logging.Logger:
    """The package's logger, set up on first use to write plain lines to stderr."""
    logger = logging.getLogger(LOGGER_NAME)
    if not logger.handlers:
        handler = _ToStderr()
        handler.setFormatter(_OneMessage("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False
        logger.setLevel(logging.INFO if rank_from_environment() == 0 else logging.WARNING)
    return logger
