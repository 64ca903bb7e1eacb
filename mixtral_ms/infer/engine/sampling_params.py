"""What a request asks for, and what it is given."""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.errors import UserError

MOST_SEED = 2**64 - 1
FinishReason = Literal["eos", "stop", "length", "error"]


@dataclass(frozen=True)
class SamplingParams:
    """How one answer is generated. A value out of range is a UserError that names it."""

    max_new_tokens: int | None = None
    """Longest answer; None means up to the end of the context, 0 scores the prompt only."""
    max_length: int | None = None
    """Longest prompt and answer together (max_decode_length of a YAML); None means the context."""
    do_sample: bool = False
    """Draw each token (True) or take the likeliest (False)."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token, as do_sample False."""
    top_k: int = 0
    """Draw from the k likeliest tokens only; 0 means all."""
    top_p: float = 1.0
    """Draw from the fewest tokens whose probabilities reach this sum."""
    min_p: float = 0.0
    """Draw from tokens at least this share as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens of prompt and answer, and multiplies negative ones."""
    presence_penalty: float = 0.0
    """Taken off the logits of tokens of the answer."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these strings."""
    stop_token_ids: tuple[int, ...] = ()
    """The answer ends before the first of these ids, besides the model's eos."""
    ignore_eos: bool = False
    """Go on after eos."""
    seed: int = 0
    """The same seed and prompt give the same answer, whatever other requests there are; draws for
    other prompts are independent."""
    num_beams: int = 1
    """Hypotheses of a beam search; 1 means none. Beams are not sampled."""
    logprobs: bool = False
    """Give the log-probability of each token of the answer."""
    prompt_logprobs: bool = False
    """Give the log-probability of each token of the prompt but the first."""

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            if isinstance(value, (str, int)):
                value = (value,)
            object.__setattr__(self, name, tuple(value or ()))
        _check_numbers(self)
        _check_stops(self)
        for name in ("do_sample", "stop"):
            if self.num_beams > 1 and getattr(self, name):
                raise UserError(
                    f"num_beams {self.num_beams} does not go with {name} {getattr(self, name)!r}: "
                    "a beam search takes the likeliest whole answers; choose one of them"
                )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return not self.do_sample or self.temperature == 0

    @classmethod
    def from_model_config(cls, config: MixtralConfig, **overrides: Any) -> "SamplingParams":
        """The generation keys of a YAML's model_config, then `overrides` that are not None."""
        values: dict[str, Any] = {
            "do_sample": config.do_sample,
            "top_k": config.top_k,
            "top_p": config.top_p,
            "temperature": config.temperature,
            "repetition_penalty": config.repetition_penalty,
            "max_length": config.max_decode_length,
            "max_new_tokens": config.max_new_tokens,
        }
        known = [one.name for one in dataclasses.fields(cls)]
        for name, value in overrides.items():
            if name not in known:
                raise UserError(f"{name!r} is no generation parameter: allowed are {known}")
            if value is not None:
                values[name] = value
        return cls(**values)


# (parameter, type, least, whether the least is allowed, most)
_NUMBERS = (
    ("max_new_tokens", int, 0, True, math.inf),
    ("max_length", int, 1, True, math.inf),
    ("temperature", float, 0, True, math.inf),
    ("top_k", int, 0, True, math.inf),
    ("top_p", float, 0, False, 1),
    ("min_p", float, 0, True, 1),
    ("repetition_penalty", float, 0, False, math.inf),
    ("presence_penalty", float, -math.inf, False, math.inf),
    ("seed", int, 0, True, MOST_SEED),
    ("num_beams", int, 1, True, 64),
)
_OPTIONAL = {"max_new_tokens", "max_length"}


def _check_numbers(params: SamplingParams) -> None:
    for name, kind, least, inclusive, most in _NUMBERS:
        value = getattr(params, name)
        if value is None and name in _OPTIONAL:
            continue
        allowed = f"{'a whole number' if kind is int else 'a number'}, "
        allowed += f"{'at least' if inclusive else 'above'} {least}"
        allowed += "" if most == math.inf else f", at most {most}"
        numeric = (int, np.integer) if kind is int else (int, float, np.integer, np.floating)
        fits = (
            isinstance(value, numeric)
            and not isinstance(value, bool)
            and math.isfinite(value)
            and (value >= least if inclusive else value > least)
            and value <= most
        )
        if not fits:
            raise UserError(f"{name} {value!r}: must be {allowed}")


def _check_stops(params: SamplingParams) -> None:
    for text in params.stop:
        if not isinstance(text, str) or not text:
            raise UserError(f"stop {text!r}: must be a text of at least one character")
    for one in params.stop_token_ids:
        if isinstance(one, bool) or not isinstance(one, (int, np.integer)) or one < 0:
            raise UserError(f"stop_token_ids {one!r}: must be whole numbers, at least 0")


@dataclass(frozen=True)
class Generation:
    """The answer to one request."""

    prompt: str
    text: str
    token_ids: tuple[int, ...]
    """Of the answer, with the eos or the stop string's tokens that ended it."""
    finish_reason: FinishReason
    prompt_token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] | None = None
    """Natural logarithms, one for each of token_ids, of the network's own distribution."""
    prompt_logprobs: tuple[float, ...] | None = None
    """One for each token of the prompt but the first."""
    error: str | None = None
    """Why finish_reason is "error"."""
    first_token_seconds: float | None = None
    """From submission to the first token."""
    seconds: float = 0.0
    """From submission to the end."""


@dataclass(frozen=True)
class TokenEvent:
    """What one step of the engine did for one request."""

    request: int
    """The id that `Engine.submit` returned."""
    token_id: int | None
    """The new token; None when the request ended without one."""
    text: str
    """The text that can be shown since the last event: whole characters, no part of a stop
    string."""
    logprob: float | None = None
    generation: Generation | None = field(default=None, repr=False)
    """The whole answer, with the request's last event."""


def whole_answer(events: Iterable[TokenEvent]) -> Generation:
    """The answer that the last event of a request holds.

    Raises RuntimeError when the events end without it: the request was cancelled.
    """
    for event in events:
        if event.generation is not None:
            return event.generation
    raise RuntimeError("the request was cancelled before its answer was whole")
