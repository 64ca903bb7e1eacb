"""The manifest of a checkpoint: what must be in the folder, and whether it still is.

<checkpoint>/state.json                  step, epoch, ...: whatever the Trainer keeps
<checkpoint>/rank_0/model.safetensors    one folder a rank, one file a group of tensors
<checkpoint>/strategy/                   MindSpore's strategy files, where ranks hold parts
<checkpoint>/manifest.json               every file and tensor with its size and hash
<checkpoint>/manifest.sha256             hash of manifest.json, as `sha256sum` writes it
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from mixtral_ms.checkpoint.formats.file_formats import written_suffixes
from mixtral_ms.checkpoint.formats.mapped_source import FramedSource
from mixtral_ms.checkpoint.formats.open_file import open_tensors
from mixtral_ms.checkpoint.formats.tensor_writer import FileEntry, TensorEntry
from mixtral_ms.errors import UserError
from mixtral_ms.files import sha256_file
from mixtral_ms.json_reader import JsonShape, decode_json, read_json_object, require_shape

MANIFEST = "manifest.json"
MANIFEST_HASH = "manifest.sha256"
STATE = "state.json"
FORMAT_VERSION = 2
_NAMES_SHOWN = 3
FILE_SHAPE: JsonShape = {
    "size": int,
    "header_size": int,
    "header_sha256": str,
    "tensors": {str: {"shape": [int], "dtype": str, "size": int, "sha256": str}},
}
"""What JSON says of a file of tensors."""
FILES_SHAPE: JsonShape = {str: FILE_SHAPE}
"""The same of several, by name."""
_MANIFEST_SHAPE: JsonShape = {
    "world": int,
    "state_sha256": (str, None),
    "files": FILES_SHAPE,
    "others": {str: str},
    "strategy": (str, None),
    "layout_sha256": (str, None),
}
LOSS_SCALE_SHAPE: JsonShape = {"value": float, "good_steps": int, "skipped_in_a_row": int}
BASE_SHAPE: JsonShape = {"path": str, "fingerprint": str}
"""Of the weights beneath adapters."""
_STATE_SHAPE: JsonShape = {
    "step": int,
    "optimizer_updates?": int,
    "loss_scale?": LOSS_SCALE_SHAPE,
    "data?": {},
    "model_config?": {},
    "base?": BASE_SHAPE,
}


class DamagedManifestError(ValueError):
    """The manifest itself is missing or not what was written."""


@dataclass(frozen=True)
class Manifest:
    """Contents of manifest.json; `files` maps a path inside the checkpoint to its entry."""

    world: int
    state_sha256: str | None
    """None: there is no state.json."""
    files: dict[str, FileEntry]
    others: dict[str, str] = field(default_factory=dict)
    """Hashes of the files that hold no tensors, such as strategy files."""
    strategy: str | None = None
    """The rank grid as text, where it was given so."""
    layout_sha256: str | None = None
    """Hash of which rank holds what of each tensor."""


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json and manifest.sha256 into `folder` (not flushed to disk)."""
    body = {"format_version": FORMAT_VERSION, **asdict(manifest)}
    text = (json.dumps(body, indent=1) + "\n").encode()
    (folder / MANIFEST).write_bytes(text)
    (folder / MANIFEST_HASH).write_text(_hash_line(text))


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint's manifest.

    Raises:
        DamagedManifestError: it is missing, changed, or of a format this version cannot read.
    """
    try:
        text = (folder / MANIFEST).read_bytes()
        hash_line = (folder / MANIFEST_HASH).read_bytes()
    except FileNotFoundError as error:
        raise DamagedManifestError(f"{Path(error.filename).name} is missing") from error
    if hash_line != _hash_line(text).encode():
        raise DamagedManifestError(f"{MANIFEST} does not have the hash in {MANIFEST_HASH}")
    try:
        body = decode_json(text.decode())
    except ValueError as error:
        raise DamagedManifestError(f"{MANIFEST} is not JSON: {error}") from None
    require_shape(body, {"format_version": int}, MANIFEST, DamagedManifestError)
    if (version := body["format_version"]) != FORMAT_VERSION:
        raise DamagedManifestError(
            f"{MANIFEST} has format_version {version}, "
            f"this version of mixtral-ms reads {FORMAT_VERSION}"
        )
    require_shape(body, _MANIFEST_SHAPE, MANIFEST, DamagedManifestError)
    if outside := next(filter(leaves, [*body["files"], *body["others"]]), None):
        raise DamagedManifestError(f"{MANIFEST}: {outside!r} lies outside of the checkpoint")
    files = {path: file_entry(entry) for path, entry in body["files"].items()}
    known = {one.name: body[one.name] for one in fields(Manifest)}
    return Manifest(**{**known, "files": files})


def leaves(name: str) -> bool:
    """Whether a file's name leads out of the folder that lists it."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or "\0" in name


