"""Prompts from the command line, from files and from standard input."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from mixtral_ms.errors import UserError

STDIN = "-"
_JSON_LINES = ".jsonl"
_SUFFIXES = (".txt", _JSON_LINES)


def read_prompts(given: str | Sequence[str] | None, flag: str = "--predict_data") -> list[str]:
    """All prompts that were given, in order.

    Args:
        given: texts; names of files with a prompt a line, or, if .jsonl, an object with "prompt" a
            line; "-" for standard input, a prompt a line. Empty lines are left out.
        flag: with which they were given.

    Raises:
        UserError: there is no prompt, or a file is absent or not as said.
    """
    items = [given] if isinstance(given, str) else list(given or ())
    prompts = [prompt for item in items for prompt in _prompts_of(item, flag)]
    if not prompts:
        raise UserError(
            f"no prompt: set {flag} to a text, several, a file with one a line, or - for standard "
            "input"
        )
    return prompts


def _prompts_of(item: str, flag: str) -> Iterator[str]:
    if item == STDIN:
        yield from _lines(_stdin(flag))
    elif _is_file(item):
        yield from _of_file(Path(item), flag)
    elif item.endswith(_SUFFIXES) and not any(map(str.isspace, item)):
        raise UserError(f"{flag}: file does not exist: {item}")
    elif item:
        yield item


def _stdin(flag: str) -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {STDIN}: the input is not UTF-8 text: {error}") from None


def _is_file(item: str) -> bool:
    try:
        return Path(item).is_file()
    except (OSError, ValueError):  # longer than a name can be, or with a NUL: a text
        return False


def _of_file(path: Path, flag: str) -> Iterator[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag}: {path} cannot be read as UTF-8 text: {error}") from None
    if path.suffix != _JSON_LINES:
        yield from _lines(text)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _json_prompt(line, f"{flag}: {path}:{number}")


def _json_prompt(line: str, where: str) -> str:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: is not JSON: {error}") from None
    prompt = entry.get("prompt") if isinstance(entry, dict) else None
    if not isinstance(prompt, str) or not prompt:
        raise UserError(f'{where}: must be an object with a text "prompt", not empty')
    return prompt


def _lines(text: str) -> Iterator[str]:
    # Only line ends end a prompt; str.splitlines knows ten more characters.
    for line in text.split("\n"):
        if stripped := line.removesuffix("\r"):
            yield stripped
