"""The hosts of a run that see no common folder, and what they say beside training's collectives."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
from mindspore import Tensor
from mindspore import dtype as mstype

from mixtral_ms.parallel.comm.process_groups import open_store, sum_tensor, wait_for_all
from mixtral_ms.parallel.grid.mesh import ProcessGroup

_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Hosts:
    """Which ranks see the same files. The first of them on each host leads it."""

    world: ProcessGroup
    leaders: tuple[int, ...]
    """For each rank, the leader of its host."""

    @property
    def leader(self) -> int:
        """Of this rank's host."""
        return self.leaders[self.world.index]

    @property
    def leads(self) -> bool:
        """Whether this rank is it."""
        return self.leader == self.world.index

    @property
    def local_ranks(self) -> tuple[int, ...]:
        """The ranks on this host."""
        return tuple(rank for rank, leader in enumerate(self.leaders) if leader == self.leader)


class Board:
    """Texts that the leaders of hosts show each other, in any thread. All ranks must make it.

    Args:
        hosts: that take part.
        wait_seconds: for the slowest of them.
    """

    def __init__(self, hosts: Hosts, wait_seconds: float) -> None:
        self.hosts, self._rank = hosts, hosts.world.index
        self._leaders = sorted(set(hosts.leaders))
        self._wait_seconds, self._round = wait_seconds, 0
        self._store = open_store(hosts.world, timedelta(seconds=wait_seconds))

    def show(self, text: str) -> list[str]:
        """Every leader's text of this round, in the order of hosts. Each leader must show one.

        Raises:
            TimeoutError: a leader showed none.
        """
        self._round += 1
        # Who is in this round has read all of the last one, and so needs none before that.
        self._store.delete_key(self._key(self._round - 2, self._rank))
        self._store.set(self._key(self._round, self._rank), text)
        self._store.add(f"shown {self._round}", 1)
        end = time.monotonic() + self._wait_seconds
        while self._store.add(f"shown {self._round}", 0) < len(self._leaders):
            if time.monotonic() > end:
                raise TimeoutError(f"another host did not answer within {self._wait_seconds:g} s")
            time.sleep(_POLL_SECONDS)
        texts = [self._store.get(self._key(self._round, leader)) for leader in self._leaders]
        return [text.decode() if isinstance(text, bytes) else text for text in texts]

    def _key(self, round_number: int, rank: int) -> str:
        return f"text {round_number} of {rank}"


def broadcast_bytes(world: ProcessGroup, source: int, size: int, read: Callable[[], Any]) -> bytes:
    """Bytes that one rank has, on all of them. All must ask.

    Args:
        world: all ranks.
        source: who has them.
        size: how many.
        read: gives them; called by `source` only.
    """
    # Whole numbers below 2048 are exact in float16, which every collective can sum.
    values = np.zeros(size, np.float16)
    if world.index == source:
        values[:] = np.frombuffer(read(), np.uint8)
    wait_for_all()
    return sum_tensor(world, Tensor(values, mstype.float16)).asnumpy().astype(np.uint8).tobytes()
