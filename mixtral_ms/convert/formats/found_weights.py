"""What a path of weights means: the one place that says so, whatever flag or key named it.

Evaluation, training's first weights, resuming, prediction, pipelines, conversion and `inspect` all
ask `find_weights` and open what it answers. It looks at names of files and opens none of tensors.
"""

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

from mixtral_ms.checkpoint.formats.file_formats import (
    FILE_FORMATS,
    SAFETENSORS_INDEX,
    TORCH_INDEX,
    written_suffixes,
)
from mixtral_ms.checkpoint.reshard.open_checkpoint import checkpoint_folder, own_strategy
from mixtral_ms.checkpoint.shards.rank_files import ADAPTER_STEM, is_rank_folders, is_rank_name
from mixtral_ms.checkpoint.store.conversion_record import (
    FOLDER_RECORD,
    FORMAT_KEY,
    RECORD_SUFFIX,
    record_path,
    recorded_entries,
    recorded_problems,
)
from mixtral_ms.checkpoint.store.manifest import (
    MANIFEST,
    STATE,
    manifest_problems,
    verify_checkpoint,
)
from mixtral_ms.convert.adapters.peft_export import CONFIG_FILE, PEFT_PREFIX
from mixtral_ms.convert.formats.foreign_config import (
    CONFIG_JSON,
    PARAMS_JSON,
    FoundConfig,
    read_config,
    says_network,
)
from mixtral_ms.convert.formats.weight_names import FORMATS
from mixtral_ms.data.conversations.chat_template import CHAT_TEMPLATE_KEY
from mixtral_ms.errors import UserError
from mixtral_ms.json_reader import read_json_object

TOKENIZER_FILE = "tokenizer.model"


class Kind(Enum):
    """What lies at a path."""

    CHECKPOINT = "a checkpoint of ours"
    RANKS = "folders of ranks"
    HUGGING_FACE = "a folder as Hugging Face's"
    RELEASE = "a folder as Mistral's release"
    FOLDER = "a folder of weights"
    FILE = "a file of weights"
    LORA = "a checkpoint of a LoRA run"
    PEFT = "an adapter in PEFT's format"
    NOTHING = "a folder without weights"


_BY_RANK = (Kind.CHECKPOINT, Kind.RANKS, Kind.LORA)
# In this order: the first pattern of which files are there decides, as in transformers, which takes
# safetensors before .bin, and of each one file before those that an index names.
_NAMES = (
    (Kind.RELEASE, "*.pth-split0"),  # each stands for all parts of its file
    (Kind.HUGGING_FACE, "model.safetensors"),
    (Kind.HUGGING_FACE, SAFETENSORS_INDEX),
    (Kind.HUGGING_FACE, "model-*.safetensors"),
    (Kind.HUGGING_FACE, "pytorch_model.bin"),
    (Kind.HUGGING_FACE, TORCH_INDEX),
    (Kind.HUGGING_FACE, "pytorch_model-*.bin"),
    (Kind.RELEASE, "consolidated*.pth"),
    (Kind.RELEASE, "consolidated*.pt"),
    (Kind.RELEASE, "consolidated*.safetensors"),
)


@dataclass(frozen=True)
class Flags:
    """What the user names weights with, and how they are cut over ranks: for messages.

    `weights` is empty where the command has nothing else to name.
    """

    weights: str = "--load_checkpoint"
    strategy: str = "--src_strategy_path_or_dir"

    @property
    def start(self) -> str:
        """The beginning of a message about the weights."""
        return f"{self.weights}: " if self.weights else ""


@dataclass(frozen=True)
class FoundWeights:
    """What a path of weights is, and what lies with it.

    Attributes:
        named: as the user named it.
        path: the file or folder to open: the latest checkpoint where `named` holds several.
        kind: what it is.
        files: those that hold the tensors; none where folders of ranks do, or an index names them.
        index: the JSON file that names the files.
        strategy: how the tensors are cut over ranks: as the user said, or as lies in the folder.
        config_files: those that may say the network's sizes, to be read in this order.
        record: what a conversion, or a run, has written about the tensors.
        hashes: the file that records every file's and tensor's hash.
        tokenizer: the tokenizer.model in or beside it.
        flags: what the user named it with.
    """

    named: Path
    path: Path
    kind: Kind
    files: tuple[Path, ...] = ()
    index: Path | None = None
    strategy: Path | None = None
    config_files: tuple[Path, ...] = ()
    record: Path | None = None
    hashes: Path | None = None
    tokenizer: Path | None = None
    flags: Flags = Flags()

    @property
    def by_rank(self) -> bool:
        """Whether the tensors are in folders rank_0, rank_1, ..."""
        return self.kind in _BY_RANK

    @property
    def is_adapter(self) -> bool:
        """Whether it holds an adapter, and no weights."""
        return self.kind in (Kind.LORA, Kind.PEFT)

    @cached_property
    def network(self) -> FoundConfig | None:
        """The network's configuration; None where nothing says it.

        Raises:
            UserError: a file that should say it cannot be read, or says another network's.
        """
        return next((read_config(one) for one in self.config_files if says_network(one)), None)

    @cached_property
    def format_name(self) -> str | None:
        """The tensors' format (a key of FORMATS) as the record says it; None: they show it."""
        name = read_json_object(self.record).get(FORMAT_KEY) if self.record else None
        return name if isinstance(name, str) and name in FORMATS else None

    @cached_property
    def chat_template(self) -> Any:
        """What was written down of the template of the conversations trained on; None without."""
        return read_json_object(self.record).get(CHAT_TEMPLATE_KEY) if self.record else None

    def hash_problems(self, *, read_all: bool = True) -> list[str] | None:
        """What differs from the recorded hashes, one line each; None where none are recorded.

        Args:
            read_all: read every byte; else only the record itself is looked at.
        """
        if self.hashes is None:
            return None
        if read_all:
            whole = self.hashes == self.path / MANIFEST
            return verify_checkpoint(self.path) if whole else recorded_problems(self.path)
        if self.hashes.name == MANIFEST:
            return manifest_problems(self.hashes.parent)
        return None if recorded_entries(self.hashes) is None else []


