"""Documents of WikiText's wiki.*.tokens, and of any plain text with blank lines.

A document is what stands between blank lines, without headings (` = Title = `), as MindFormers'
llama_preprocess has it: WikiText writes all paragraphs of a section on consecutive lines, so a
document is the body of a section. WikiText's spacing around punctuation is undone in the same way,
but section by section: a quotation mark without a partner changes its own section only.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from mixtral_ms.data.readers.text_blocks import LONG_TEXT, Advance, DocumentPart, read_text_blocks
from mixtral_ms.data.tokenizer.tokenizer import split_at_spaces
from mixtral_ms.errors import UserError

_MAX_PARAGRAPH = 1 << 26
_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")

# In this order: later pairs see what earlier ones left. The first of the three is a character that
# many texts lack, and looking for one character is ten times as fast as looking for three.
_SPACING_BEFORE_PAIRS = (
    ("'", "s '", "s'"),
    ("@", " @-@ ", "-"),
    ("@", " @,@ ", ","),
    ("@", " @.@ ", "."),
    *((mark, f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
)
_PAIRS = ("()", "[]", "{}", '""', "''")
_SPACING_AFTER_PAIRS = (
    ("=", "= = = =", "===="),
    ("=", "= = =", "==="),
    ("=", "= =", "=="),
    ("\u00b0", " \u00b0 ", "\u00b0"),
    ("\n", " \n", "\n"),
    ("\n", "\n ", "\n"),
    ("N", " N ", " 1 "),
    ("'", " 's", "'s"),
)


def read_wiki(
    path: Path, advance: Advance, *, clean: bool, split_long: bool
) -> Iterator[DocumentPart]:
    """Documents of one file, read in blocks.

    Args:
        path: UTF-8 text.
        advance: told of the bytes as they are read.
        clean: undo WikiText's spacing and drop headings; False keeps the text as it is.
        split_long: a document beyond LONG_TEXT characters may come in several pieces.
    """
    starts = True
    for paragraph, ends in _paragraphs(read_text_blocks(path, advance), split_long):
        text = paragraph
        if clean:
            text = _without_headings(text) if starts else text
            # The spaces at both ends are WikiText's own: a last " . " needs the one behind it.
            text = clean_wikitext(f" {text} ").strip(" ")
        if text or not (starts and ends):
            yield DocumentPart(text, starts, ends)
        starts = ends


def clean_wikitext(text: str) -> str:
    """Undo WikiText's tokenization: spaces around punctuation, inside brackets and quotes."""
    text = _replace_all(text, _SPACING_BEFORE_PAIRS)
    for opening, closing in map(tuple, _PAIRS):
        if opening in text:
            text = _strip_inside(text, opening, closing)
    return _replace_all(text, _SPACING_AFTER_PAIRS)


def _replace_all(text: str, replacements: Iterable[tuple[str, str, str]]) -> str:
    for hint, old, new in replacements:
        if hint in text:
            text = text.replace(old, new)
    return text


def _strip_inside(text: str, opening: str, closing: str) -> str:
    """Drop white space just inside each pair; linear in the text whatever it holds."""
    parts: list[str] = []
    done = 0
    while (start := text.find(opening, done)) >= 0:
        end = text.find(closing, start + 1)
        if end < 0:
            break
        parts += (text[done:start], opening, text[start + 1 : end].strip(), closing)
        done = end + 1
    return "".join((*parts, text[done:])) if parts else text


def _without_headings(paragraph: str) -> str:
    """The paragraph without heading lines at its top."""
    while paragraph.startswith("="):
        line, _, rest = paragraph.partition("\n")
        if len(line) < 2 or not line.rstrip().endswith("="):
            break
        paragraph = rest.strip()
    return paragraph


def _paragraphs(blocks: Iterator[str], split_long: bool) -> Iterator[tuple[str, bool]]:
    """Stripped paragraphs and whether each ends there (False: more of it follows)."""
    held = ""
    begun = False
    for block in blocks:
        *whole, held = _BLANK_LINES.split(held + block)
        for paragraph in whole:
            yield from _end_of_paragraph(paragraph, begun)
            begun = False
        if split_long and len(held) > LONG_TEXT:
            *parts, held = split_at_spaces(held if begun else held.lstrip(), LONG_TEXT)
            for part in parts:
                yield part, False
                begun = True
        if len(held) > _MAX_PARAGRAPH:
            raise UserError(
                f"a paragraph is longer than {_MAX_PARAGRAPH} characters and cannot be split at "
                "spaces; is the input text, with blank lines between its documents?"
            )
    yield from _end_of_paragraph(held, begun)


def _end_of_paragraph(text: str, begun: bool) -> Iterator[tuple[str, bool]]:
    text = text.rstrip() if begun else text.strip()
    if text or begun:
        yield text, True
