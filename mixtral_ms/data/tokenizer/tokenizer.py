"""Text to ids and back with a sentencepiece `tokenizer.model`, on the fastest exact path.

Text is always encoded literally: `<s>`, `</s>` and `<unk>` in it are plain characters, never
control ids, so that data cannot inject them. The ids equal SentencePieceProcessor.encode's.
"""

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import sentencepiece

from mixtral_ms.data.tokenizer.fast_encoders import Encoder, GigatokenEncoder, load_kitoken
from mixtral_ms.data.tokenizer.sentencepiece_model import is_plain_bpe
from mixtral_ms.data.tokenizer.token_offsets import encode_with_proto, piece_lengths
from mixtral_ms.errors import UserError
from mixtral_ms.file_kind import not_as_wanted, require_file
from mixtral_ms.log import get_logger

Backend = Literal["auto", "sentencepiece", "kitoken", "gigatoken"]

_SPACE_MARK = "\u2581"

# One string for each thing two implementations may see differently: control literals, the dummy
# prefix, runs of white space, byte fallback, combining and joined characters, line ends, NUL.
_SELF_CHECK = (
    "",
    " ",
    "   leading and trailing   ",
    "Hello, world! It's 3.14159 and 1,234,567.",
    "<s>literal</s> <unk> <0x0A> [INST] not control [/INST]",
    f"{_SPACE_MARK}mark {_SPACE_MARK}{_SPACE_MARK} {_SPACE_MARK}",
    "line\nline\r\nline\n\n\n\ttab \x00nul\x7f\x1b",
    "e\u0301 \u00e9 \ufb01 \u200b\ufeff \uff21 \u2160",
    "\u4f60\u597d\u4e16\u754c \u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4 \u0939\u093f\u0928",
    "\U0001f600 \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0010ffff \ue000",
    "def f(x):\n        return  x ** 2   # aaaaaaaaaaaaaaaaaaaaaaaaaaaa ================",
)


class Tokenizer:
    """A sentencepiece tokenizer.

    Args:
        model_file: the `tokenizer.model`.
        backend: "auto" takes kitoken (about three times as fast) when it is installed, the model is
            of the kind for which it is proven equal, and it passes a self-check; otherwise
            sentencepiece. A backend asked for by name that cannot be used is a UserError.
        bulk: a lot of text will follow: "auto" prefers gigatoken, which takes half a second to load
            and is about ten times as fast.

    Raises UserError for a file that is absent or is no sentencepiece model.
    """

    def __init__(
        self, model_file: str | Path, backend: Backend = "auto", *, bulk: bool = False
    ) -> None:
        if backend not in get_args(Backend):
            raise UserError(f"tokenizer backend {backend!r} is not one of {get_args(Backend)}")
        self.model_file = Path(model_file)
        self._model_bytes = _read_model(self.model_file)
        self._processor = _load_processor(self.model_file, self._model_bytes)
        self.backend = "sentencepiece"
        self._encode: Encoder = self._processor.encode
        if backend != "sentencepiece":
            self._choose(backend, bulk)

    @property
    def vocab_size(self) -> int:
        """Number of pieces; every id is below it."""
        return self._processor.vocab_size()

    @property
    def bos_id(self) -> int:
        """Id that begins a document, -1 when the model has none."""
        return self._processor.bos_id()

    @property
    def eos_id(self) -> int:
        """Id that ends a document, -1 when the model has none."""
        return self._processor.eos_id()

    @property
    def unk_id(self) -> int:
        """Id of the unknown piece."""
        return self._processor.unk_id()

    @property
    def pad_id(self) -> int:
        """Id of the padding piece, -1 when the model has none (as Mixtral's)."""
        return self._processor.pad_id()

    @property
    def fingerprint(self) -> str:
        """MD5 of the model file, in hex."""
        return hashlib.md5(self._model_bytes, usedforsecurity=False).hexdigest()

    @cached_property
    def splits_at_spaces(self) -> bool:
        """Whether encode(a + " " + b) == encode(a) + encode(b) for b that starts a word.

        True when no piece joins two words and white space is kept as it is; then a text of any
        length can be encoded in parts.
        """
        return is_plain_bpe(self._model_bytes)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without bos and eos. Raises UserError for a lone surrogate."""
        ids = self._encode_any(text)
        return ids if isinstance(ids, list) else ids.tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """As `encode`, as int32 (tokens,): the faster way for much text."""
        ids = self._encode_any(text)
        if isinstance(ids, list):
            return np.frombuffer(array("i", ids), dtype=np.int32)
        return ids.astype(np.int32)

    def encode_with_ends(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """As `encode_array`, and where each token ends in the text, in characters.

        The pieces of a character in several bytes all end behind it; a piece that stands for
        nothing (the space put in front) ends where it begins.
        """
        if self.splits_at_spaces:
            ids = self.encode_array(text)
            ends = self._piece_lengths[ids].cumsum(dtype=np.int32) - 1
            if not len(ids) or ends[-1] == len(text):
                return ids, ends
        try:
            return encode_with_proto(self._processor, text)
        except UnicodeEncodeError as error:
            raise UserError(_surrogate_message(text)) from error

    @cached_property
    def _piece_lengths(self) -> np.ndarray:
        return piece_lengths(self._processor)

    def _encode_any(self, text: str) -> list[int] | np.ndarray:
        try:
            return self._encode(text)
        except (UnicodeEncodeError, RuntimeError, TypeError) as error:
            raise UserError(_surrogate_message(text)) from error

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; control ids give nothing. Raises UserError for an id outside the model."""
        plain = [int(one) for one in ids]
        for one in plain:
            if not 0 <= one < self.vocab_size:
                raise UserError(f"id {one} is not in [0, {self.vocab_size}) of {self.model_file}")
        return self._processor.decode(plain)

    def id_to_piece(self, one: int) -> str:
        """The piece an id stands for, as the model writes it."""
        return self._processor.id_to_piece(int(one))

    def control_id(self, piece: str) -> int | None:
        """The id of a control piece; None where the model has no such piece."""
        one = self._processor.piece_to_id(piece)
        found = self._processor.is_control(one) and self._processor.id_to_piece(one) == piece
        return one if found else None

    def is_byte(self, one: int) -> bool:
        """Whether an id stands for one byte of a character."""
        return self._processor.is_byte(int(one))

    def _choose(self, backend: Backend, bulk: bool) -> None:
        """Take the first usable backend; one asked for by name must be usable."""
        wanted = (backend,) if backend != "auto" else ("gigatoken", "kitoken")[not bulk :]
        obstacles = []
        for name in wanted:
            encoder, obstacle = self._proven_encoder(name)
            if encoder is not None:
                self._encode, self.backend = encoder, name
                return
            obstacles.append(f"{name}: {obstacle}")
        if backend != "auto":
            raise UserError(f"this tokenizer backend cannot be used: {obstacles[0]}")
        get_logger().info("tokenizer: sentencepiece (%s)", "; ".join(obstacles))

    def _proven_encoder(self, name: str) -> tuple[Encoder | None, str]:
        """A faster encoder with the same ids, or None and the reason why there is none."""
        if not self.splits_at_spaces:
            return None, f"it is not proven equal for models of the kind of {self.model_file}"
        encoder: Encoder
        try:
            if name == "kitoken":
                encoder = load_kitoken(self._model_bytes)
            else:
                encoder = GigatokenEncoder(
                    self._model_bytes, self._control_pieces(), self._processor.encode
                )
        except ImportError:
            return None, f"the package is not installed; run: pip install {name}"
        except Exception as error:  # noqa: BLE001 - whatever it cannot load, sentencepiece can
            return None, f"it cannot load {self.model_file} ({error})"
        if not self._agrees(encoder):
            return None, f"its ids differ from sentencepiece's with {self.model_file}"
        return encoder, ""

    def _control_pieces(self) -> list[str]:
        processor = self._processor
        ids = (one for one in range(self.vocab_size) if processor.is_control(one))
        return [processor.id_to_piece(one) for one in ids]

    def _agrees(self, encoder: Encoder) -> bool:
        return all(list(encoder(text)) == self._processor.encode(text) for text in _SELF_CHECK)


