"""The hidden folder in which a conversion is written until it is whole.

<target's folder>/.<target>.converting/lock       held while a conversion runs
<target's folder>/.<target>.converting/plan       fingerprint of what is being converted
<target's folder>/.<target>.converting/done/      a note of each finished file, with its hashes
<target's folder>/.<target>.converting/output/    what will become the target
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral_ms.checkpoint.formats.tensor_writer import FileEntry
from mixtral_ms.checkpoint.store.manifest import file_entry, verify_file
from mixtral_ms.errors import UserError
from mixtral_ms.files import write_aside


@dataclass(frozen=True)
class Finished:
    """A file that is written: its hashes, values read of each source tensor, and fp16's losses."""

    entry: FileEntry
    read: dict[str, int]
    losses: dict[str, tuple[int, int]]


class Workspace:
    """Where a conversion's files are until all are finished."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output = folder / "output"
        self._done = folder / "done"

    def begin(self, fingerprint: str) -> None:
        """Keep what an interrupted run of the same plan has finished, and nothing else."""
        plan = self.folder / "plan"
        if not plan.is_file() or plan.read_text() != fingerprint:
            for folder in (self.output, self._done):
                shutil.rmtree(folder, ignore_errors=True)
            with write_aside(plan) as aside:
                aside.write_text(fingerprint)
        self.output.mkdir(exist_ok=True)
        self._done.mkdir(exist_ok=True)

    def finished(self, name: str) -> Finished | None:
        """A file that an earlier run finished and that still has its hashes; reads it all."""
        note = self._note(name)
        if not note.is_file():
            return None
        done = _finished(json.loads(note.read_text()))
        return None if verify_file(self.output / name, done.entry) else done

    def note(self, name: str, done: Finished) -> None:
        """Remember that a file is finished."""
        with write_aside(self._note(name)) as aside:
            aside.write_text(json.dumps(dataclasses.asdict(done)))

    def _note(self, name: str) -> Path:
        return self._done / (name.replace("/", "+") + ".json")


def _finished(data: dict[str, Any]) -> Finished:
    losses = {name: tuple(counts) for name, counts in data["losses"].items()}
    return Finished(file_entry(data["entry"]), data["read"], losses)


@contextlib.contextmanager
def open_workspace(target: Path) -> Iterator[Workspace]:
    """The workspace of a target, held for this process; it stays when the block fails.

    Raises:
        UserError: another process is converting to the same target.
    """
    folder = target.parent / f".{target.name}.converting"
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is converting to {target}: wait for it") from None
        yield Workspace(folder)
        shutil.rmtree(folder)
    finally:
        os.close(descriptor)
