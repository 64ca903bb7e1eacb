"""One chat: a model, its conversation, and how it answers."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from mixtral_ms.errors import UserError
from mixtral_ms.infer.engine.sampling_params import MOST_SEED, Generation, SamplingParams
from mixtral_ms.infer.load_model import LoadedModel
from mixtral_ms.infer.text.chat_history import ChatHistory

_LEAST_SHARE = 4  # without a wish of the user's, this part of the context is left to the answer
_MOST_SHARE = 2


class ChatSession:
    """Asks the model, and remembers what was said."""

    def __init__(self, model: LoadedModel, template: str | None = None) -> None:
        self._model = model
        self.params: SamplingParams = model.params
        self.history = ChatHistory(model.encoder_of(template) if template else model.chat_encoder)
        self.notes: list[str] = []
        """What the user should know of the last answer."""
        self._asked = 0
        self._dropped = 0

    def ask(self, question: str, stopped: Callable[[], object] = lambda: False) -> Iterator[str]:
        """The answer piece by piece; when it is whole, or stopped, it joins the conversation.

        Args:
            question: what the user says.
            stopped: asked after every step; a true value ends the answer where it is.

        Raises:
            UserError: the question alone is longer than the context, or is no text; it is left
                out of the conversation.
        """
        self.notes = []
        ids = self._fitting_ids(question)
        # The same words asked again get another answer, the same session the same ones.
        params = replace(self.params, seed=(self.params.seed + self._asked) % (MOST_SEED + 1))
        self._asked += 1
        engine = self._model.engine
        pieces: list[str] = []
        answer: Generation | None = None
        number = engine.submit(ids, params)
        try:
            while answer is None and not stopped():
                for event in engine.step():
                    text = event.text if pieces else event.text.lstrip()
                    if text:
                        pieces.append(text)
                        yield text
                    answer = event.generation
        finally:
            engine.cancel(number)
        self._take_in(question, "".join(pieces).strip(), answer)

    def reset(self) -> None:
        """Forget all turns; the system text stays."""
        self.history.turns.clear()
        self._dropped = 0

    def _fitting_ids(self, question: str) -> list[int]:
        context = self._model.network.seq_length
        if self.params.max_length is not None:
            context = min(context, self.params.max_length)
        wanted = self.params.max_new_tokens or context // _LEAST_SHARE
        room = context - max(1, min(wanted, context // _MOST_SHARE))
        ids, dropped = self.history.prompt_ids(question, room)
        if dropped > self._dropped:
            self.notes.append(
                f"the history is longer than the context of {context} tokens: the oldest "
                f"{dropped} of {len(self.history.turns)} turns are no longer seen"
            )
        self._dropped = dropped
        return ids

    def _take_in(self, question: str, text: str, answer: Generation | None) -> None:
        if answer is None:
            self.notes.append("stopped")
        elif answer.error is not None:
            raise UserError(answer.error)
        elif answer.finish_reason == "length":
            self.notes.append(f"cut at {len(answer.token_ids)} tokens; /set max_new_tokens=N")
        if text:
            self.history.turns.append((question, text))
        else:
            self.notes.append("no answer: the question is left out of the history")
