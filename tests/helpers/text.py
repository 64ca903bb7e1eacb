"""Real text through the real tokenizer, as batches."""

import pydoc_data.topics
from pathlib import Path

import mistral_common
import numpy as np
import sentencepiece

from mixtral_ms.data.loader.batch import Batch

VOCABULARY = 32000


def standard_library_text() -> str:
    """Python's reference texts, the same text on every machine with the same Python."""
    return "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))


def batches(text: str, count: int, batch_size: int, seq_length: int) -> list[Batch]:
    """The text's first records of seq_length + 1 ids."""
    model = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model))
    records = count * batch_size
    ids = tokenizer.encode(text[: records * (seq_length + 1) * 6])
    assert len(ids) >= records * (seq_length + 1), "the text is too short"
    ids = np.array(ids[: records * (seq_length + 1)], np.int32)
    rows = ids.reshape(count, batch_size, seq_length + 1)
    return [Batch(np.ascontiguousarray(r[:, :-1]), np.ascontiguousarray(r[:, 1:])) for r in rows]
