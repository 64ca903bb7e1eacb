"""Continuous batching: which request computes what next, and where its KV cache lies."""

from collections import deque
from dataclasses import dataclass

from mixtral_ms.infer.engine.block_pool import BlockPool, blocks_for
from mixtral_ms.infer.engine.request import Request, Sequence


@dataclass(frozen=True)
class Chunk:
    """Positions begin .. end - 1 of a sequence, computed in one step (chunked prefill)."""

    request: Request
    sequence: Sequence
    begin: int
    end: int


class Scheduler:
    """Requests join and leave at any step; the oldest is served first.

    When the cache is full, the youngest request gives its blocks up and is computed again later:
    its prompt in the same chunks, its answer token by token as before, so that its logits come out
    the same, bit for bit.

    Args:
        num_blocks, block_size: of the runner's cache.
        max_batch_size: sequences in one decoding step.
        chunk_size: tokens of a prompt's chunk at most; chunks begin at multiples of it.
        prefill_tokens: chunks of several prompts share a step up to so many tokens.
        use_past: False computes every sequence from its start for each token.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_batch_size: int,
        chunk_size: int,
        prefill_tokens: int,
        use_past: bool,
    ) -> None:
        self.pool = BlockPool(range(num_blocks))
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._block_size, self._max_batch_size = block_size, max_batch_size
        self._chunk_size, self._prefill_tokens = chunk_size, prefill_tokens
        self._use_past = use_past

    def add(self, request: Request) -> None:
        """Queue a new request."""
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Forget a request and free its blocks."""
        if request in self.running:
            self._stop(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def admit(self) -> None:
        """Let waiting requests run, in order, while there is room for them."""
        while self.waiting and self._has_room(self.waiting[0]):
            request = self.waiting.popleft()
            if request.blocks:
                request.pool = BlockPool(self.pool.allocate(request.blocks))
            else:
                request.pool = self.pool
            self._reserve(request, len(request.sequences[0].ids))
            self.running.append(request)
            self.running.sort(key=lambda one: one.number)

    def next_chunks(self) -> list[Chunk]:
        """The next chunk of each of the oldest requests that have one: the first, and what fits."""
        chunks: list[Chunk] = []
        left = self._prefill_tokens
        # Growing stops the youngest at most, never one whose chunk is already here.
        for request in list(self.running):
            sequence = request.sequences[0]
            begin, end = sequence.computed, self._prefill_end(request)
            if begin >= end or request not in self.running:
                continue
            size = min(end - begin, self._chunk_size)
            if (chunks and size > left) or not self._grow(request, end):
                break
            chunks.append(Chunk(request, sequence, begin, begin + size))
            left -= size
        return chunks

    def next_tokens(self) -> list[Chunk]:
        """One token of every sequence whose prompt is in the cache."""
        for request in list(self.running):
            if request in self.running and self._decodes(request):
                self._grow(request, request.sequences[0].computed + 1)
        return [
            Chunk(request, sequence, sequence.computed, sequence.computed + 1)
            for request in self.running
            if self._decodes(request)
            for sequence in request.sequences
        ]

    def forget_computed(self, request: Request) -> None:
        """After each token without a cache: the next one starts from the beginning."""
        if not self._use_past and request.beams is None:
            request.sequences[0].computed = 0

    def _prefill_end(self, request: Request) -> int:
        if self._use_past or request.beams is not None:
            return len(request.prompt_ids)
        return len(request.sequences[0].ids)

    def _decodes(self, request: Request) -> bool:
        first = request.sequences[0]
        return self._prefill_end(request) <= first.computed < len(first.ids)

    def _has_room(self, request: Request) -> bool:
        width = sum(one.params.num_beams for one in [*self.running, request])
        if width > self._max_batch_size:
            return False
        needed = request.blocks or blocks_for(len(request.sequences[0].ids), self._block_size)
        # A block for each that runs, or a newcomer would be thrown out again at once.
        return needed + len(self.running) <= self.pool.free

    def _reserve(self, request: Request, positions: int) -> None:
        """Blocks for so many positions of every sequence.

        Raises OutOfBlocksError, which cannot happen to a beam search: it has its own.
        """
        for sequence in request.sequences:
            missing = blocks_for(positions, self._block_size) - len(sequence.table)
            if missing > 0:
                sequence.table += request.own_pool.allocate(missing)

    def _grow(self, request: Request, positions: int) -> bool:
        """Make room for so many positions; False when the request itself had to give way."""
        table = request.sequences[0].table
        missing = blocks_for(positions, self._block_size) - len(table)
        while request.beams is None and missing > self.pool.free:
            # Beam searches hold what they reserved; taking one back would cost too much.
            youngest = [one for one in self.running if one.beams is None][-1]
            self._stop(youngest)
            self.waiting.appendleft(youngest)
            if youngest is request:
                return False
        self._reserve(request, positions)
        return True

    def _stop(self, request: Request) -> None:
        self.running.remove(request)
        for sequence in request.sequences:
            request.own_pool.release(sequence.table)
            sequence.table, sequence.computed = [], 0
        if request.blocks:
            self.pool.release(request.own_pool.blocks)
        request.pool = None
