"""Comparing a checkpoint with its manifest while something else is being done."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

from mixtral_ms.checkpoint.store.manifest import MANIFEST, verify_checkpoint
from mixtral_ms.checkpoint.store.store import require_undamaged
from mixtral_ms.errors import UserError


class Verification:
    """Begins to compare the checkpoint in `folder` with its manifest, if it has one.

    Args:
        folder: of the checkpoint.
        wanted: False: nothing is compared, and nothing is wrong.
    """

    def __init__(self, folder: Path, *, wanted: bool) -> None:
        self._folder = folder
        self._problems: list[str] = []
        self._error: BaseException | None = None
        # A daemon: whoever interrupts the program need not wait for the hashes.
        self._thread = Thread(target=self._run, daemon=True)
        if wanted and (folder / MANIFEST).exists():
            self._thread.start()

    def _run(self) -> None:
        try:
            self._problems = verify_checkpoint(self._folder)
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
        require_undamaged(self._folder, self._problems)
