"""What a request makes of its new logits: tokens, log-probabilities, and whether it ends."""

import time

import numpy as np

from mixtral_ms.infer.engine.beam_cache import continue_from
from mixtral_ms.infer.engine.beam_search import BeamSearch
from mixtral_ms.infer.engine.request import Request
from mixtral_ms.infer.engine.sampler import log_softmax, pick
from mixtral_ms.infer.engine.sampling_params import FinishReason, TokenEvent
from mixtral_ms.infer.engine.scheduler import Chunk

Copies = list[tuple[int, int]]


def advance(
    chunk: Chunk, logits: np.ndarray, end_ids: frozenset[int], block_size: int
) -> tuple[TokenEvent | None, Copies]:
    """Take the logits that `wants_logits` asked for, of all hypotheses of a request.

    Returns:
        What happened, None when nothing can be told yet; and cache blocks to copy (from, to).
    """
    request = chunk.request
    if chunk.end <= len(request.prompt_ids):
        _score_prompt(chunk, logits)
    if chunk.end < len(chunk.sequence.ids):
        return None, []
    if request.first_token is None:
        request.first_token = time.perf_counter()
    if request.limit == len(request.prompt_ids):
        return _event(request, None, "", "length"), []
    if request.beams is not None:
        return _advance_beams(request, request.beams, logits, end_ids, block_size)
    return _advance_one(request, logits[-1], end_ids), []


def _score_prompt(chunk: Chunk, logits: np.ndarray) -> None:
    """Log-probabilities of the prompt's tokens that follow those of the chunk."""
    request = chunk.request
    if not request.params.prompt_logprobs or len(request.prompt_logprobs) != chunk.begin:
        return
    following = np.array(request.prompt_ids[chunk.begin + 1 : chunk.end + 1], np.int64)
    scores = log_softmax(logits[: len(following)])
    request.prompt_logprobs += scores[np.arange(len(following)), following].tolist()


def _advance_one(request: Request, logits_V: np.ndarray, end_ids: frozenset[int]) -> TokenEvent:
    params, sequence = request.params, request.sequences[0]
    token = pick(logits_V, params, request.prompt_ids, request.answer_ids, request.draw_key)
    logprob = float(log_softmax(logits_V)[token]) if params.logprobs else None
    if logprob is not None:
        request.logprobs.append(logprob)
    sequence.ids.append(token)
    if token in end_ids:
        named = token in params.stop_token_ids
        return _event(request, token, "", "stop" if named else "eos", logprob)
    text = request.stream.push(token)
    if request.stream.stopped:
        return _event(request, token, text, "stop", logprob)
    if len(sequence.ids) == request.limit:
        return _event(request, token, text, "length", logprob)
    return TokenEvent(request.number, token, text, logprob)


def _advance_beams(
    request: Request,
    beams: BeamSearch,
    logits_WV: np.ndarray,
    end_ids: frozenset[int],
    block_size: int,
) -> tuple[TokenEvent | None, Copies]:
    parents = beams.advance(logits_WV[-len(request.sequences) :])
    if not beams.done:
        request.sequences, copies = continue_from(
            request.sequences, parents, beams.open, request.prompt_ids, request.own_pool, block_size
        )
        return None, copies
    ids = beams.finished[0].token_ids
    ended = ids[-1] in end_ids
    text = "".join([request.stream.push(one) for one in (ids[:-1] if ended else ids)])
    reason: FinishReason = "length"
    if ended:
        reason = "stop" if ids[-1] in request.params.stop_token_ids else "eos"
    return _event(request, None, text, reason), []


def _event(
    request: Request,
    token: int | None,
    text: str,
    reason: FinishReason,
    logprob: float | None = None,
) -> TokenEvent:
    """The last event, with the text that was held back."""
    text += request.stream.finish()
    return TokenEvent(request.number, token, text, logprob, request.result(reason))
