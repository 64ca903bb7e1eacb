"""metrics.jsonl: one JSON object a step, whole lines only, continued exactly on resume.

    {"kind": "train", "step": 1, "loss": …, …}     fields: TRAIN_FIELDS
    {"kind": "eval", "step": 50, "loss": …, "perplexity": …, "tokens": …}

JSON knows no NaN: such a number is written as the string "nan", "inf" or "-inf", and
`read_metrics` turns it back.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mixtral_ms.errors import MissingDependencyError
from mixtral_ms.files import write_aside
from mixtral_ms.json_reader import decode_json, require_shape
from mixtral_ms.log import get_logger

TIMING_FIELDS = frozenset(
    {
        "tokens_per_second",
        "step_time_ms",
        "eta_seconds",
        "mfu",
        "achieved_flops_per_second",
        "peak_flops_per_second",
        "eval_seconds",
    }
)
"""Fields that depend on the clock; two runs of one configuration agree in all others."""

LAYER_FIELDS = ("expert_load", "drop_percent", "router_entropy")
"""Lists with one item a layer; expert_load's item is a list with one share an expert."""

METRICS_FILE = "metrics.jsonl"
"""Its name in a run's output_dir, unless the MetricsWriter callback says otherwise."""

_NOT_FINITE = ("nan", "inf", "-inf")


class MetricsWriter:
    """Appends records to a metrics file, and to TensorBoard when a folder is given.

    Args:
        path: the .jsonl file; created with its folders.
        tensorboard_dir: where TensorBoard's event files go; None for none.
        resume_step: last step of the checkpoint that the run continues; later lines (of the
            run that was cut off) are removed, earlier ones kept. None keeps everything.

    Raises:
        MissingDependencyError: a `tensorboard_dir`, but no tensorboardX.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        tensorboard_dir: str | os.PathLike[str] | None = None,
        resume_step: int | None = None,
    ) -> None:
        self.path = Path(path)
        self._board = _open_board(tensorboard_dir, resume_step) if tensorboard_dir else None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            _repair(self.path, resume_step)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record, which must have "kind" and the integer "step".

        When it returns, the line has been handed to the operating system: a kill of the process
        cannot lose it.
        """
        self._file.write(json.dumps(_plain(record), allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None:
            for tag, value in _scalars(record):
                self._board.add_scalar(tag, value, record["step"])

    def close(self) -> None:
        """Flush to disk and close."""
        os.fsync(self._file.fileno())
        self._file.close()
        if self._board is not None:
            self._board.close()


class NoMetrics:
    """In place of a MetricsWriter where another rank writes."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All records of a metrics file; lines that are none (the process was killed) are left out."""
    records = [_parsed(line) for line in Path(path).read_bytes().splitlines()]
    _say_left_out(path, records)
    return [_restored(record) for record in records if record is not None]


def _say_left_out(path: str | os.PathLike[str], records: Sequence[dict[str, Any] | None]) -> None:
    torn = [number for number, record in enumerate(records, 1) if record is None]
    if torn:
        text = "%s: %d of %d lines are no whole records and are left out, the first is line %d"
        get_logger().warning(text, path, len(torn), len(records), torn[0])


def reproducible(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without its TIMING_FIELDS: equal, bit for bit, in a repeated or resumed run."""
    return {key: value for key, value in record.items() if key not in TIMING_FIELDS}


def _repair(path: Path, resume_step: int | None) -> None:
    """Rewrite the file without torn lines and without steps after `resume_step`."""
    text = path.read_bytes()
    kept, lines = [], text.splitlines()
    records = [_parsed(line) for line in lines]
    _say_left_out(path, records)
    for line, record in zip(lines, records, strict=True):
        if record is not None and (resume_step is None or record["step"] <= resume_step):
            kept.append(line + b"\n")
    if b"".join(kept) != text:
        with write_aside(path) as aside:
            aside.write_bytes(b"".join(kept))


def _parsed(line: bytes) -> dict[str, Any] | None:
    """One line's record; None when the line is torn."""
    try:
        record = decode_json(line.decode(), row=True)
        require_shape(record, {"step": int, "kind": str}, "a record", ValueError)
    except ValueError:
        return None
    return record


def _plain(value: Any) -> Any:
    """`value` with numbers that JSON lacks as strings."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _restored(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _restored(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_restored(item) for item in value]
    return float(value) if value in _NOT_FINITE else value


def _scalars(record: Mapping[str, Any]) -> list[tuple[str, float]]:
    """(TensorBoard tag, value) of every number in a record."""
    found = []
    for key, value in record.items():
        if key in ("kind", "step") or value is None or isinstance(value, str):
            continue
        if key not in LAYER_FIELDS:
            found.append((f"{record['kind']}/{key}", value))
            continue
        for layer, item in enumerate(value):
            for expert, share in enumerate(item) if isinstance(item, list | tuple) else ():
                found.append((f"{key}/layer_{layer}/expert_{expert}", share))
            if not isinstance(item, list | tuple):
                found.append((f"{key}/layer_{layer}", item))
    return [(tag, float(value)) for tag, value in found]


def _open_board(folder: str | os.PathLike[str], resume_step: int | None) -> Any:
    try:
        from tensorboardX import SummaryWriter  # noqa: PLC0415 - optional, and slow to import
    except ImportError as error:
        raise MissingDependencyError(
            "tensorboardX", "tensorboard", "TensorBoard logging"
        ) from error
    # purge_step hides what the run that was cut off had logged after the checkpoint
    purge_step = None if resume_step is None else resume_step + 1
    return SummaryWriter(str(folder), purge_step=purge_step)
