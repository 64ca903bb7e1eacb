"""Predict mode of the run command: prompts in, answers to stdout and to a file."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from mixtral_ms.cli.support.exit_status import EXIT_FAILURE, EXIT_OK
from mixtral_ms.cli.support.print_text import show
from mixtral_ms.config import RunConfig
from mixtral_ms.errors import UserError
from mixtral_ms.files import write_aside
from mixtral_ms.infer.engine.sampling_params import Generation, TokenEvent, whole_answer
from mixtral_ms.infer.load_model import LoadedModel
from mixtral_ms.infer.predict import answer_record
from mixtral_ms.infer.text.prompts import read_prompts
from mixtral_ms.log import get_logger
from mixtral_ms.train.trainer import Trainer

_SHOWN = 40


def run_predict(config: RunConfig) -> int:
    """Answer `predict_data`; returns 1 when a prompt could not be answered."""
    return answer_prompts(config, read_prompts(config.predict_data), print_answers)


def answer_prompts(
    config: RunConfig,
    prompts: Sequence[str],
    show_answers: Callable[[Sequence[Generation]], None],
) -> int:
    """Load the model, answer, show, write; a single prompt in a terminal is shown as it comes.

    Raises:
        UserError: the configuration, the weights or the output file cannot be used.
    """
    output = _checked_output(config)
    config.run_mode = "predict"
    trainer = Trainer(config)
    streaming = show_answers is print_answers and len(prompts) == 1 and sys.stdout.isatty()
    if streaming:
        answers = [stream_answer(trainer.model, prompts[0])]
        _print_logprobs(answers[0])
    else:
        answers = trainer.predict(prompts)
        if trainer.model.rank:
            return EXIT_OK  # the first rank speaks for all
        show_answers(answers)
    if output is not None:
        _write(output, answers)
        get_logger().info("%d answers: %s", len(answers), output)
    _log_speed(answers)
    return _report_failures(answers)


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


def _checked_output(config: RunConfig) -> Path | None:
    """The output file; refused before any work when it cannot be written."""
    name = config.generation.output_file
    if not name:
        return None
    path = Path(name)
    if path.is_dir():
        raise UserError(f"--output_file {path}: is a folder; name a file, for example in it")
    if path.exists() and not config.generation.overwrite:
        raise UserError(f"--output_file {path}: already exists; choose another, or add --overwrite")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_file {path}: {error.strerror}: {error.filename}") from None
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"--output_file {path}: {path.parent} cannot be written to")
    return path


def _write(path: Path, answers: Sequence[Generation]) -> None:
    lines = [json.dumps(answer_record(one), ensure_ascii=False) for one in answers]
    with write_aside(path) as aside:
        aside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


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
