"""The KV block manager: which sequence holds which block, and which blocks hold which prefix.

A block holds the keys and values of `block_size` consecutive tokens of one sequence, in all layers. A full block is
registered under a digest of its salt and of ALL tokens up to its end; a later prompt with the same beginning takes
the block over. Blocks that no sequence holds stay registered until they are needed: the least recently used goes first.

Nothing is ever evicted from a running sequence: `admit` sets aside all the blocks that a sequence can come to need.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field


@dataclass(slots=True)
class BlockTable:
    """The blocks of one sequence, in the order of its tokens.

    Attributes:
        blocks: block indices; the first `reused` of them were taken over from earlier sequences.
        promised: blocks set aside for this sequence and not yet in `blocks`.
        registered: how many of `blocks` are full and registered.
        digest: of everything up to the end of block `registered - 1`; the salt's digest at first.
    """

    blocks: list[int]
    reused: int
    promised: int
    registered: int
    digest: bytes = field(repr=False)


class BlockManager:
    """Bookkeeping only; the keys and values themselves lie with the engine.

    Args:
        num_blocks: blocks of the pool.
        block_size: tokens of a block.
        reuse: share the blocks of equal prefixes.
    """

    def __init__(self, num_blocks: int, block_size: int, *, reuse: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.reuse = reuse
        self._blank = list(range(num_blocks - 1, -1, -1))  # free, nothing worth keeping in them; a stack
        self._cached: OrderedDict[int, None] = OrderedDict()  # free, registered; least recently used first
        self._holders = [0] * num_blocks
        self._digest: list[bytes | None] = [None] * num_blocks
        self._by_digest: dict[bytes, int] = {}
        self._promised = 0

    @property
    def used(self) -> int:
        """Blocks that live sequences hold. Cached blocks are not among them: they can be had at any time."""
        return self.num_blocks - len(self._blank) - len(self._cached)

    @property
    def available(self) -> int:
        """Blocks that a new sequence could have: free ones less those promised to running sequences."""
        return len(self._blank) + len(self._cached) - self._promised

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def admit(self, prompt: Seq[int], total_tokens: int, salt: str = "") -> BlockTable | None:
        """Set aside the blocks for a sequence of at most `total_tokens`; None if there are not enough just now.

        Takes over the registered blocks of the prompt's beginning. The prompt's last token is never among them: it
        must be computed, for its logits choose the first new token.
        """
        digest = hashlib.blake2b(salt.encode(), digest_size=16).digest()
        shared: list[int] = []
        if self.reuse:
            for start in range(0, (len(prompt) - 1) // self.block_size * self.block_size, self.block_size):
                following = _chain(digest, prompt[start : start + self.block_size])
                block = self._by_digest.get(following)
                if block is None:
                    break
                shared.append(block)
                digest = following
        fresh = self.blocks_for(total_tokens) - len(shared)
        revived = sum(1 for block in shared if not self._holders[block])
        if fresh + revived > self.available:
            return None
        for block in shared:
            if not self._holders[block]:
                del self._cached[block]
            self._holders[block] += 1
        self._promised += fresh
        return BlockTable(shared, reused=len(shared), promised=fresh, registered=len(shared), digest=digest)

    def grow(self, table: BlockTable, tokens: int) -> None:
        """Give the sequence the blocks that `tokens` need, out of those promised to it."""
        missing = self.blocks_for(tokens) - len(table.blocks)
        for _ in range(missing):
            table.blocks.append(self._take())
        if missing > 0:
            table.promised -= missing
            self._promised -= missing

    def register(self, table: BlockTable, tokens: Seq[int], computed: int) -> None:
        """Offer the sequence's full blocks for reuse, once keys and values of its first `computed` tokens are there."""
        if not self.reuse:
            return
        while (table.registered + 1) * self.block_size <= computed:
            start = table.registered * self.block_size
            table.digest = _chain(table.digest, tokens[start : start + self.block_size])
            block = table.blocks[table.registered]
            if table.digest not in self._by_digest:  # else an equal block was registered first; this one stays private
                self._by_digest[table.digest] = block
                self._digest[block] = table.digest
            table.registered += 1

    def release(self, table: BlockTable) -> None:
        """Take the sequence's blocks back. Its last blocks become the least recently used: prefixes live longest."""
        for block in reversed(table.blocks):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if self._digest[block] is None:
                self._blank.append(block)
            else:
                self._cached[block] = None
        self._promised -= table.promised
        table.blocks = []
        table.promised = 0

    def _take(self) -> int:
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            digest = self._digest[block]
            if digest is not None:
                del self._by_digest[digest]
            self._digest[block] = None
        self._holders[block] = 1
        return block


def _chain(digest: bytes, tokens: Seq[int]) -> bytes:
    """A cryptographic digest: nobody can craft a prompt that lands on another one's blocks."""
    return hashlib.blake2b(array("q", tokens).tobytes(), digest_size=16, key=digest).digest()
