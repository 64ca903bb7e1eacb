"""Text out of files: pieces of documents, decoded in blocks, with errors that name the place."""

import codecs
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from mixtral_ms.file_kind import not_utf8, require_text
from mixtral_ms.log import get_logger

BLOCK_BYTES = 1 << 20
LONG_TEXT = 1 << 20
"""Characters above which a document is handed on in pieces, to keep memory flat."""

Advance = Callable[[int], None]
"""Told how many bytes of input were just used up."""


class DocumentPart(NamedTuple):
    """A document, or a part of one; the parts of a document are joined by one space."""

    text: str
    starts: bool
    ends: bool


def read_text_blocks(path: Path, advance: Advance) -> Iterator[str]:
    r"""Decode a UTF-8 file block by block; a byte order mark is dropped, \r\n becomes \n.

    Raises UserError with the file and the byte offset where it is not UTF-8, and for what is no
    text though it could be read as such.
    """
    if (doubt := require_text(path)) is not None:
        get_logger().warning("%s", doubt)
    decoder = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    offset = 0
    with open(path, "rb") as file:
        while True:
            block = file.read(BLOCK_BYTES)
            last = not block
            if offset == 0 and block.startswith(codecs.BOM_UTF8):
                block = block[len(codecs.BOM_UTF8) :]
                offset = len(codecs.BOM_UTF8)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=last)
            except UnicodeDecodeError as error:
                raise not_utf8(path, offset - pending + error.start, error) from error
            yield newlines.decode(text, final=last)
            if last:
                return
            offset += len(block)
            advance(len(block))
