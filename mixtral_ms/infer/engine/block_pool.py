"""Paged KV cache: who holds which of its blocks, and sharing them between hypotheses."""

from collections.abc import Iterable

from mixtral_ms.errors import UserError


def blocks_for(positions: int, block_size: int) -> int:
    """How many blocks hold so many positions."""
    return -(-positions // block_size)


class OutOfBlocksError(RuntimeError):
    """More blocks were asked for than are free."""


class BlockPool:
    """Gives out block numbers; a block that several tables hold is free when the last drops it.

    Args:
        blocks: the numbers to give out.
    """

    def __init__(self, blocks: Iterable[int]) -> None:
        self._free = list(blocks)[::-1]
        self._holders = dict.fromkeys(self._free, 0)

    @property
    def free(self) -> int:
        """How many blocks can be had."""
        return len(self._free)

    @property
    def blocks(self) -> list[int]:
        """All numbers, given out or not."""
        return list(self._holders)

    def allocate(self, count: int) -> list[int]:
        """Take blocks.

        Raises:
            OutOfBlocksError: fewer are free; none is taken.
        """
        if count > len(self._free):
            raise OutOfBlocksError(f"{count} blocks of {len(self._free)} free ones")
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._holders[block] = 1
        return taken

    def share(self, blocks: Iterable[int]) -> list[int]:
        """The same blocks for one more table."""
        blocks = list(blocks)
        for block in blocks:
            self._holders[block] += 1
        return blocks

    def release(self, blocks: Iterable[int]) -> None:
        """Give back what one table held."""
        for block in blocks:
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._free.append(block)


def check_fits(needed: int, available: int, block_size: int, what: str) -> None:
    """Refuse what could never be held, however long it waits.

    Raises:
        UserError: more blocks are needed than there are; both numbers are in the message.
    """
    if needed > available:
        raise UserError(
            f"{what} needs {needed} cache blocks of {block_size} positions, and the cache has "
            f"{available}: raise num_blocks, or lower max_new_tokens"
        )
