"""Prompts to answers: all at once through the engine, with progress."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from mixtral_ms.errors import UserError
from mixtral_ms.infer.engine.sampling_params import Generation, SamplingParams
from mixtral_ms.infer.load_model import LoadedModel
from mixtral_ms.progress import progress_bar


def predict(
    model: LoadedModel,
    prompts: Sequence[str],
    params: SamplingParams | None = None,
    on_answer: Callable[[int, Generation], None] = lambda index, answer: None,
) -> list[Generation]:
    """Answers in the order of the prompts.

    What is wrong with one prompt is said in its answer (finish_reason "error"); the others are
    answered all the same.

    Args:
        model: what `load_model` gave.
        prompts: texts.
        params: how; None means as the configuration says.
        on_answer: called with each answer and its prompt's index, as soon as it is whole.
    """
    answers: dict[int, Generation] = {}
    running: dict[int, int] = {}
    engine = model.engine

    def take(index: int, answer: Generation) -> None:
        # A prompt that was given as ids comes back as the tokenizer reads it.
        answers[index] = replace(answer, prompt=prompts[index])
        on_answer(index, answers[index])
        bar.update()

    try:
        with progress_bar(len(prompts), "answering", "prompt") as bar:
            for index, text in enumerate(prompts):
                try:
                    running[engine.submit(model.prompt(text), params or model.params)] = index
                except UserError as error:
                    take(index, Generation(text, "", (), "error", error=str(error)))
            while running:
                for event in engine.step():
                    if event.generation is not None and event.request in running:
                        take(running.pop(event.request), event.generation)
    finally:
        for number in running:
            engine.cancel(number)
    return [answers[index] for index in range(len(prompts))]


def answer_record(answer: Generation) -> dict[str, Any]:
    """An answer as one line of an output file."""
    return {
        "prompt": answer.prompt,
        "text": answer.text,
        "token_ids": list(answer.token_ids),
        "logprobs": None if answer.logprobs is None else list(answer.logprobs),
        "finish_reason": answer.finish_reason,
        "error": answer.error,
        "prompt_tokens": len(answer.prompt_token_ids),
        "first_token_seconds": answer.first_token_seconds,
        "seconds": answer.seconds,
        "tokens_per_second": tokens_per_second(answer),
    }


def tokens_per_second(answer: Generation) -> float | None:
    """Of one answer, from its submission to its end; None without tokens."""
    return len(answer.token_ids) / answer.seconds if answer.token_ids and answer.seconds else None
