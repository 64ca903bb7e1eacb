"""Chat templates by name: which encoder turns conversations into samples and prompts."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from mixtral_ms.data.conversations.chat_template import MISTRAL, ChatTemplate, load_template
from mixtral_ms.data.conversations.mistral_encoder import BEGIN_INST, MistralEncoder
from mixtral_ms.data.conversations.parse_conversation import Conversation, Round
from mixtral_ms.data.conversations.sample_encoder import Sample, SampleEncoder
from mixtral_ms.data.tokenizer.tokenizer import Tokenizer
from mixtral_ms.log import get_logger


class ConversationEncoder(Protocol):
    """One template with one tokenizer."""

    @property
    def name(self) -> str:
        """The template's."""

    @property
    def record(self) -> Mapping[str, Any]:
        """What to write down of the template, for `template_of_record`."""

    def __call__(self, conversation: Conversation) -> Sample:
        """The ids of a conversation, and which of them are supervised."""

    def prompt(self, rounds: Sequence[Round], system: str, question: str) -> list[int]:
        """The ids from which the answer to `question` follows, behind earlier rounds."""


def conversation_encoder(
    tokenizer: Tokenizer, template: str | ChatTemplate, eos_id: int | None = None
) -> ConversationEncoder:
    """The encoder of a template.

    Args:
        tokenizer: encodes.
        template: "mistral", Mixtral Instruct's own, which the tokenizer's version decides; one of
            fschat's; or the texts of one.
        eos_id: what ends each answer; None takes the tokenizer's.

    Raises UserError for a template or a tokenizer that cannot be used.
    """
    if template == MISTRAL:
        return MistralEncoder(tokenizer, eos_id)
    found = load_template(template) if isinstance(template, str) else template
    in_letters = BEGIN_INST in found.to_answer + found.opening + found.between
    if in_letters and tokenizer.control_id(BEGIN_INST) is not None:
        get_logger().warning(
            "template %s writes %s as letters, but %s has a piece for it: "
            "Mixtral Instruct's own template is --template %s",
            found.name, BEGIN_INST, tokenizer.model_file, MISTRAL,
        )  # fmt: skip
    return SampleEncoder(tokenizer, found, eos_id)
