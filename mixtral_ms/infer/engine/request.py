"""One request on its way through the engine."""

import time
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field

from mixtral_ms.infer.engine.beam_search import BeamSearch
from mixtral_ms.infer.engine.block_pool import BlockPool
from mixtral_ms.infer.engine.sampling_params import FinishReason, Generation, SamplingParams
from mixtral_ms.infer.text.detokenizer import TextStream


@dataclass
class Sequence:
    """Tokens, and how many of them the cache holds."""

    ids: list[int]
    """Prompt and answer."""
    table: list[int] = field(default_factory=list)
    """Blocks of the cache, in order of positions."""
    computed: int = 0
    """Positions 0 .. computed - 1 are in the cache."""


@dataclass(eq=False)
class Request:
    """What was asked, what came of it so far."""

    number: int
    prompt: str
    prompt_ids: list[int]
    params: SamplingParams
    draw_key: int
    """Of the random stream that its tokens are drawn with."""
    limit: int
    """Longest prompt and answer together."""
    blocks: int
    """Blocks that a beam search reserves; 0 takes them one by one as they are needed."""
    stream: TextStream
    sequences: list[Sequence]
    beams: BeamSearch | None = None
    pool: BlockPool | None = None
    """Where the blocks come from, while the request runs."""
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    submitted: float = field(default_factory=time.perf_counter)
    first_token: float | None = None

    @property
    def own_pool(self) -> BlockPool:
        """`pool`, of a request that runs."""
        if self.pool is None:
            raise RuntimeError(f"request {self.number} does not run: it has no blocks")
        return self.pool

    @property
    def answer_ids(self) -> Ids[int]:
        """What was generated so far, of the only sequence there is without beams."""
        return self.sequences[0].ids[len(self.prompt_ids) :]

    def result(self, reason: FinishReason, error: str | None = None) -> Generation:
        """The answer as it stands."""
        ids, logprobs = tuple(self.answer_ids), tuple(self.logprobs)
        if self.beams is not None and self.beams.finished:
            best = self.beams.finished[0]
            ids, logprobs = best.token_ids, best.logprobs
        first = self.first_token
        return Generation(
            prompt=self.prompt,
            text=self.stream.text,
            token_ids=ids,
            finish_reason=reason,
            prompt_token_ids=tuple(self.prompt_ids),
            logprobs=logprobs if self.params.logprobs else None,
            prompt_logprobs=tuple(self.prompt_logprobs) if self.params.prompt_logprobs else None,
            error=error,
            first_token_seconds=None if first is None else first - self.submitted,
            seconds=time.perf_counter() - self.submitted,
        )