def read_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint's state.json says; nothing where there is none.

    Raises:
        UserError: it is no JSON, or a part of it is not what a run writes there.
    """
    if not (folder / STATE).is_file():
        return {}
    state = read_json_object(folder / STATE)
    require_shape(state, _STATE_SHAPE, str(folder / STATE))
    return state


def _hash_line(text: bytes) -> str:
    return f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n"


def file_entry(entry: dict[str, Any]) -> FileEntry:
    """A file's entry from its JSON, of FILE_SHAPE."""
    tensors = {
        name: TensorEntry(tuple(tensor["shape"]), tensor["dtype"], tensor["size"], tensor["sha256"])
        for name, tensor in entry["tensors"].items()
    }
    return FileEntry(entry["size"], entry["header_size"], entry["header_sha256"], tensors)


def verify_checkpoint(path: str | Path, part: int = 0, parts: int = 1) -> list[str]:
    """Every way in which a checkpoint differs from what was saved; empty when it is whole.

    Reads all bytes once (about 1 s a gigabyte). Each problem is one line that names the file
    and, where it is known, the tensor.

    Args:
        path: the checkpoint's folder.
        part: which share of its files of tensors is read; the first share has all else too.
        parts: into how many shares they go.
    """
    folder = Path(path)
    if not folder.is_dir():
        return [f"{folder} is not a folder"]
    try:
        manifest = read_manifest(folder)
    except DamagedManifestError as error:
        return [str(error)]
    problems = verify_files(folder, manifest, list(manifest.files)[part::parts])
    return problems if part else problems + other_problems(folder, manifest)


def manifest_problems(folder: Path) -> list[str]:
    """What is wrong with a manifest itself, without a look at what it describes."""
    try:
        read_manifest(folder)
    except DamagedManifestError as error:
        return [str(error)]
    return []


def verify_files(folder: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """What is wrong with these of a checkpoint's files of tensors."""
    return [
        problem
        for name in names
        for problem in verify_file(folder / name, manifest.files[name], name)
    ]


def other_problems(folder: Path, manifest: Manifest) -> list[str]:
    """What is wrong with files that hold no tensors, and with those that nobody knows."""
    problems = _state_problems(folder, manifest)
    for name, digest in manifest.others.items():
        problems += _hash_problems(folder / name, name, digest)
    present = {
        file.relative_to(folder).as_posix()
        for suffix in written_suffixes()
        for file in folder.glob(f"*/*{suffix}")
    }
    unknown = present - set(manifest.files) - set(manifest.others)
    return problems + [f"{name} is not in the manifest" for name in sorted(unknown)]


def _state_problems(folder: Path, manifest: Manifest) -> list[str]:
    if manifest.state_sha256 is not None:
        return _hash_problems(folder / STATE, STATE, manifest.state_sha256)
    return [f"{STATE} is not in the manifest"] if (folder / STATE).exists() else []


def _hash_problems(path: Path, name: str, digest: str) -> list[str]:
    if not path.is_file():
        return [f"{name} is missing"]
    if sha256_file(path) != digest:
        return [f"{name} was changed: its hash is not the manifest's"]
    return []


def verify_file(path: Path, entry: FileEntry, name: str | None = None) -> list[str]:
    """Every way in which a file of tensors differs from what was saved.

    Args:
        path: the file.
        entry: what writing it returned.
        name: what the problems call it; by default `path`.
    """
    name = name or str(path)
    if not path.is_file():
        return [f"{name} is missing"]
    size = path.stat().st_size
    if size < entry.size:
        return [f"{name} is truncated: {size} of {entry.size} bytes"]
    surplus = [f"{name} has {size} bytes, {entry.size} were saved"] if size > entry.size else []
    try:
        source = open_tensors(path)
    except UserError as error:
        return surplus or [f"{name}: its header was changed ({error})"]
    if (
        not isinstance(source, FramedSource)
        or source.framing.sha256() != entry.header_sha256
        or source.infos.keys() != entry.tensors.keys()
    ):
        return _header_problems(name, set(source.infos), set(entry.tensors))
    return surplus or [
        f"{name}: tensor {tensor} was changed: its hash is not the manifest's"
        for tensor, saved in entry.tensors.items()
        if source.content(tensor).sha256() != saved.sha256
    ]


def _header_problems(name: str, found: set[str], saved: set[str]) -> list[str]:
    """A header that is not the saved one: other tensors, or damage."""
    problems = []
    for what, those in (("lacks", saved - found), ("also has", found - saved)):
        if those:
            shown = ", ".join(sorted(those)[:_NAMES_SHOWN])
            more = f" and {len(those) - _NAMES_SHOWN} more" if len(those) > _NAMES_SHOWN else ""
            problems.append(f"{name} {what} tensor {shown}{more}")
    return problems or [f"{name}: its header was changed"]
