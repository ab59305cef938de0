"""The sentencepiece tokenizer with its 300 sentinels.

Ids: pad 0, eos 1, then the pieces, and last the sentinels counting down, so that <extra_id_0> is the highest
id (T5's convention, facts 5.2). Text never becomes a sentinel: encoding uses the model without them, so a
document that contains "<extra_id_3>" literally is tokenised as ordinary characters.
"""

import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from sentencepiece import sentencepiece_model_pb2

from openmoe.data.config import TokenizerConfig
from openmoe.data.errors import DataError

PAD, EOS, UNK = 0, 1, 2
SENTINELS = 300

# Sentencepiece writes a space as this character, so the character itself would come back as a space.
_SPACE_MARK = "\u2581"


class Tokenizer:
    """Encodes text to ids and back; see the module for the ids."""

    def __init__(self, model: bytes, origin: str = "tokenizer") -> None:
        """`model` is a serialised sentencepiece model; `origin` names it in errors.

        Raises DataError where it can't be read or has other ids for pad and eos.
        """
        proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
        try:
            proto.ParseFromString(model)
        except DecodeError:
            raise DataError(f"{origin} is not a sentencepiece model") from None
        pieces = [piece.piece for piece in proto.pieces]
        sentinels = [f"<extra_id_{index}>" for index in reversed(range(SENTINELS))]
        if pieces[-SENTINELS:] == sentinels:
            del proto.pieces[-SENTINELS:]
        self._encoder = _processor(proto.SerializeToString(), origin)
        if (self._encoder.pad_id(), self._encoder.eos_id()) != (PAD, EOS):
            raise DataError(
                f"{origin} has pad id {self._encoder.pad_id()} and eos id {self._encoder.eos_id()}; "
                f"only pad {PAD} and eos {EOS} are allowed"
            )
        for sentinel in sentinels:
            proto.pieces.add(piece=sentinel, score=0.0, type=proto.SentencePiece.USER_DEFINED)
        self.model = proto.SerializeToString(deterministic=True)
        self._decoder = _processor(self.model, origin)
        # Number of ids, sentinels included.
        self.size: int = self._decoder.vocab_size()
        # Id of <extra_id_0>, the highest.
        self.first_sentinel: int = self.size - 1
        self.sha256 = hashlib.sha256(self.model).hexdigest()
        self._space_mark_ids = self._find_space_mark(proto)

    def _find_space_mark(self, proto: Any) -> list[int] | None:
        """The byte pieces of the space mark, where the model round-trips exactly otherwise."""
        if not proto.trainer_spec.byte_fallback or proto.normalizer_spec.add_dummy_prefix:
            return None
        return [self._encoder.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without EOS."""
        return self.encode_batch([text], threads=1)[0]

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        """Ids of each text, without EOS; the same for any number of threads."""
        if self._space_mark_ids is None or not any(_SPACE_MARK in text for text in texts):
            return self._encoder.encode(list(texts), num_threads=threads)
        return [self._encode_around_space_marks(text) for text in texts]

    def _encode_around_space_marks(self, text: str) -> list[int]:
        ids: list[int] = []
        for index, part in enumerate(text.split(_SPACE_MARK)):
            if index:
                ids += self._space_mark_ids or []
            ids += self._encoder.encode(part)
        return ids

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Text of `ids`; sentinels appear as <extra_id_N>, pad, eos and ids beyond the tokenizer as nothing.

        A model's vocabulary is often padded, so it may produce the latter.
        """
        return self._decoder.decode([int(i) for i in ids if i < self.size])


def _processor(model: bytes, origin: str) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise DataError(f"{origin} is not a usable sentencepiece model: {_one_line(error)}") from None
    return processor


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer in the file `path`. Raises DataError where it can't be read."""
    try:
        model = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(f"data.tokenizer.path={path}: {_one_line(error)}") from None
    return Tokenizer(model, f"data.tokenizer.path={path}")


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """A tokenizer of about `config.vocab_size` pieces plus the sentinels, the same for the same texts.

    Byte fallback and no normalisation: every text comes back exactly. Raises DataError where the texts are
    too little or too varied for that size.
    """
    model = io.BytesIO()
    lines = (line for text in texts for line in text.split("\n") if line and not line.isspace())
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            # A fixed number: the sums of unigram training depend on it.
            num_threads=2,
            pad_id=PAD,
            eos_id=EOS,
            unk_id=UNK,
            bos_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(
            f"no tokenizer of data.tokenizer.vocab_size={config.vocab_size} can be trained on these sources: "
            f"{_one_line(error)}"
        ) from None
    return Tokenizer(model.getvalue())


def encoding_threads() -> int:
    """Threads worth using for `encode_batch` here."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
