"""The record that a conversion leaves with its output: what it holds, every tensor's hash."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixtral_ms.checkpoint.formats.tensor_writer import FileEntry
from mixtral_ms.checkpoint.shards.rank_files import is_rank_name
from mixtral_ms.checkpoint.store.manifest import (
    FILES_SHAPE,
    MANIFEST,
    DamagedManifestError,
    file_entry,
    leaves,
    read_manifest,
    verify_file,
)
from mixtral_ms.errors import UserError
from mixtral_ms.json_reader import read_json_object, require_shape

FOLDER_RECORD = "conversion.json"
"""In a folder for Hugging Face; one of our checkpoints has it all in state.json and manifest."""
RECORD_SUFFIX = ".json"
"""`mixtral.ckpt.json` stands beside `mixtral.ckpt`."""
FORMAT_KEY, FILES_KEY = "weights_format", "files"
SOURCE_KEY = "converted_from"
"""The path of what was converted."""
OTHERS_KEY = "huggingface"
"""What stood in Hugging Face's files of the source, and has no key here."""
_PROBLEMS_SHOWN = 5


def record_path(path: Path) -> Path:
    """Where the record of a file, or of a folder, lies."""
    return path / FOLDER_RECORD if path.is_dir() else path.with_name(path.name + RECORD_SUFFIX)


def recorded_entries(record: Path) -> dict[Path, FileEntry] | None:
    """What a record says of each file; None where it says nothing, or is no record of ours.

    Raises:
        UserError: the record is damaged.
    """
    data = read_json_object(record)
    if FORMAT_KEY not in data or not data.get(FILES_KEY):
        return None
    files = data[FILES_KEY]
    require_shape(files, FILES_SHAPE, f"{record} is damaged: {FILES_KEY}")
    return _entries(record, files)


def _entries(record: Path, files: Mapping[str, Any]) -> dict[Path, FileEntry]:
    if record.name != FOLDER_RECORD:  # of the one file beside it, whatever that is called now
        (entry,) = list(files.values())[:1]
        return {record.with_name(record.name.removesuffix(RECORD_SUFFIX)): file_entry(entry)}
    if outside := next(filter(leaves, files), None):
        raise UserError(f"{record} is damaged: {outside!r} lies outside of its folder")
    return {record.parent / name: file_entry(entry) for name, entry in files.items()}


def recorded_problems(path: Path) -> list[str] | None:
    """What differs from a record's hashes, one line each; None where there is no record.

    Args:
        path: the file, or the folder, that the record is of.

    Raises:
        UserError: the record is damaged.
    """
    record = record_path(path)
    entries = recorded_entries(record) if record.is_file() else _manifest_entries(path)
    if entries is None:
        return None
    return [line for file, entry in entries.items() for line in verify_file(file, entry)]


def _manifest_entries(path: Path) -> dict[Path, FileEntry] | None:
    """What a checkpoint's manifest says of one of its ranks' folders, or of a file in one."""
    checkpoint = (path if path.is_dir() else path.parent).parent
    rank = path if path.is_dir() else path.parent
    if not is_rank_name(rank.name) or not (checkpoint / MANIFEST).is_file():
        return None
    try:
        manifest = read_manifest(checkpoint)
    except DamagedManifestError as error:
        raise UserError(f"{checkpoint}: {error}") from error
    files = {checkpoint / name: entry for name, entry in manifest.files.items()}
    return {file: entry for file, entry in files.items() if path in (file, file.parent)} or None


def require_as_recorded(path: Path) -> None:
    """Refuse what was written by a conversion and has changed since; reads all of it.

    Raises:
        UserError: file, tensor and record are named.
    """
    if problems := recorded_problems(path):
        raise record_error(path, problems)


def record_error(path: Path, problems: list[str]) -> UserError:
    """What says that a file, or a folder, is not what its record describes."""
    record = record_path(path)
    if not record.is_file():
        return UserError(
            f"{path} is not what the manifest of its checkpoint describes: {'; '.join(problems)}"
        )
    more = len(problems) - _PROBLEMS_SHOWN
    return UserError(
        f"{path} is not what {record.name} beside it describes: "
        + "; ".join(problems[:_PROBLEMS_SHOWN])
        + (f"; and {more} more" if more > 0 else "")
        + f". Convert, or fetch, it again; if other weights were put there on purpose, move "
        f"{record} away: what it says of the network is of the former ones"
    )
