"""Predict mode of the run command: prompts in, answers to stdout and to a file."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

from mixtral_ms.cli.support.answers.answer_file import TakeAnswer, answer_file, checked_output
from mixtral_ms.cli.support.exit_status import EXIT_FAILURE, EXIT_OK
from mixtral_ms.cli.support.print_text import show
from mixtral_ms.config import RunConfig
from mixtral_ms.errors import UserError
from mixtral_ms.infer.engine.sampling_params import Generation, TokenEvent, whole_answer
from mixtral_ms.infer.load_model import LoadedModel
from mixtral_ms.infer.predict import predict
from mixtral_ms.infer.text.prompts import read_prompts
from mixtral_ms.log import get_logger
from mixtral_ms.parallel.comm.launched import is_scheduler, own_rank
from mixtral_ms.train.trainer import Trainer

_SHOWN = 40


def run_predict(config: RunConfig, config_file: str) -> int:
    """Answer `predict_data`; returns 1 when a prompt could not be answered."""
    return answer_prompts(config, config_file, config.predict_data, "--predict_data", print_answers)


def answer_prompts(
    config: RunConfig,
    config_file: str,
    given: str | Sequence[str] | None,
    flag: str,
    show_answers: Callable[[Sequence[Generation]], None],
) -> int:
    """Load the model, answer, write, show; a single prompt in a terminal is shown as it comes.

    Args:
        config: of the run.
        config_file: its YAML.
        given: prompts, and names of files of them.
        flag: with which they were given.
        show_answers: prints them.

    Raises:
        UserError: prompts, configuration, weights or output file cannot be used.
    """
    prompts = read_prompts(given, flag)
    config.run_mode = "predict"
    items = [given] if isinstance(given, str) else list(given or ())
    inputs = [("--config", config_file), *((flag, one) for one in items)]
    with _output(config, inputs) as take:
        trainer = Trainer(config)
        streaming = show_answers is print_answers and len(prompts) == 1 and sys.stdout.isatty()
        if streaming:
            answers = [stream_answer(trainer.model, prompts[0])]
            take(0, answers[0])
        else:
            answers = predict(trainer.model, prompts, on_answer=take)
    if trainer.model.rank:
        return EXIT_OK  # the first rank speaks for all
    if config.generation.output_file:
        get_logger().info("%d answers: %s", len(answers), config.generation.output_file)
    if streaming:
        _print_logprobs(answers[0])
    else:
        show_answers(answers)
    _log_speed(answers)
    return _report_failures(answers)


@contextlib.contextmanager
def _output(config: RunConfig, inputs: list[tuple[str, str]]) -> Iterator[TakeAnswer]:
    """What takes answers: into the output file, where one is asked for and this rank speaks."""
    section = config.generation
    if not section.output_file:
        yield lambda index, answer: None
        return
    inputs += [("--load_checkpoint", config.load_checkpoint or "")]
    inputs += [("--vocab_file", config.processor.tokenizer.vocab_file or "")]
    path = checked_output(section.output_file, overwrite=section.overwrite, inputs=inputs)
    if own_rank() or is_scheduler():
        yield lambda index, answer: None
        return
    with answer_file(path, overwrite=section.overwrite) as take:
        yield take


def print_answers(answers: Sequence[Generation]) -> None:
    """Each prompt with its answer behind it; several with a line before each."""
    for number, answer in enumerate(answers, 1):
        if len(answers) > 1:
            print(f"--- {number} of {len(answers)} ({answer.finish_reason}) ---")
        show(f"{answer.prompt}{answer.text}\n")
        _print_logprobs(answer)


def stream_answer(model: LoadedModel, prompt: str) -> Generation:
    """Print a prompt and its answer token by token."""
    try:
        events = model.engine.stream(model.prompt(prompt), model.params)
    except UserError as error:
        return Generation(prompt, "", (), "error", error=str(error))
    show(prompt)
    answer = whole_answer(_shown(events))
    show("\n")
    return answer


def _shown(events: Iterable[TokenEvent]) -> Iterator[TokenEvent]:
    for event in events:
        show(event.text)
        yield event


def _print_logprobs(answer: Generation) -> None:
    if answer.logprobs:
        total = sum(answer.logprobs)
        mean = total / len(answer.logprobs)
        print(f"(log-probability {total:.3f}, {mean:.3f} a token)")


def _log_speed(answers: Sequence[Generation]) -> None:
    """One line: how many tokens, how soon and how fast, over all answers together."""
    done = [one for one in answers if one.first_token_seconds is not None]
    firsts = [one.first_token_seconds for one in done if one.first_token_seconds is not None]
    if not firsts:
        return
    tokens = sum(len(one.token_ids) for one in done)
    seconds = max(one.seconds for one in done)
    get_logger().info(
        "first token after %.3f s; %d tokens in %.2f s, %.1f tokens/s",
        min(firsts),
        tokens,
        seconds,
        tokens / seconds,
    )


def _report_failures(answers: Sequence[Generation]) -> int:
    failed = [(number, one) for number, one in enumerate(answers, 1) if one.error]
    for number, one in failed:
        start = one.prompt[:_SHOWN] + ("…" if len(one.prompt) > _SHOWN else "")
        print(f"error: prompt {number} ({start!r}): {one.error}", file=sys.stderr)
    return EXIT_FAILURE if failed else EXIT_OK
