"""Comparing a checkpoint with its recorded hashes while something else is being done."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

from mixtral_ms.checkpoint.store.conversion_record import (
    record_error,
    recorded_problems,
)
from mixtral_ms.checkpoint.store.manifest import MANIFEST, verify_checkpoint
from mixtral_ms.checkpoint.store.store import require_undamaged
from mixtral_ms.errors import UserError


class Verification:
    """Begins to compare a checkpoint with its manifest, or its conversion's record, if it has one.

    Args:
        path: the checkpoint's folder, or a file.
        wanted: False: nothing is compared, and nothing is wrong.
    """

    def __init__(self, path: Path, *, wanted: bool) -> None:
        self._path = path
        self._has_manifest = (path / MANIFEST).exists()
        self._problems: list[str] = []
        self._error: BaseException | None = None
        # A daemon: whoever interrupts the program need not wait for the hashes.
        self._thread = Thread(target=self._run, daemon=True)
        if wanted:
            self._thread.start()

    def _run(self) -> None:
        try:
            if self._has_manifest:
                self._problems = verify_checkpoint(self._path)
            else:
                self._problems = recorded_problems(self._path) or []
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is asked for
            self._error = error

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """Where the block finds the input wrong, damage is the better explanation."""
        try:
            yield
        except UserError:
            self.finish()
            raise

    def check(self) -> None:
        """Raises UserError when a difference is known by now."""
        if not self._thread.is_alive():
            self._raise()

    def finish(self) -> None:
        """Wait for the end; raises UserError when the checkpoint is damaged."""
        if self._thread.ident is not None:
            self._thread.join()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
        if not self._has_manifest and self._problems:
            raise record_error(self._path, self._problems)
        require_undamaged(self._path, self._problems)
