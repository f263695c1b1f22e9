"""The block manager, against a model that knows nothing of blocks: hypothesis looks for a sequence that breaks it."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from roundhouse.engine.blocks import BlockManager, BlockTable

SIZE = 4
POOL = 12


class Life(RuleBasedStateMachine):
    """Sequences of few different tokens come, grow and go. `content` is what each block would hold."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(POOL, SIZE)
        self.live: list[tuple[BlockTable, list[int], int, str]] = []  # table, tokens, computed, salt
        self.content: dict[int, tuple[str, tuple[int, ...]]] = {}

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=20),
        answer=st.integers(1, 12),
        salt=st.sampled_from(["", "a"]),
    )
    def admit(self, prompt: list[int], answer: int, salt: str) -> None:
        available = self.manager.available
        table = self.manager.admit(prompt, len(prompt) + answer, salt)
        if table is None:
            assert available < self.manager.blocks_for(len(prompt) + answer)
            return
        assert table.reused * SIZE < len(prompt), "the last prompt token must be computed"
        for i, block in enumerate(table.blocks):
            assert self.content[block] == (salt, tuple(prompt[: (i + 1) * SIZE])), "a block of another prefix"
        self.live.append((table, prompt + [2] * answer, table.reused * SIZE, salt))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), count=st.integers(1, 9))
    def compute(self, data: st.DataObject, count: int) -> None:
        index = data.draw(st.integers(0, len(self.live) - 1))
        table, tokens, computed, salt = self.live[index]
        computed = min(computed + count, len(tokens))
        self.manager.grow(table, computed)
        for i, block in enumerate(table.blocks):
            self.content[block] = (salt, tuple(tokens[: min((i + 1) * SIZE, computed)]))
        self.manager.register(table, tokens, computed)
        self.live[index] = (table, tokens, computed, salt)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        table, *_ = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        self.manager.release(table)

    @invariant()
    def counts_are_right(self) -> None:
        held = {block for table, *_ in self.live for block in table.blocks}
        promised = sum(table.promised for table, *_ in self.live)
        assert self.manager.used == len(held)
        assert self.manager.available == POOL - len(held) - promised >= 0

    @invariant()
    def private_blocks_have_one_owner(self) -> None:
        private = [block for table, *_ in self.live for block in table.blocks[table.registered :]]
        everyone = [block for table, *_ in self.live for block in table.blocks]
        assert all(everyone.count(block) == 1 for block in private)


Life.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestLife = Life.TestCase


def test_a_promise_is_kept() -> None:
    manager = BlockManager(4, SIZE)
    table = manager.admit([1] * 4, 16)
    assert table is not None
    assert manager.admit([2], 2) is None
    manager.grow(table, 16)
    assert (manager.used, manager.available, table.promised) == (4, 0, 0)


def test_reuse_off_registers_nothing() -> None:
    manager = BlockManager(4, SIZE, reuse=False)
    for _ in range(2):
        table = manager.admit([1] * 9, 10)
        assert table is not None
        assert table.reused == 0
        manager.grow(table, 9)
        manager.register(table, [1] * 9, 9)
        manager.release(table)
    assert (manager.used, manager.available) == (0, 4)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2)])
def test_blocks_for(tokens: int, blocks: int) -> None:
    assert BlockManager(4, SIZE).blocks_for(tokens) == blocks
