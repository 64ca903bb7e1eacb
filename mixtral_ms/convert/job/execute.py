"""Carrying out a plan: files written by threads, each tensor as a stream of pieces."""

import shutil
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from mixtral_ms.checkpoint.formats.dtype_casts import cast, count_fp16_losses
from mixtral_ms.checkpoint.formats.file_formats import Framework, write_tensor_file
from mixtral_ms.checkpoint.formats.tensor_source import OutgoingTensor, carrier
from mixtral_ms.checkpoint.formats.tensor_writer import FileEntry, OnBytes
from mixtral_ms.convert.formats.atom_audit import ReadCounts
from mixtral_ms.convert.formats.transpose_stream import stored_pieces
from mixtral_ms.convert.job.conversion_plan import ConversionPlan, Shard, Target
from mixtral_ms.convert.job.workspace import Finished, Workspace
from mixtral_ms.errors import UserError
from mixtral_ms.progress import progress_bar

CONVERT_PIECE_BYTES = 16 << 20
_OVERHEAD_BYTES = 16 << 20  # headers, records, tokenizer files and the file system's own blocks


class ConversionError(RuntimeError):
    """Writing failed; what was finished is kept for the next run, and no target was touched."""


class _StoppedError(Exception):
    """Another thread failed."""


@dataclass
class Outcome:
    """What was written."""

    files: dict[str, FileEntry] = field(default_factory=dict)
    losses: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Tensors in which float16 lost values: how many became inf, how many 0."""
    resumed: int = 0
    """Files that an interrupted run had finished."""
    written_bytes: int = 0
    peak_memory: int = 0
    """Most bytes of anonymous memory seen; 0 where the system does not tell."""


def execute(plan: ConversionPlan, workspace: Workspace, workers: int) -> Outcome:
    """Write every file of a plan into a workspace.

    Raises:
        UserError: not enough free disk space, with both numbers.
        ConversionError: the disk is full or cannot be written.
        DamagedFileError: the source changed or is damaged.
        RuntimeError: a value was not converted exactly once.
    """
    workspace.begin(plan.fingerprint())
    names = [shard.name for shard in plan.shards]
    earlier = {name: done for name in names if (done := workspace.finished(name)) is not None}
    missing = [shard for shard in plan.shards if shard.name not in earlier]
    _require_space(workspace.output, sum(shard.nbytes for shard in missing))
    outcome = Outcome(resumed=len(plan.shards) - len(missing))
    outcome.written_bytes = sum(shard.nbytes for shard in missing)
    with progress_bar(outcome.written_bytes, "converting", "B", scale=True) as bar:
        run = _Run(plan, workspace, bar.update)
        finished = earlier | run.write_all(missing, workers)
    outcome.peak_memory = run.peak_memory
    counts = ReadCounts()
    for shard in plan.shards:
        done = finished[shard.name]
        _require_written(shard, done.entry)
        counts.add(done.read)
        outcome.files[shard.name] = done.entry
        outcome.losses |= done.losses
    counts.require_all_once(plan.source_layouts)
    return outcome


def _require_space(folder: Path, nbytes: int) -> None:
    needed, free = nbytes + _OVERHEAD_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"not enough free disk space in {folder.parent.parent}: {needed:,} bytes are needed, "
            f"{free:,} are free"
        )


def _require_written(shard: Shard, entry: FileEntry) -> None:
    expected = {t.layout.name: (t.info.shape, t.info.dtype) for t in shard.targets}
    written = {name: (one.shape, one.dtype) for name, one in entry.tensors.items()}
    if written != expected:
        raise RuntimeError(f"{shard.name} does not hold the tensors that were planned")


class _Run:
    """The threads' shared state."""

    def __init__(self, plan: ConversionPlan, workspace: Workspace, on_bytes: OnBytes) -> None:
        self._plan, self._workspace, self._on_bytes = plan, workspace, on_bytes
        self._stop, self._lock = threading.Event(), threading.Lock()
        self.peak_memory = 0

    def write_all(self, shards: list[Shard], workers: int) -> dict[str, Finished]:
        """Write shards; after a failure, or Ctrl-C, the others stop soon."""
        with ThreadPoolExecutor(workers, thread_name_prefix="convert") as pool:
            futures = {pool.submit(self._write, shard): shard.name for shard in shards}
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                failed = [error for one in done if (error := one.exception()) is not None]
            except BaseException:
                self._cancel(futures)
                raise
            if failed:
                self._cancel(futures)
                raise next((one for one in failed if not isinstance(one, _StoppedError)), failed[0])
        return {name: future.result() for future, name in futures.items()}

    def _cancel(self, futures: Iterable[Future[Finished]]) -> None:
        self._stop.set()
        for future in futures:
            future.cancel()

    def _write(self, shard: Shard) -> Finished:
        path = self._workspace.output / shard.name
        path.parent.mkdir(parents=True, exist_ok=True)
        read: Counter[str] = Counter()
        losses: dict[str, tuple[int, int]] = {}
        tensors = [
            OutgoingTensor(
                target.layout.name, target.info, partial(self._pieces, target, read, losses)
            )
            for target in shard.targets
        ]
        try:
            entry = self._write_file(path, tensors)
        except BaseException as error:
            path.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise ConversionError(self._full_text(path, error)) from error
            raise
        done = Finished(entry, dict(read), losses)
        self._workspace.note(shard.name, done)
        return done

    def _write_file(self, path: Path, tensors: list[OutgoingTensor]) -> FileEntry:
        framework: Framework = "ms" if self._plan.target_format.mindspore else "pt"
        return write_tensor_file(path, tensors, framework, self._progress)

    def _pieces(
        self, target: Target, read: Counter[str], losses: dict[str, tuple[int, int]]
    ) -> Iterator[np.ndarray]:
        """A target's values; counts what it reads, and what float16 loses of it."""
        plan, dtype = self._plan, target.info.dtype
        over = under = 0
        for slot in target.layout.slots:
            name, origin = plan.origins[slot.atom]
            source_dtype = plan.source.infos[name].dtype
            most = CONVERT_PIECE_BYTES // carrier(source_dtype).itemsize
            for piece in stored_pieces(
                partial(plan.source.read, name),
                origin,
                slot.op,
                head_dim=plan.head_dim,
                most=most,
            ):
                read[name] += piece.size
                if dtype == "float16" and source_dtype != dtype:
                    more = count_fp16_losses(piece, source_dtype)
                    over, under = over + more[0], under + more[1]
                yield cast(piece, source_dtype, dtype)
        if over or under:
            losses[target.layout.name] = (over, under)

    def _progress(self, count: int) -> None:
        if self._stop.is_set():
            raise _StoppedError
        with self._lock:
            self._on_bytes(count)
            self.peak_memory = max(self.peak_memory, _anonymous_memory())

    def _full_text(self, path: Path, error: OSError) -> str:
        free = shutil.disk_usage(path.parent).free
        return (
            f"cannot write {path}: {error.strerror or error} ({free:,} bytes are free); finished "
            "files are kept: make room and run the same command again to go on"
        )


def _anonymous_memory() -> int:
    """Bytes of this process that are not pages of files; 0 where Linux's /proc is missing."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            line = next((one for one in status if one.startswith("RssAnon")), "RssAnon: 0 kB")
    except OSError:
        return 0
    return int(line.split()[1]) * 1024
