"""Where a conversion's output goes: what it may replace, and how it comes there whole."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mixtral_ms.checkpoint.formats.file_formats import (
    SAFETENSORS,
    SAFETENSORS_INDEX,
    FileFormat,
    format_of,
    written_suffixes,
)
from mixtral_ms.checkpoint.formats.tensor_writer import FileEntry
from mixtral_ms.checkpoint.store.conversion_record import FOLDER_RECORD, RECORD_SUFFIX
from mixtral_ms.checkpoint.store.folders import put_in_place, restore_moved
from mixtral_ms.checkpoint.store.manifest import STATE, Manifest, write_manifest
from mixtral_ms.convert.formats.foreign_config import CONFIG_JSON, GENERATION_JSON
from mixtral_ms.convert.formats.found_weights import TOKENIZER_FILE
from mixtral_ms.convert.job.output_record import file_hashes
from mixtral_ms.errors import UserError
from mixtral_ms.file_kind import kind_of, not_as_wanted
from mixtral_ms.files import fsync_path

OutputKind = Literal["huggingface", "checkpoint", "file"]
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_OWN_NAMES = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|rank_0|manifest\.(json|sha256)|"
    + "|".join(
        re.escape(one)
        for one in (
            SAFETENSORS_INDEX,
            GENERATION_JSON,
            CONFIG_JSON,
            FOLDER_RECORD,
            STATE,
            *TOKENIZER_FILES,
        )
    )
)
_ARRAY_FILES = (".npz",)  # a name that looks like a file of weights, and is none that is known


@dataclass(frozen=True)
class Destination:
    """The output a user named.

    Attributes:
        path: of the file or folder.
        kind: a folder for transformers, a checkpoint folder of ours, or one file for MindSpore.
        file_format: of the files of tensors.
    """

    path: Path
    kind: OutputKind
    file_format: FileFormat = SAFETENSORS

    @property
    def file_pattern(self) -> str:
        """Names of the files of tensors, with {shard}."""
        if self.kind == "file":
            return self.path.name
        name = "model{shard}" if self.kind == "huggingface" else "rank_0/model"
        return name + SAFETENSORS.suffix


def destination(path: Path, flag: str, huggingface: bool) -> Destination:
    """What an output path means.

    Raises:
        UserError: a file is named where Hugging Face's format needs a folder, or a file of
            another kind.
    """
    written = written_suffixes()
    if huggingface:
        if path.suffix in written:
            raise UserError(f"{flag}: {path} is a file's name; Hugging Face's format is a folder")
        return Destination(path, "huggingface")
    named = format_of(path)
    if named and path.suffix in written:
        return Destination(path, "file", named)
    if named or path.suffix in _ARRAY_FILES:
        raise UserError(
            f"{flag}: {path}: weights for MindSpore are {', '.join(written)} or a folder"
        )
    return Destination(path, "checkpoint")


def require_free(target: Destination, source: Path, flag: str, overwrite: bool) -> None:
    """Check that nothing is lost when the target is put in place.

    Raises:
        UserError: there is something and `overwrite` is not given, or it is not an output of
            this program, or it is (in) the source.
    """
    path = target.path
    if path.parent.is_dir():
        restore_moved(path.parent)
    mine, theirs = path.resolve(), source.resolve()
    inside = theirs in mine.parents and (target.kind != "file" or mine.exists())
    if mine == theirs or mine in theirs.parents or inside:
        raise UserError(f"{flag}: {path} overlaps with the input {source}: name another place")
    if path.is_dir() and not any(path.iterdir()):
        if target.kind == "file":
            raise UserError(f"{flag}: {path} is a folder: remove it or name another file")
        return
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise UserError(f"{flag}: {path} exists: add --overwrite to replace it, or name another")
    if path.is_dir() != (target.kind != "file"):
        kind = "folder" if path.is_dir() else "file"
        raise UserError(f"{flag}: {path} is a {kind}, which a conversion to it does not replace")
    strange = sorted(
        one.name for one in (path.iterdir() if path.is_dir() else ()) if not _own(one.name)
    )
    if strange:
        raise UserError(
            f"{flag}: {path} also holds {', '.join(strange[:5])}, which --overwrite would delete: "
            "move it, or name another folder"
        )


def _own(name: str) -> bool:
    return _OWN_NAMES.fullmatch(name) is not None


def complete(
    output: Path,
    target: Destination,
    files: Mapping[str, FileEntry],
    description: dict[str, Any],
    huggingface_files: Mapping[str, dict[str, Any]],
) -> None:
    """Write what belongs beside the tensors into `output`, transformers' own files too."""
    if target.kind == "file":
        _write_json(output / (target.path.name + RECORD_SUFFIX), description | file_hashes(files))
    elif target.kind == "checkpoint":
        state = _write_json(output / STATE, {"step": 0, **description})
        write_manifest(output, Manifest(1, hashlib.sha256(state).hexdigest(), dict(files)))
    else:
        _complete_huggingface(output, files, huggingface_files)
        _write_json(output / FOLDER_RECORD, description | file_hashes(files))
    for path in (*output.rglob("*"), output):
        fsync_path(path)


def _complete_huggingface(
    output: Path, files: Mapping[str, FileEntry], written: Mapping[str, dict[str, Any]]
) -> None:
    for name, content in written.items():
        _write_json(output / name, content)
    if len(files) > 1:
        total = sum(one.size for entry in files.values() for one in entry.tensors.values())
        names = {tensor: file for file, entry in files.items() for tensor in entry.tensors}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
        _write_json(output / SAFETENSORS_INDEX, index)


def require_tokenizer(source: Path) -> None:
    """Refuse to copy a tokenizer's file that is plainly none.

    Raises:
        UserError: it is a pointer, a web page, empty, an archive.
    """
    folder = source if source.is_dir() else source.parent
    for path in (folder / name for name in TOKENIZER_FILES):
        if path.is_file() and (kind := kind_of(path)) is not None:
            raise not_as_wanted(path, "a file of a tokenizer", kind.name)


def copy_tokenizer(source: Path, output: Path) -> list[str]:
    """Copy the tokenizer's files that lie with the source; returns their names."""
    folder = source if source.is_dir() else source.parent
    names = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    for name in names:
        shutil.copyfile(folder / name, output / name)
    return names


def put_output(output: Path, target: Destination) -> None:
    """Move a whole output to its place; what it replaces goes only then."""
    path = target.path
    if target.kind != "file":
        put_in_place(output, path)
        return
    # The record first: killed in between, there is a record of other weights than those beside it,
    # which every reader refuses, and the same command typed again completes it.
    record = path.with_name(path.name + RECORD_SUFFIX)
    os.replace(output / record.name, record)
    os.replace(output / path.name, path)
    fsync_path(path.parent)


def _write_json(path: Path, data: dict[str, Any]) -> bytes:
    text = (json.dumps(data, indent=2) + "\n").encode()
    path.write_bytes(text)
    return text
