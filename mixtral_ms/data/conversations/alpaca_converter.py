"""Alpaca rows to conversations, as MindFormers' alpaca_converter.py writes them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from mixtral_ms.data.conversations.parse_conversation import read_alpaca_row
from mixtral_ms.data.readers.json_and_parquet import read_rows
from mixtral_ms.data.readers.json_rows import Row
from mixtral_ms.data.readers.row_log import UnfitRowError
from mixtral_ms.errors import UserError
from mixtral_ms.file_kind import require_file
from mixtral_ms.files import new_file, not_an_input, require_absent
from mixtral_ms.progress import progress_bar


@dataclass
class AlpacaSummary:
    """What was read and written.

    Attributes:
        written: conversations.
        bad: rows left out, in words.
        shortened: rows of which something is left out, in words.
    """

    written: int = 0
    bad: list[str] = field(default_factory=list)
    shortened: list[str] = field(default_factory=list)


def convert_alpaca(
    data_path: str | Path,
    output_path: str | Path,
    *,
    skip_bad_rows: bool = False,
    overwrite: bool = False,
) -> AlpacaSummary:
    """Write a JSON list of conversations with ids "1", "2", ...; memory stays flat.

    Args:
        data_path: JSON or JSON Lines with instruction, input (may be absent) and output.
        output_path: the list to write.
        skip_bad_rows: leave out rows without instruction or output.
        overwrite: replace an existing output.

    Raises UserError for an existing output, a file that cannot be read, and, naming all of them,
    rows without instruction or output; then nothing is written.
    """
    source, target = Path(data_path), Path(output_path)
    require_file(source, "--data_path")
    require_absent(target, overwrite)
    not_an_input(target, "--output_path", [("--data_path", str(source))])
    summary = AlpacaSummary()
    with new_file(target, overwrite=overwrite) as aside, open(aside, "w", encoding="utf-8") as file:
        with progress_bar(source.stat().st_size, "convert", "B", scale=True) as bar:
            _write_list(_conversations(read_rows(source, bar.update), summary), file)
        if summary.bad and not skip_bad_rows:
            raise _bad_rows(source, summary.bad)
        if not summary.written:
            raise UserError(f"{source} has no usable row{_listed(summary.bad)}")
    return summary


def _conversations(rows: Iterator[Row], summary: AlpacaSummary) -> Iterator[dict[str, Any]]:
    for row in rows:
        try:
            found = read_alpaca_row(row.value)
        except UnfitRowError as error:
            summary.bad.append(f"row {row.number}: {error}")
            continue
        if found.shortened:
            summary.shortened.append(f"row {row.number}: {found.shortened}")
        summary.written += 1
        ((prompt, output),) = found.rounds
        turns = [{"from": "system", "value": found.system}] if found.system else []
        turns += [{"from": "human", "value": prompt}, {"from": "gpt", "value": output}]
        yield {"id": str(summary.written), "conversations": turns}


def _write_list(items: Iterator[dict[str, Any]], file: IO[str]) -> None:
    """A JSON list, one item at a time, indented as json.dump(..., indent=2) does."""
    separator = "[\n"
    for item in items:
        text = json.dumps(item, ensure_ascii=False, indent=2)
        file.write(separator + "\n".join(f"  {line}" for line in text.split("\n")))
        separator = ",\n"
    file.write("\n]")


def _bad_rows(source: Path, bad: list[str]) -> UserError:
    return UserError(
        f"{len(bad)} row{'s' if len(bad) > 1 else ''} of {source} (counted from 0) cannot be used; "
        f"mend them, or give --skip_bad_rows to leave them out{_listed(bad)}"
    )


def _listed(bad: list[str]) -> str:
    return "".join(f"\n  {one}" for one in bad)
