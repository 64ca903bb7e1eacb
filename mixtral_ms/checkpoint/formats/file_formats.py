"""The formats of files that hold tensors: one row a format, for whoever reads or writes one.

Whatever names, recognises, reads or writes such files asks this table when it does so; no suffix
stands anywhere else. To add a format is to add its row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mixtral_ms.checkpoint.formats.mindspore_ckpt_format import CkptSource, write_ckpt
from mixtral_ms.checkpoint.formats.safetensors_format import SafetensorsSource, write_safetensors
from mixtral_ms.checkpoint.formats.tensor_source import STORED_DTYPES, OutgoingTensor, TensorSource
from mixtral_ms.checkpoint.formats.tensor_writer import FileEntry, OnBytes
from mixtral_ms.checkpoint.formats.torch_format import TorchZipSource
from mixtral_ms.errors import UserError

Framework = Literal["ms", "pt"]
"""For whom a file is written: MindSpore, or PyTorch and with it transformers."""
SAFETENSORS_INDEX = "model.safetensors.index.json"
TORCH_INDEX = "pytorch_model.bin.index.json"
Write = Callable[[Path, Sequence[OutgoingTensor], Framework, OnBytes | None], FileEntry]
START_BYTES = 9
"""As many of a file's first bytes are looked at to recognise it."""


@dataclass(frozen=True)
class FileFormat:
    """One format of files of tensors.

    Attributes:
        name: as flags have it.
        suffixes: of its files; the first one is that of new files.
        read: opens a file. Of a format that is written it gives a FramedSource, so that a file can
            be compared with the hashes that `write` returned, down to the last byte.
        write: creates a file, flushes it to disk and returns its hashes; None: it is only read.
        starts: whether a file begins so, by its START_BYTES; suffixes decide where none does.
        index: name of the JSON file that says which file holds which tensor, where a network may
            be spread over several files; None: it is in one.
        dtypes: that it can hold.
        loading: Python text that loads {file} elsewhere, for the user's next step.
    """

    name: str
    suffixes: tuple[str, ...]
    read: Callable[[Path], TensorSource]
    write: Write | None = None
    starts: Callable[[bytes], bool] = lambda start: False
    index: str | None = None
    dtypes: tuple[str, ...] = STORED_DTYPES
    loading: str = "mindspore.load_checkpoint({file!r})"

    @property
    def suffix(self) -> str:
        """Of its new files."""
        return self.suffixes[0]


def _write_safetensors(
    path: Path, tensors: Sequence[OutgoingTensor], framework: Framework, on_bytes: OnBytes | None
) -> FileEntry:
    return write_safetensors(path, tensors, {"format": framework}, on_bytes)


def _write_ckpt(
    path: Path, tensors: Sequence[OutgoingTensor], _framework: Framework, on_bytes: OnBytes | None
) -> FileEntry:
    return write_ckpt(path, tensors, on_bytes)


SAFETENSORS = FileFormat(
    "safetensors",
    (".safetensors",),
    SafetensorsSource,
    _write_safetensors,
    starts=lambda start: start[5:] == b"\0\0\0{",  # a JSON header of less than a terabyte
    index=SAFETENSORS_INDEX,
    loading='mindspore.load_checkpoint({file!r}, format="safetensors")',
)
"""Our own checkpoints and folders for Hugging Face are in it."""
_CKPT = FileFormat("ckpt", (".ckpt",), CkptSource, _write_ckpt)
_TORCH = FileFormat(
    "torch",
    (".bin", ".pt", ".pth"),
    TorchZipSource,
    starts=lambda start: start.startswith(b"PK\x03\x04"),
    index=TORCH_INDEX,
)
FILE_FORMATS: dict[str, FileFormat] = {one.name: one for one in (SAFETENSORS, _CKPT, _TORCH)}


def written_formats() -> dict[str, FileFormat]:
    """Those that can be written, by name, in the alphabet's order."""
    return {name: one for name, one in sorted(FILE_FORMATS.items()) if one.write is not None}


def written_suffixes() -> tuple[str, ...]:
    """Suffixes of files that can be written."""
    return tuple(suffix for one in written_formats().values() for suffix in one.suffixes)


def format_of(path: Path) -> FileFormat | None:
    """The format that a file's suffix names; None where it names none."""
    return next((one for one in FILE_FORMATS.values() if path.suffix in one.suffixes), None)


def write_tensor_file(
    path: Path,
    tensors: Sequence[OutgoingTensor],
    framework: Framework = "ms",
    on_bytes: OnBytes | None = None,
) -> FileEntry:
    """Write a file in the format of its suffix, flush it to disk and return its hashes.

    Args:
        path: file to create.
        tensors: to be written.
        framework: for whom.
        on_bytes: told of progress.

    Raises:
        ValueError: nothing is written with that suffix; two tensors of one name, or pieces that
            are not the tensor they belong to.
        OSError: the disk is full or cannot be written.
    """
    found = format_of(path)
    if found is None or found.write is None:
        raise ValueError(f"{path}: files of tensors that are written end in {written_suffixes()}")
    return found.write(path, tensors, framework, on_bytes)


def require_dtypes(format_: FileFormat, dtypes: dict[str, str], hint: str) -> None:
    """Refuse to write what a format cannot hold.

    Args:
        format_: of the files to be written.
        dtypes: tensor -> its dtype there.
        hint: what the user may do.

    Raises:
        UserError: naming the first such tensor.
    """
    for name, dtype in dtypes.items():
        if dtype not in format_.dtypes:
            raise UserError(
                f"{name} is {dtype}, and {format_.suffix} files hold "
                f"{', '.join(format_.dtypes)}: {hint}"
            )
