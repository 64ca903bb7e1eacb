"""The hidden folder in which a conversion is written until it is whole.

<target's folder>/.<target>.converting/lock       held while a conversion runs
<target's folder>/.<target>.converting/plan       fingerprint of what is being converted
<target's folder>/.<target>.converting/done/      a note of each finished file, with its hashes
<target's folder>/.<target>.converting/output/    what will become the target
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mixtral_ms.checkpoint.formats.tensor_writer import FileEntry
from mixtral_ms.checkpoint.store.manifest import FILE_SHAPE, file_entry, verify_file
from mixtral_ms.errors import UserError
from mixtral_ms.files import sole_writer, write_aside
from mixtral_ms.json_reader import JsonShape, read_json_object, require_shape
from mixtral_ms.log import get_logger

_NOTE_SHAPE: JsonShape = {"entry": FILE_SHAPE, "read": {str: int}, "losses": {str: [int]}}


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
        try:
            done = _finished(note)
        except UserError as error:
            get_logger().info("%s: %s is converted again", error, name)
            return None
        return None if verify_file(self.output / name, done.entry) else done

    def leave(self) -> None:
        """Remove all, unless a file is finished: then the next run of the same plan goes on."""
        if not self._done.is_dir() or not any(self._done.iterdir()):
            shutil.rmtree(self.folder, ignore_errors=True)

    def note(self, name: str, done: Finished) -> None:
        """Remember that a file is finished."""
        with write_aside(self._note(name)) as aside:
            aside.write_text(json.dumps(dataclasses.asdict(done)))

    def _note(self, name: str) -> Path:
        return self._done / (name.replace("/", "+") + ".json")


def _finished(note: Path) -> Finished:
    """Raises UserError for a note that is not as it was written."""
    data = read_json_object(note)
    require_shape(data, _NOTE_SHAPE, str(note))
    losses = {name: tuple(counts) for name, counts in data["losses"].items()}
    return Finished(file_entry(data["entry"]), data["read"], losses)


@contextlib.contextmanager
def open_workspace(target: Path) -> Iterator[Workspace]:
    """The workspace of a target, held for this process; finished files survive a failure.

    Raises:
        BusyError: another process is converting to the same target.
        UserError: nothing can be written there.
    """
    folder = target.parent / f".{target.name}.converting"
    with sole_writer(folder / "lock", f"{target}: wait for its conversion"):
        workspace = Workspace(folder)
        try:
            yield workspace
        except BaseException:
            workspace.leave()
            raise
        shutil.rmtree(folder)