def split_at_spaces(text: str, limit: int) -> Iterator[str]:
    """Parts of `text` of about `limit` characters, cut at (and without) single spaces.

    For a tokenizer that `splits_at_spaces`, the parts' ids joined are the text's ids. A stretch
    without a single space stays whole.
    """
    start = 0
    while len(text) - start > limit:
        cut = _next_single_space(text, start + limit)
        if cut < 0:
            break
        yield text[start:cut]
        start = cut + 1
    yield text[start:]


def _next_single_space(text: str, position: int) -> int:
    """Index of the first space from `position` with a visible character on both sides, or -1."""
    position = max(position, 1)
    while (found := text.find(" ", position)) >= 0:
        before, after = text[found - 1], text[found + 1 : found + 2]
        if after and not {before, after} & {" ", _SPACE_MARK}:
            return found
        position = found + 1
    return -1


_ADVICE = "give the tokenizer.model that comes with the model's weights"


def _read_model(path: Path) -> bytes:
    try:
        require_file(path)
        return path.read_bytes()
    except UserError as error:
        raise UserError(f"cannot read the tokenizer model {error}; {_ADVICE}") from error
    except OSError as error:
        raise UserError(
            f"cannot read the tokenizer model {path}: {error.strerror}; {_ADVICE}"
        ) from error


def _load_processor(path: Path, data: bytes) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(data)
        # the library asks for a piece's text only when it is used
        processor.id_to_piece(list(range(processor.vocab_size())))
    except (RuntimeError, UnicodeDecodeError) as error:
        if isinstance(error, UnicodeDecodeError):
            why = "damaged: one of its pieces is not UTF-8"
        elif data.lstrip()[:1] == b"{":
            why = "JSON, as Hugging Face's tokenizer.json"
        else:
            why = f"{len(data)} bytes"
        found = not_as_wanted(path, "a sentencepiece model", why)
        raise UserError(f"{found}; {_ADVICE}") from error
    return processor


def _surrogate_message(text: str) -> str:
    for index, character in enumerate(text):
        if "\ud800" <= character <= "\udfff":
            return (
                f"the text holds a lone surrogate {character!a} at character {index}, which is no "
                "Unicode text; repair or remove it"
            )
    return f"a text of {len(text)} characters cannot be encoded"
