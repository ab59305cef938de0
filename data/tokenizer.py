"""The sentencepiece tokenizer with its 300 sentinels.

Ids: pad 0, eos 1, then the pieces, and last the sentinels counting down, so that <extra_id_0> is the highest
id (T5's convention, facts 5.2). Text never becomes a sentinel: encoding uses the model without them, so a
document that contains "<extra_id_3>" literally is tokenised as ordinary characters.

Any sentencepiece model can be used. One that has pad 0 and eos 1 keeps every id: umT5's 256,000 pieces stay,
and its sentinels are 256,000 to 256,299. Another is rebuilt: pad and eos, then its other pieces in their
order, then the sentinels. LLaMA's `<unk> 0, <s> 1, </s> 2, <0x00> 3 ...`, which has no pad, becomes
`<pad> 0, </s> 1, <unk> 2, <s> 3, <0x00> 4 ...`. A text is cut into the same pieces as before, for that
depends on the scores of the pieces and not on their order.
"""

import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from pydantic import BaseModel, Field
from sentencepiece import sentencepiece_model_pb2

from openmoe.data.config import TokenizerConfig
from openmoe.data.errors import DataError, one_line

PAD, EOS, UNK = 0, 1, 2
SENTINELS = 300

_SENTINEL_PIECES = tuple(f"<extra_id_{index}>" for index in reversed(range(SENTINELS)))
# Longer texts are encoded in segments.
SEGMENT_CHARACTERS = 1 << 20
# Sentencepiece writes a space as this character, so the character itself would come back as a space.
_SPACE_MARK = "\u2581"


class TrainingStyle(BaseModel, strict=True, extra="forbid", frozen=True, allow_inf_nan=False):
    """How a trained tokenizer treats text. As it stands here, every text comes back exactly."""

    # Characters that are no piece become their UTF-8 bytes; false makes them <unk>.
    byte_fallback: bool = True
    # identity, nfkc, nfkc_cf, nmt_nfkc, nmt_nfkc_cf, or a file *.tsv of rules (hex code points, tab, hex code
    # points). All but identity change the text before it is cut.
    normalization: str = Field("identity", pattern=r"^(identity|(nmt_)?nfkc(_cf)?|[^\x00]+\.tsv)$")
    # Share of the characters of the text that become pieces of their own.
    character_coverage: float = Field(0.9999, ge=0.9, le=1)
    # Put a space before each text and reduce runs of spaces to one, as T5's, umT5's and LLaMA's models do.
    dummy_prefix: bool = False
    squeeze_spaces: bool = False


class TextEncoder:
    """Encodes texts of any length with a sentencepiece model, ids as in its file.

    A long text goes in segments: sentencepiece needs up to 100 bytes of memory a character, and its float32
    scores lose resolution.
    """

    def __init__(self, model: bytes, origin: str) -> None:
        """`model` is a serialised sentencepiece model. Raises DataError where it can't be used."""
        self.processor = load_processor(model, origin)
        self._model, self._origin = model, origin

    def encode(self, texts: Sequence[str], threads: int) -> list[np.ndarray]:
        """Ids of each text, int32 [tokens]; the same for any number of threads."""
        if all(len(text) <= SEGMENT_CHARACTERS for text in texts):
            return self.processor.encode(list(texts), num_threads=threads, out_type="numpy")
        return [
            self._encode_long(text, threads) if len(text) > SEGMENT_CHARACTERS else self.encode([text], 1)[0]
            for text in texts
        ]

    def _encode_long(self, text: str, threads: int) -> np.ndarray:
        adds_space, drops_space, processors = self._variants
        segments = list(cut_segments(text))
        # The first as the model has it; a later one gets a space before it where its own is dropped.
        add = [adds_space, *(drops_space and segment[0] == " " for segment in segments[1:])]
        encoded = {}
        for choice, processor in processors.items():
            chosen = [segment for segment, each in zip(segments, add, strict=True) if each == choice]
            encoded[choice] = iter(processor.encode(chosen, num_threads=threads, out_type="numpy"))
        return np.concatenate([next(encoded[each]) for each in add])

    @cached_property
    def _variants(self) -> tuple[bool, bool, dict[bool, sentencepiece.SentencePieceProcessor]]:
        """Does the model put a space before a text, does it drop leading ones, and it by the first answer."""
        proto = parse_model(self._model, self._origin)
        rules = proto.normalizer_spec
        adds_space = rules.add_dummy_prefix
        rules.add_dummy_prefix = not adds_space
        opposite = load_processor(proto.SerializeToString(), self._origin)
        processors = {adds_space: self.processor, not adds_space: opposite}
        return adds_space, rules.remove_extra_whitespaces, processors


