"""Generated text on its way to the user."""

import sys

_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def show(text: str) -> None:
    """Print a piece of text at once, without a line end.

    A terminal does not get control characters: a network may generate any, and some would move
    the cursor or change the terminal's settings.
    """
    print(text.translate(_CONTROLS) if sys.stdout.isatty() else text, end="", flush=True)
