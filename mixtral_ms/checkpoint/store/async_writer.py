"""Saving while training goes on: one snapshot, one background thread, no error lost."""

import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_ms.checkpoint.store.multi_rank_save import SavingRanks, TensorsByFile
from mixtral_ms.checkpoint.store.store import save_checkpoint, state_bytes


class CheckpointWriter:
    """Writes the checkpoints of a run, in the background when `asynchronous`.

    At most one write is under way: a save waits for the one before it. An error in the
    background is raised by the next `save`, `wait` or `close`, whichever comes first. The
    interpreter does not exit before a write under way has ended.
    """

    def __init__(
        self,
        root: str | Path,
        keep_max: int | None = None,
        asynchronous: bool = False,
        ranks: SavingRanks | None = None,
    ) -> None:
        self.root = Path(root)
        self._save = partial(save_checkpoint, self.root, keep_max=keep_max, ranks=ranks)
        self._threads = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._under_way: Future[Path] | None = None

    def save(
        self,
        name: str,
        tensors: TensorsByFile,
        state: Mapping[str, Any],
    ) -> None:
        """Save a checkpoint (see `save_checkpoint`).

        When it returns, the caller may change the arrays and the state: asynchronous writing
        works on copies (one more copy of the model and optimizer in memory).
        """
        self.wait()
        if self._threads is None:
            self._save(name, tensors, state)
            return
        copies = {
            stem: {key: np.array(array, order="C") for key, array in group.items()}
            for stem, group in tensors.items()
        }
        state_copy = json.loads(state_bytes(state))
        self._under_way = self._threads.submit(self._save, name, copies, state_copy)

    def wait(self) -> None:
        """Return when the last save is on disk; raise its error if it failed."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def close(self) -> None:
        """Wait, and end the thread; saving again after it is an error."""
        try:
            self.wait()
        finally:
            if self._threads is not None:
                self._threads.shutdown()
