"""Generated text on its way to the user."""

import sys

from mixtral_ms.printable import without_controls


def show(text: str) -> None:
    """Print a piece of text at once, without a line end.

    A terminal does not get control characters: a network may generate any, and some would move
    the cursor or change the terminal's settings.
    """
    print(without_controls(text) if sys.stdout.isatty() else text, end="", flush=True)
