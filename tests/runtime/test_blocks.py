"""`blocks`: no block has two owners that do not know of it, none is lost, and none is used after it was given back."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from emssd_compile.runtime.blocks import BlockPool

SIZE = 6


def test_what_is_promised_can_be_taken():
    pool = BlockPool(3)
    pool.promise(2)
    assert pool.num_open == 1
    with pytest.raises(ValueError, match="2 blocks cannot be promised: 1 of 3 are open"):
        pool.promise(2)
    assert len({*pool.take(2)}) == 2
    assert (pool.num_free, pool.num_open) == (1, 1)
    with pytest.raises(ValueError, match="1 blocks are no longer needed, and 0 are promised"):
        pool.take(1)


def test_a_shared_block_is_free_when_its_last_owner_has_gone():
    pool = BlockPool(2)
    pool.promise(1)
    (block,) = pool.take(1)
    pool.share([block])
    pool.free([block])
    assert (pool.owners(block), pool.num_free) == (1, 1)
    pool.free([block])
    assert pool.num_free == 2
    for use in (pool.free, pool.share):
        with pytest.raises(ValueError, match=f"block {block} has no owner"):
            use([block])


class Pool(RuleBasedStateMachine):
    """Rows that take, share and give back blocks in any order, beside what each is known to have."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(SIZE)
        self.rows: list[list[int]] = []
        self.promised: list[int] = []

    @rule(count=st.integers(0, SIZE))
    def start(self, count: int) -> None:
        if count <= self.pool.num_open:
            self.pool.promise(count)
            self.rows.append([])
            self.promised.append(count)
        else:
            with pytest.raises(ValueError, match="cannot be promised"):
                self.pool.promise(count)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        row = data.draw(st.integers(0, len(self.rows) - 1))
        count = data.draw(st.integers(0, self.promised[row]))
        taken = self.pool.take(count)
        assert len({*taken}) == count
        assert all(block not in own for own in self.rows for block in taken), "it was somebody's"
        self.rows[row] += taken
        self.promised[row] -= count

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        source = self.rows[data.draw(st.integers(0, len(self.rows) - 1))]
        shared = source[: data.draw(st.integers(0, len(source)))]
        self.pool.share(shared)
        self.rows.append([*shared])
        self.promised.append(0)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        row = data.draw(st.integers(0, len(self.rows) - 1))
        self.pool.free(self.rows.pop(row))
        self.pool.withdraw(self.promised.pop(row))

    @invariant()
    def counts_are_right(self) -> None:
        owners = [sum(block in own for own in self.rows) for block in range(SIZE)]
        assert [self.pool.owners(block) for block in range(SIZE)] == owners
        assert self.pool.num_free == owners.count(0)
        assert self.pool.num_open == self.pool.num_free - sum(self.promised) >= 0


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30)
