"""The quick start's text: real English, one part to train on and one held back.

Writes train.jsonl and held_back.jsonl, one document a line. Without --text the documents are the
topics of Python's reference manual, which every Python carries in pydoc_data.topics.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from mixtral_ms.cli.support.exit_status import run_command
from mixtral_ms.errors import UserError
from mixtral_ms.files import write_aside

HELD_BACK_EVERY = 10
_DOCUMENT_CHARACTERS = 4000
_LEAST_DOCUMENTS = 2 * HELD_BACK_EVERY


def python_reference() -> list[str]:
    """The topics of Python's reference manual, in the order of their names."""
    from pydoc_data.topics import topics  # noqa: PLC0415 - 700 KB that --text does not need

    return [topics[name] for name in sorted(topics)]


def documents_of(path: Path) -> list[str]:
    """A text file's paragraphs, joined to documents of some thousand characters.

    Raises UserError for a file that cannot be read or holds too little text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {path}: not readable as UTF-8 text: {error}") from error
    documents, held = [], ""
    for paragraph in paragraphs_of(text):
        held = f"{held}\n\n{paragraph}" if held else paragraph
        if len(held) >= _DOCUMENT_CHARACTERS:
            documents.append(held)
            held = ""
    documents += [held] if held else []
    if len(documents) < _LEAST_DOCUMENTS:
        needed = _LEAST_DOCUMENTS * _DOCUMENT_CHARACTERS
        raise UserError(
            f"--text {path}: {len(text):,} characters with {len(documents)} parts between blank "
            f"lines; training needs about {needed:,} characters or more"
        )
    return documents


def paragraphs_of(text: str) -> list[str]:
    """What stands between blank lines."""
    return [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]


def without_repeats(documents: Iterable[str]) -> list[str]:
    """The documents with each paragraph where it comes first only.

    The manual's topics quote each other; held-back text that training saw would measure nothing.
    """
    seen: set[str] = set()
    kept = []
    for text in documents:
        fresh = []
        for paragraph in paragraphs_of(text):
            words = " ".join(paragraph.split())  # a quotation may be indented otherwise
            if words not in seen:
                seen.add(words)
                fresh.append(paragraph)
        kept += ["\n\n".join(fresh)] if fresh else []
    return kept


def split(documents: Iterable[str]) -> tuple[list[str], list[str]]:
    """(training documents, held-back documents): every tenth is held back, no paragraph in both."""
    kept = without_repeats(documents)
    train = [text for i, text in enumerate(kept, 1) if i % HELD_BACK_EVERY]
    return train, kept[HELD_BACK_EVERY - 1 :: HELD_BACK_EVERY]


def _write(path: Path, documents: Iterable[str]) -> None:
    with write_aside(path) as aside:
        lines = (json.dumps({"text": text}, ensure_ascii=False) for text in documents)
        aside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def main(argv: Sequence[str]) -> int:
    """Write the two files and say what is in them."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write to")
    parser.add_argument("--text", type=Path, help="UTF-8 text with blank lines (default: manual)")
    args = parser.parse_args(argv)
    train, held_back = split(documents_of(args.text) if args.text else python_reference())
    for name, documents in (("train", train), ("held_back", held_back)):
        path = args.output_dir / f"{name}.jsonl"
        _write(path, documents)
        size = sum(map(len, documents))
        print(f"{path}: {len(documents):,} documents, {size:,} characters")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
