"""Prompts from the command line, from files and from standard input."""

import os
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from mixtral_ms.errors import UserError
from mixtral_ms.file_kind import kind_of, not_as_wanted, not_utf8
from mixtral_ms.json_reader import decode_json
from mixtral_ms.log import get_logger

STDIN = "-"
_JSON_LINES = ".jsonl"
_OTHERS = (".json", ".csv", ".tsv", ".parquet", ".arrow", ".yaml", ".yml", ".gz", ".zst")
"""Not lines of text that are prompts."""
_SUFFIXES = (".txt", ".md", _JSON_LINES, *_OTHERS)
_BOM = "\ufeff"


def read_prompts(given: str | Sequence[str] | None, flag: str = "--predict_data") -> list[str]:
    """All prompts that were given, in order.

    Args:
        given: texts; names of files or pipes with a prompt a line, or, if .jsonl, an object with
            "prompt" a line; "-" for standard input, a prompt a line. Empty lines are left out.
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
    elif _is_file(item, flag):
        yield from _of_file(Path(item), flag)
    elif item:
        if item.lower().endswith(_SUFFIXES):
            if not any(map(str.isspace, item)):
                raise UserError(f"{flag}: file does not exist: {item}")
            get_logger().warning("%s %r is a prompt's text: there is no such file", flag, item)
        yield item


def _stdin(flag: str) -> str:
    try:
        return sys.stdin.read().removeprefix(_BOM)
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {STDIN}: the input is not UTF-8 text: {error}") from None


def _is_file(item: str, flag: str) -> bool:
    """Whether there is a file or pipe to read; UserError for what is there and can be neither."""
    try:
        mode = os.stat(item).st_mode
    except (OSError, ValueError):  # longer than a name can be, or with a NUL: a text
        if os.path.islink(item):
            raise UserError(f"{flag}: {item} is a link to what does not exist") from None
        return False
    if stat.S_ISDIR(mode):
        raise UserError(f"{flag}: {item} is a folder: name its files, or put the text into a file")
    if not stat.S_ISREG(mode) and not stat.S_ISFIFO(mode):
        raise UserError(f"{flag}: {item} is a device or socket, not a file of prompts")
    return True


def _of_file(path: Path, flag: str) -> Iterator[str]:
    text = _text_of(path, flag)
    if path.suffix.lower() != _JSON_LINES:
        yield from _lines(text)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _json_prompt(line, f"{flag}: {path}:{number}")


def _text_of(path: Path, flag: str) -> str:
    wanted = "prompts as text, one a line, or JSON lines (.jsonl)"
    # A pipe's beginning can be looked at only once.
    if path.is_file() and (kind := kind_of(path)) is not None:
        raise UserError(f"{flag}: {not_as_wanted(path, wanted, kind.name)}")
    if path.suffix.lower() in _OTHERS:
        raise UserError(f"{flag}: {path} has another format: give {wanted}")
    try:
        return path.read_bytes().decode().removeprefix(_BOM)
    except OSError as error:
        raise UserError(f"{flag}: {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{flag}: {not_utf8(path, error.start, error)}") from None


def _json_prompt(line: str, where: str) -> str:
    try:
        entry = decode_json(line, row=True)  # half a character spoils its own prompt alone
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
