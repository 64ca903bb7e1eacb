"""Continuous batching over a KV cache: many requests, each answered as if it were alone."""

import weakref
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

from mixtral_ms.config.derived.prediction import PREFILL_CHUNK
from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.errors import UserError
from mixtral_ms.infer.engine.beam_cache import reserved_blocks
from mixtral_ms.infer.engine.beam_search import BeamSearch
from mixtral_ms.infer.engine.block_pool import blocks_for, check_fits
from mixtral_ms.infer.engine.decode_step import advance
from mixtral_ms.infer.engine.request import Request
from mixtral_ms.infer.engine.request import Sequence as CachedSequence
from mixtral_ms.infer.engine.sampler import draw_key
from mixtral_ms.infer.engine.sampling_params import (
    Generation,
    SamplingParams,
    TokenEvent,
    whole_answer,
)
from mixtral_ms.infer.engine.scheduler import Chunk, Scheduler
from mixtral_ms.infer.engine.step_batch import step_input, wants_logits
from mixtral_ms.infer.runners.base import Runner
from mixtral_ms.infer.text.detokenizer import TextStream, TokenizerLike

_CONTEXT = "the context (seq_length)"
Prompt = str | Sequence[int]
"""Text, before which bos is put, or ids, which are taken as they are."""


class Engine:
    """Generates answers; a request may be submitted or cancelled between any two steps.

    Args:
        runner: the network and its cache.
        tokenizer: of the network.
        config: context (`seq_length`), eos and `use_past`.
        max_batch_size: most sequences that run at once.
        prefill_chunk: a prompt is taken in chunks of so many tokens, between which the other
            requests go on.
        prefill_tokens: chunks of several prompts are taken together up to so many tokens, which
            is faster; what runs already waits for them.

    Raises:
        UserError: the tokenizer has ids that the network does not know.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: TokenizerLike,
        config: MixtralConfig,
        *,
        max_batch_size: int = 32,
        prefill_chunk: int = PREFILL_CHUNK,
        prefill_tokens: int = 2048,
    ) -> None:
        if tokenizer.vocab_size > config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} pieces and the network "
                f"vocab_size {config.vocab_size}: give the tokenizer that the network was "
                "trained with"
            )
        for name, value in (
            ("batch size", max_batch_size),
            ("prefill chunk", prefill_chunk),
            ("prefill tokens", prefill_tokens),
        ):
            if value < 1:
                raise UserError(f"{name} {value}: must be at least 1")
        self._runner, self._tokenizer, self._config = runner, tokenizer, config
        self._max_batch_size = max_batch_size
        self._scheduler = Scheduler(
            runner.num_blocks,
            runner.block_size,
            max_batch_size,
            prefill_chunk,
            prefill_tokens,
            config.use_past,
        )
        self._requests: dict[int, Request] = {}
        self._followed: dict[int, deque[TokenEvent]] = {}
        self._submitted = 0

    @property
    def busy(self) -> bool:
        """Whether a request is unfinished."""
        return bool(self._requests)

    def submit(self, prompt: Prompt, params: SamplingParams | None = None) -> int:
        """Queue a request; returns its id.

        Raises:
            UserError: the prompt leaves no room in the context, or the request could never fit
                into the cache; both numbers are in the message.
        """
        params = params or SamplingParams.from_model_config(self._config)
        ids = self._prompt_ids(prompt)
        limit, blocks = self._room(len(ids), params)
        beams = None
        if params.num_beams > 1 and limit > len(ids):
            beams = BeamSearch(params, ids, limit - len(ids), self._end_ids(params))
        number = self._submitted
        self._submitted += 1
        request = Request(
            number=number,
            prompt=prompt if isinstance(prompt, str) else self._text(ids),
            prompt_ids=ids,
            params=params,
            draw_key=draw_key(params.seed, ids),
            limit=limit,
            blocks=blocks,
            stream=TextStream(self._tokenizer, ids, params.stop),
            sequences=[CachedSequence(list(ids))],
            beams=beams,
        )
        self._requests[number] = request
        self._scheduler.add(request)
        return number

    def step(self) -> list[TokenEvent]:
        """Pieces of some prompts, then one token of every request whose prompt is done.

        Returns what happened, in the order of submission within each of the two.
        """
        self._scheduler.admit()
        events = []
        for choose in (self._scheduler.next_chunks, self._scheduler.next_tokens):
            if chunks := choose():
                events += self._compute(chunks)
        for event in events:
            if event.request in self._followed:
                self._followed[event.request].append(event)
        return events

    def cancel(self, number: int) -> None:
        """Drop a request, wherever it is; nothing happens when it is finished or unknown."""
        request = self._requests.pop(number, None)
        if request is not None:
            self._scheduler.remove(request)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[TokenEvent]:
        """The answer token by token; the last event holds the whole.

        Leaving the iterator early, or never starting it, cancels the request. Raises UserError as
        `submit`, at once.
        """
        number = self._subscribe(prompt, params)
        events = self._follow(number)
        # A generator that is dropped before its first value never comes to its `finally`.
        weakref.finalize(events, self._leave, number)
        return events

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Generation]:
        """Answers, in the order of the prompts.

        What is wrong with one prompt is said in its answer (finish_reason "error"); the others
        are answered all the same.
        """
        every = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(every) != len(prompts):
            raise UserError(f"{len(prompts)} prompts and {len(every)} sets of parameters")
        started: list[int | Generation] = []
        for prompt, one in zip(prompts, every, strict=True):
            try:
                started.append(self._subscribe(prompt, one))
            except UserError as error:
                text = prompt if isinstance(prompt, str) else ""
                started.append(Generation(text, "", (), "error", error=str(error)))
        numbers = [one for one in started if isinstance(one, int)]
        try:
            answers = {number: self._last(number) for number in numbers}
        finally:
            for number in numbers:
                self._leave(number)
        return [answers[one] if isinstance(one, int) else one for one in started]

    def _subscribe(self, prompt: Prompt, params: SamplingParams | None) -> int:
        number = self.submit(prompt, params)
        self._followed[number] = deque()
        return number

    def _leave(self, number: int) -> None:
        self._followed.pop(number, None)
        self.cancel(number)

    def _follow(self, number: int) -> Iterator[TokenEvent]:
        events = self._followed[number]
        try:
            while events or number in self._requests:
                if not events:
                    self.step()
                    continue
                yield events.popleft()
        finally:
            self._leave(number)

    def _last(self, number: int) -> Generation:
        return whole_answer(self._follow(number))

    def _compute(self, chunks: list[Chunk]) -> list[TokenEvent]:
        """Run one step and hand every request its tokens' logits."""
        scored = [wants_logits(chunk) for chunk in chunks]
        logits = self._runner.step(step_input(chunks, scored))
        finite = np.isfinite(logits).all(-1)
        events: list[TokenEvent] = []
        requests: dict[int, tuple[Chunk, list[slice]]] = {}
        offset = 0
        for chunk, wanted in zip(chunks, scored, strict=True):
            chunk.sequence.computed = chunk.end
            span = slice(offset, offset + len(wanted))
            offset = span.stop
            requests.setdefault(chunk.request.number, (chunk, []))[1].append(span)
        for chunk, spans in requests.values():
            span = slice(spans[0].start, spans[-1].stop)
            event = self._advance(chunk, logits[span], finite[span])
            events += [event] if event else []
        return events

    def _advance(self, chunk: Chunk, logits: np.ndarray, finite: np.ndarray) -> TokenEvent | None:
        request = chunk.request
        event: TokenEvent | None
        if not finite.all():
            wrong = "the network's logits are not finite (NaN or infinity): its weights are damaged"
            event = TokenEvent(request.number, None, "", None, request.result("error", wrong))
        else:
            event, copies = advance(
                chunk, logits, self._end_ids(request.params), self._runner.block_size
            )
            if copies:
                self._runner.copy_blocks(copies)
        if event is None:
            return None
        if event.generation is not None:
            self._scheduler.remove(request)
            del self._requests[request.number]
        else:
            self._scheduler.forget_computed(request)
        return event

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            bos = [self._tokenizer.bos_id] if self._tokenizer.bos_id >= 0 else []
            ids = [*bos, *self._tokenizer.encode(prompt)]
        else:
            ids = [int(one) for one in prompt]
        if not ids:
            raise UserError("the prompt is empty, and the tokenizer has no bos to begin with")
        for one in ids:
            if not 0 <= one < self._config.vocab_size:
                raise UserError(f"prompt id {one} is not in [0, {self._config.vocab_size})")
        return ids

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode([i for i in ids if i < self._tokenizer.vocab_size])

    def _longer_context(self, name: str, context: int) -> str:
        """What to do beside shortening a prompt."""
        most = self._config.max_position_embedding
        if name != _CONTEXT:
            return ", or raise it"
        return f", or raise seq_length (the network takes {most})" if most > context else ""

    def _end_ids(self, params: SamplingParams) -> frozenset[int]:
        eos = () if params.ignore_eos else self._config.eos_token_ids
        return frozenset((*eos, *params.stop_token_ids))

    def _room(self, prompt: int, params: SamplingParams) -> tuple[int, int]:
        """Longest prompt and answer together, and the blocks to reserve for a beam search."""
        block_size, available = self._runner.block_size, self._runner.num_blocks
        context = self._config.seq_length
        name = _CONTEXT
        if params.max_length is not None and params.max_length < context:
            context, name = params.max_length, "max_decode_length"
        scoring = params.max_new_tokens == 0
        if prompt + (not scoring) > context:
            raise UserError(
                f"the prompt has {prompt} tokens and {name} is {context}, prompt and answer "
                f"together: shorten the prompt{self._longer_context(name, context)}"
            )
        limit = context
        if params.max_new_tokens is not None:
            limit = min(context, prompt + params.max_new_tokens)
        if params.num_beams > 1:
            if params.num_beams > self._max_batch_size:
                raise UserError(
                    f"num_beams {params.num_beams} is above the batch size {self._max_batch_size}"
                )
            blocks = reserved_blocks(prompt, limit, params.num_beams, block_size)
            check_fits(blocks, available, block_size, f"a search of {params.num_beams} beams")
            return limit, blocks
        # Without a wish of the user's, the cache bounds the answer as the context does.
        if params.max_new_tokens is None:
            limit = max(min(limit, available * block_size), prompt + 1)
        check_fits(blocks_for(limit, block_size), available, block_size, "the request")
        return limit, 0
