"""The pool of cache blocks under any sequence of what may happen to it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral_ms.errors import UserError
from mixtral_ms.infer.engine.block_pool import BlockPool, OutOfBlocksError, blocks_for, check_fits

ACTIONS = st.lists(
    st.tuples(st.sampled_from(["allocate", "share", "release"]), st.integers(0, 6)), max_size=60
)


@given(ACTIONS)
def test_a_block_is_free_exactly_when_no_table_holds_it(actions):
    pool, tables = BlockPool(range(100, 112)), []
    for action, number in actions:
        if action == "allocate":
            before = pool.free
            try:
                tables.append(pool.allocate(number))
            except OutOfBlocksError:
                assert number > before == pool.free
        elif tables and action == "share":
            tables.append(pool.share(tables[number % len(tables)]))
        elif tables:
            pool.release(tables.pop(number % len(tables)))
        held = {block for table in tables for block in table}
        assert held <= set(range(100, 112))
        assert pool.free == 12 - len(held)
    assert sorted(pool.blocks) == list(range(100, 112))


def test_a_new_block_is_nobody_elses():
    pool = BlockPool(range(5))
    first = pool.allocate(2)
    shared = pool.share(first)
    pool.release(first)
    assert not set(pool.allocate(3)) & set(shared)
    with pytest.raises(OutOfBlocksError):
        pool.allocate(1)


@pytest.mark.parametrize("positions, blocks", [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2)])
def test_blocks_for(positions, blocks):
    assert blocks_for(positions, 16) == blocks


def test_check_fits():
    check_fits(4, 4, 16, "it")
    with pytest.raises(UserError, match="it needs 5 cache blocks of 16 positions, .* has 4"):
        check_fits(5, 4, 16, "it")