def find_weights(path: Path, flags: Flags = Flags(), strategy: Path | None = None) -> FoundWeights:
    """What a path of weights means.

    Args:
        path: a file or folder of any kind that is read: a checkpoint of ours or a folder of them,
            folders of ranks, Hugging Face's or Mistral's folder, a file.
        flags: what the user named it with.
        strategy: strategy file or folder, where it does not lie in `path`.

    Raises:
        UserError: it, or the strategy, does not exist; or of several checkpoints the one that
            `latest` names is gone.
    """
    folder = checkpoint_folder(path, flags.weights)
    if strategy is not None and not strategy.exists():
        raise UserError(f"{flags.strategy}: {strategy} does not exist")
    kind, index, files = _contents(folder)
    return FoundWeights(
        named=path,
        path=folder,
        kind=kind,
        files=files,
        index=index,
        strategy=strategy or (own_strategy(folder) if kind in _BY_RANK else None),
        config_files=_existing(_config_paths(folder)),
        record=_first(_record_paths(folder)),
        hashes=_hashes(folder),
        tokenizer=_first(_tokenizer_paths(folder, path)),
        flags=flags,
    )


def name_patterns() -> tuple[str, ...]:
    """Names of files of weights in a folder, in the order in which they are looked for."""
    indexes = index_names()
    return tuple(pattern for _, pattern in _patterns() if pattern not in indexes)


def _patterns() -> tuple[tuple[Kind, str], ...]:
    written = [one for one in FILE_FORMATS.values() if one.write]
    named = {pattern for _, pattern in _NAMES}
    indexes = [(Kind.HUGGING_FACE, name) for name in index_names() if name not in named]
    others = [(Kind.FOLDER, f"*{suffix}") for one in written for suffix in one.suffixes]
    return (*_NAMES, *indexes, *others)


def index_names() -> tuple[str, ...]:
    """Names of the indexes of weights over several files."""
    return tuple(one.index for one in FILE_FORMATS.values() if one.index)


def _contents(path: Path) -> tuple[Kind, Path | None, tuple[Path, ...]]:
    """The kind, and the index or else the files of tensors."""
    if path.is_file():
        return Kind.FILE, None, (path,)
    if is_rank_folders(path):
        return _kind_of_ranks(path), None, ()
    kind, index, files = _listed(path)
    if kind is Kind.NOTHING and (path / MANIFEST).is_file():
        return Kind.CHECKPOINT, None, ()  # its ranks are gone
    if (path / CONFIG_FILE).is_file() and kind is Kind.NOTHING:
        return Kind.PEFT, None, ()
    return kind, index, files


def _kind_of_ranks(path: Path) -> Kind:
    first = path / "rank_0"
    if any((first / f"{ADAPTER_STEM}{suffix}").is_file() for suffix in written_suffixes()):
        return Kind.LORA
    ours = (path / MANIFEST).is_file() or (path / STATE).is_file()
    return Kind.CHECKPOINT if ours else Kind.RANKS


def _listed(folder: Path) -> tuple[Kind, Path | None, tuple[Path, ...]]:
    indexes = index_names()
    # Not by glob, which passes over a link to nothing: its reader says what it is.
    names = sorted(one.name for one in folder.iterdir()) if folder.is_dir() else []
    names = [one for one in names if not one.startswith((".", PEFT_PREFIX))]
    for kind, pattern in _patterns():
        found = tuple(folder / name for name in names if fnmatch.fnmatchcase(name, pattern))
        if found and pattern in indexes:
            return kind, found[0], ()
        if found:
            return Kind.FOLDER if _around(folder) else kind, None, found
    return Kind.NOTHING, None, ()


def _around(path: Path) -> Path | None:
    """The checkpoint of which `path` is one rank's folder, or a file in it."""
    rank = path if path.is_dir() else path.parent
    return rank.parent if is_rank_name(rank.name) and (rank.parent / STATE).is_file() else None


def _config_paths(path: Path) -> Iterable[Path]:
    if not path.is_dir():
        yield path.with_name(path.name + RECORD_SUFFIX)
    folder = path if path.is_dir() else path.parent
    yield from (folder / CONFIG_JSON, folder / PARAMS_JSON)
    if path.is_dir():
        yield path / STATE
    if around := _around(path):
        yield around / STATE


def _record_paths(path: Path) -> Iterable[Path]:
    if path.is_dir():
        yield from (path / STATE, path / FOLDER_RECORD)
    else:
        yield path.with_name(path.name + RECORD_SUFFIX)
    if around := _around(path):
        yield around / STATE


def _hashes(path: Path) -> Path | None:
    if path.is_dir() and (path / MANIFEST).is_file():
        return path / MANIFEST
    around = _around(path)
    return _first([record_path(path), *([around / MANIFEST] if around else [])])


def _tokenizer_paths(path: Path, named: Path) -> Iterable[Path]:
    """In the folder, beside the checkpoints where it is one of several, and beside the folder."""
    folders = (path, named, named.parent) if path.is_dir() else (path.parent,)
    return (folder / TOKENIZER_FILE for folder in folders)


def _existing(paths: Iterable[Path]) -> tuple[Path, ...]:
    return tuple(path for path in paths if path.is_file())


def _first(paths: Iterable[Path]) -> Path | None:
    return next(iter(_existing(paths)), None)
