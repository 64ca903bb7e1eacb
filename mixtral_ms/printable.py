"""Text of files and users as a log, a report or a terminal may show it: nothing in it acts."""

import re
import shlex

# What acts instead of being shown: C0 and C1, half characters, and what turns the direction of
# writing or ends a line in some programs.
_C0 = "\x00-\x1f"
_OTHERS = "\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_IN_A_LINE = re.compile(f"[{_C0}{_OTHERS}]")
_IN_LINES = re.compile(f"[\x00-\x08\x0b-\x1f{_OTHERS}]")
# Colours and a progress bar's returns are our own.
_IN_A_TERMINAL = re.compile(
    f"\x1b(?!\\[[0-9;]*m|\\[A)|[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f{_OTHERS}]"
)


def printable(text: object) -> str:
    """One line: whatever would act on a terminal, a line end too, is written as an escape."""
    return _IN_A_LINE.sub(_escape, str(text))


def printable_block(text: object) -> str:
    """Lines, of which each but the first is indented, so that none looks like another message."""
    first, *others = _IN_LINES.sub(_escape, str(text)).split("\n")
    indented = (f"  {line}" if line and not line.startswith(" ") else line for line in others)
    return "\n".join([first, *indented])


def for_terminal(text: str) -> str:
    """Lines and colours as they are; what would move the cursor or change a setting is escaped."""
    return _IN_A_TERMINAL.sub(_escape, text)


def without_controls(text: str) -> str:
    """Lines of generated text, for a terminal: a network may generate anything."""
    return _IN_LINES.sub("", text)


def shell_word(text: object) -> str:
    """A name in a command that a message offers: one word to a shell, whatever is in it."""
    return printable(shlex.quote(str(text)))


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")
