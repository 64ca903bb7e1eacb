"""Beam search over one prompt, apart from how its hypotheses are computed and cached.

Legend: W hypotheses (beams), V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mixtral_ms.infer.engine.sampler import log_softmax, penalise
from mixtral_ms.infer.engine.sampling_params import SamplingParams

_RESERVES = 2


@dataclass(frozen=True)
class Hypothesis:
    """One possible answer."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    """Of the network's own distribution."""
    score: float = 0.0
    """Sum of log-probabilities after penalties; divided by the length once it is finished."""


class BeamSearch:
    """Keeps the `num_beams` best open hypotheses and the best finished ones.

    Scores of finished hypotheses are divided by their length. The search ends when the best open
    one, were it finished now, would not enter the finished ones (transformers' defaults
    length_penalty 1.0, early_stopping False).

    Args:
        params: num_beams and penalties.
        prompt_ids: what all hypotheses follow.
        longest: tokens of the longest answer, at least 1.
        end_ids: tokens that finish a hypothesis.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        longest: int,
        end_ids: frozenset[int],
    ) -> None:
        self._params, self._prompt_ids = params, prompt_ids
        self._longest, self._end_ids = longest, end_ids
        self._kept = max(_RESERVES, 1 + len(end_ids)) * params.num_beams
        self.open = [Hypothesis()]
        """What goes on, best first."""
        self.finished: list[Hypothesis] = []
        """At most num_beams, best first."""
        self.done = False

    def advance(self, logits_WV: np.ndarray) -> list[int]:
        """Take the logits behind each open hypothesis and choose the next open ones.

        Returns:
            For each hypothesis that is open now, the index of the one that it continues.
        """
        raw_WV = log_softmax(logits_WV)
        totals_WV = np.stack(
            [
                penalise(raw_V, self._params, self._prompt_ids, one.token_ids) + one.score
                for raw_V, one in zip(raw_WV, self.open, strict=True)
            ]
        )
        best = np.argsort(-totals_WV, axis=None, kind="stable")[: self._kept]
        parents, tokens = np.divmod(best, totals_WV.shape[1])
        still_open: list[tuple[int, Hypothesis]] = []
        for rank, (parent, token) in enumerate(zip(parents.tolist(), tokens.tolist(), strict=True)):
            before = self.open[parent]
            one = Hypothesis(
                (*before.token_ids, token),
                (*before.logprobs, float(raw_WV[parent, token])),
                float(totals_WV[parent, token]),
            )
            if token not in self._end_ids and len(one.token_ids) < self._longest:
                still_open.append((parent, one))
            elif rank < self._params.num_beams:  # the others are reserves to go on with
                self._finish(one)
        still_open = still_open[: self._params.num_beams]
        self.open = [one for _, one in still_open]
        self.done = not self.open or not self._can_improve()
        return [parent for parent, _ in still_open]

    def _finish(self, one: Hypothesis) -> None:
        length = len(one.token_ids)
        self.finished.append(Hypothesis(one.token_ids, one.logprobs, one.score / length))
        self.finished.sort(key=lambda each: -each.score)
        del self.finished[self._params.num_beams :]

    def _can_improve(self) -> bool:
        if len(self.finished) < self._params.num_beams:
            return True
        best_open = self.open[0].score / len(self.open[0].token_ids)
        return best_open > self.finished[-1].score