def cut_segments(text: str) -> Iterator[str]:
    """`text` in pieces of at most 2^20 characters, cut before a single space where there is one.

    No piece of a usual vocabulary has a space within it, so a text is encoded as if it were whole. Where
    there is no such space, a token or two beside the cut can differ.
    """
    start = 0
    while len(text) - start > SEGMENT_CHARACTERS:
        middle, stop = start + SEGMENT_CHARACTERS // 2, start + SEGMENT_CHARACTERS
        stop = _last_single_space(text, middle, stop) or next(
            (i for i in range(stop, middle, -1) if not text[i - 1].isspace() and not text[i].isspace()), stop
        )
        yield text[start:stop]
        start = stop
    yield text[start:]


def _last_single_space(text: str, start: int, stop: int) -> int | None:
    while (space := text.rfind(" ", start, stop)) > 0:
        if not text[space - 1].isspace() and not text[space + 1].isspace():
            return space
        stop = space
    return None


class Tokenizer:
    """Encodes text to ids and back; see the module for the ids."""

    def __init__(self, model: bytes, origin: str = "tokenizer") -> None:
        """`model` is a serialised sentencepiece model; `origin` names it in errors.

        Raises DataError where it can't be read or uses the name of a sentinel for ordinary text.
        """
        proto = _in_order(parse_model(model, origin), origin)
        self._origin = origin
        self._encoder = TextEncoder(proto.SerializeToString(), origin)
        self._space_mark_ids = self._find_space_mark(proto)
        # Number of ids, sentinels included.
        self.size: int = len(proto.pieces) + SENTINELS
        # Id of <extra_id_0>, the highest.
        self.first_sentinel: int = self.size - 1
        for sentinel in _SENTINEL_PIECES:
            proto.pieces.add(piece=sentinel, score=0.0, type=proto.SentencePiece.USER_DEFINED)
        self.model: bytes = proto.SerializeToString(deterministic=True)
        self.sha256 = hashlib.sha256(self.model).hexdigest()

    @cached_property
    def _decoder(self) -> sentencepiece.SentencePieceProcessor:
        """The model with its sentinels. Made when first used: who prepares data only encodes."""
        return load_processor(self.model, self._origin)

    def _find_space_mark(self, proto: Any) -> list[int] | None:
        """The byte pieces of the space mark, where the model brings every other text back exactly."""
        rules = proto.normalizer_spec
        changes_text = rules.add_dummy_prefix or rules.remove_extra_whitespaces or rules.precompiled_charsmap
        if changes_text or not proto.trainer_spec.byte_fallback:
            return None
        return [self._encoder.processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without EOS."""
        return self.encode_batch([text], threads=1)[0]

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        """Ids of each text, without EOS; the same for any number of threads."""
        return [ids.tolist() for ids in self.encode_arrays(texts, threads)]

    def encode_arrays(self, texts: Sequence[str], threads: int) -> list[np.ndarray]:
        """What `encode_batch` gives, int32 [tokens] for each text, without a Python object for each token."""
        mark_ids = self._space_mark_ids
        if mark_ids is None or not any(_SPACE_MARK in text for text in texts):
            return self._encoder.encode(texts, threads)
        return [self._encode_around_space_marks(text, np.array(mark_ids, np.int32)) for text in texts]

    def _encode_around_space_marks(self, text: str, mark_ids: np.ndarray) -> np.ndarray:
        first, *others = self._encoder.encode(text.split(_SPACE_MARK), threads=1)
        return np.concatenate([first, *chain.from_iterable((mark_ids, part) for part in others)])

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Text of `ids`; sentinels appear as <extra_id_N>, pad, eos and ids beyond the tokenizer as nothing.

        A model's vocabulary is often padded, so it may produce the latter.
        """
        return self._decoder.decode([int(i) for i in ids if i < self.size])

    def decode_after(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """Text of `ids` where they go on from `before`.

        A model that puts a space before each text takes one away again at the beginning of what it decodes:
        `ids` alone would lose a space between two words.
        """
        return self.decode([*before, *ids])[len(self.decode(before)) :]


def parse_model(model: bytes, origin: str) -> Any:
    """The serialised sentencepiece model as its protocol buffer. Raises DataError where it is none."""
    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(model)
    except DecodeError:
        raise DataError(f"{origin} is not a sentencepiece model") from None
    if not proto.pieces:
        raise DataError(f"{origin} is not a sentencepiece model: it has no pieces")
    return proto


def load_processor(model: bytes, origin: str) -> sentencepiece.SentencePieceProcessor:
    """Sentencepiece's own encoder of a serialised model, ids as they are. Raises DataError."""
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise DataError(f"{origin} is not a usable sentencepiece model: {one_line(error)}") from None
    return processor


def _in_order(proto: Any, origin: str) -> Any:
    """Pad, eos, then the other pieces in their order. Sentinels that are there already are taken out."""
    names = [piece.piece for piece in proto.pieces]
    known = set(names)
    pad = _control_piece(proto, "pad_piece", "<pad>", names, known)
    eos = _control_piece(proto, "eos_piece", "</s>", names, known)
    moved = {pad.piece, eos.piece} if names[:2] != [pad.piece, eos.piece] else set()
    sentinels = known.intersection(_SENTINEL_PIECES)
    # From the end, so that positions stay; one by one, for a loop over 256,000 pieces takes seconds.
    for index in reversed([i for i, name in enumerate(names) if name in moved or name in sentinels]):
        if names[index] in sentinels and proto.pieces[index].type == proto.SentencePiece.NORMAL:
            raise DataError(f"{origin} has {names[index]} as an ordinary piece; that name is a sentinel's")
        del proto.pieces[index]
    if not moved:
        return proto
    ordered = type(proto)(pieces=[pad, eos])
    ordered.MergeFrom(proto)
    _write_special_ids(ordered)
    return ordered


def _control_piece(proto: Any, field: str, usual_name: str, names: list[str], known: set[str]) -> Any:
    """The piece that the model names as its pad or eos, or a new one where it has none.

    A piece that text may become is none, even of that name: the new one is then called otherwise.
    """
    name = getattr(proto.trainer_spec, field) or usual_name
    if name in known:
        piece = proto.pieces[names.index(name)]
        if piece.type == piece.CONTROL:
            return proto.SentencePiece(piece=name, score=piece.score, type=piece.type)
    while name in known:
        name = f"<{name}>"
    setattr(proto.trainer_spec, field, name)
    return proto.SentencePiece(piece=name, score=0.0, type=proto.SentencePiece.CONTROL)


def _write_special_ids(proto: Any) -> None:
    """The ids as the trainer noted them; sentencepiece goes by the pieces, converters by these."""
    spec = proto.trainer_spec
    ids = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    spec.pad_id, spec.eos_id = PAD, EOS
    spec.bos_id, spec.unk_id = ids.get(spec.bos_piece, -1), ids.get(spec.unk_piece, -1)


def load_tokenizer(path: str, key: str = "data.tokenizer.path") -> Tokenizer:
    """The tokenizer in the file `path`, called `key` in errors. Raises DataError where it can't be read."""
    return Tokenizer(read_model(path, key), f"{key}={path}")


def read_model(path: str, key: str) -> bytes:
    """The content of a model file. Raises DataError."""
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(f"{key}={path}: {one_line(error)}") from None


def train_tokenizer(
    texts: Iterable[str],
    config: TokenizerConfig,
    style: TrainingStyle = TrainingStyle(),  # noqa: B008 (frozen)
) -> Tokenizer:
    """A tokenizer of about `config.vocab_size` pieces plus the sentinels, the same for the same texts.

    A small corpus yields fewer pieces. Raises DataError where the texts are too little or too varied for that
    size, or the rules of normalisation can't be read.
    """
    model = io.BytesIO()
    lines = (line for text in texts for line in text.split("\n") if line and not line.isspace())
    own_rules = style.normalization.endswith(".tsv")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            hard_vocab_limit=False,
            byte_fallback=style.byte_fallback,
            normalization_rule_name="identity" if own_rules else style.normalization,
            normalization_rule_tsv=style.normalization if own_rules else "",
            character_coverage=style.character_coverage,
            add_dummy_prefix=style.dummy_prefix,
            remove_extra_whitespaces=style.squeeze_spaces,
            allow_whitespace_only_pieces=True,
            max_sentence_length=2**30,  # sentencepiece leaves longer lines out without a word
            # A fixed number: the sums of unigram training depend on it.
            num_threads=2,
            pad_id=PAD,
            eos_id=EOS,
            unk_id=UNK,
            bos_id=-1,
            minloglevel=2,
        )
    except (RuntimeError, UnicodeDecodeError) as error:
        raise DataError(
            f"tokenizer.vocab_size={config.vocab_size}: no tokenizer can be trained on these sources: "
            f"{one_line(error)}"
        ) from None
    return Tokenizer(model.getvalue())


def encoding_threads() -> int:
    """Threads worth using for `encode_batch` here."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
