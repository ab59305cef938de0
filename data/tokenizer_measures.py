"""What tokenizers make of text: samples, round trips, and the counts of the paper's Table 10."""

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from openmoe.data.tokenizer import TextEncoder, Tokenizer

# Documents handed to a tokenizer at once.
_BATCH_DOCUMENTS = 256
# Characters shown on either side of a difference.
_SHOWN_CHARACTERS = 20


def sample_documents(documents: Iterable[str], limit_bytes: int) -> list[str]:
    """Whole documents of at most `limit_bytes` of UTF-8 together, but at least one, in their order.

    Drawn by a hash of their text: the same ones in whatever order they come. Empty ones are left out.
    """
    chosen: list[tuple[int, int, str]] = []  # with the hash below zero: the heap gives the highest first
    lowest_refused = -(2**64)
    total_bytes = 0
    for number, text in enumerate(documents):
        content = text.encode()
        place = -int.from_bytes(hashlib.blake2b(content, digest_size=8, person=b"sample").digest(), "little")
        if not text or place <= lowest_refused:
            continue
        heapq.heappush(chosen, (place, number, text))
        total_bytes += len(content)
        while total_bytes > limit_bytes and len(chosen) > 1:
            lowest_refused, _, refused = heapq.heappop(chosen)
            total_bytes -= len(refused.encode())
    return [text for _, _, text in sorted(chosen, key=lambda item: item[1])]


@dataclass(frozen=True)
class RoundTrip:
    """Encoding and decoding documents."""

    documents: int
    exact: int
    text_bytes: int
    tokens: int
    encode_seconds: float
    decode_seconds: float
    # The first document that comes back otherwise: its number, and the place before and after.
    first_difference: tuple[int, str, str] | None


def round_trip(tokenizer: Tokenizer, texts: Sequence[str], threads: int) -> RoundTrip:
    """Encode and decode every text and compare."""
    tokens = 0
    encode_seconds = decode_seconds = 0.0
    exact = 0
    first_difference = None
    for start, batch in _batches(texts):
        begin = perf_counter()
        encoded = tokenizer.encode_arrays(batch, threads)
        middle = perf_counter()
        decoded = [tokenizer.decode(ids) for ids in encoded]
        encode_seconds += middle - begin
        decode_seconds += perf_counter() - middle
        tokens += sum(map(len, encoded))
        for number, (text, back) in enumerate(zip(batch, decoded, strict=True), start):
            exact += text == back
            if text != back and first_difference is None:
                first_difference = number, *_difference(text, back)
    text_bytes = sum(len(text.encode()) for text in texts)
    return RoundTrip(len(texts), exact, text_bytes, tokens, encode_seconds, decode_seconds, first_difference)


def _difference(text: str, back: str) -> tuple[str, str]:
    """The surroundings of the first character that differs, in either text."""
    pairs = zip(text, back, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text), len(back)))
    begin, end = max(0, at - _SHOWN_CHARACTERS), at + _SHOWN_CHARACTERS
    return text[begin:end], back[begin:end]


@dataclass
class Usage:
    """What one tokenizer makes of one subset (a cell of Table 10)."""

    documents: int
    text_bytes: int
    tokens: int
    # Tokens that stand for what the tokenizer has no piece for.
    unknown_tokens: int
    # bool [ids]: which ids occur.
    used_ids: np.ndarray

    @property
    def vocabulary_used(self) -> int:
        """Number of different ids that occur."""
        return int(self.used_ids.sum())

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text that a token stands for; what can be compared between subsets."""
        return self.text_bytes / max(1, self.tokens)

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.documents + other.documents,
            self.text_bytes + other.text_bytes,
            self.tokens + other.tokens,
            self.unknown_tokens + other.unknown_tokens,
            self.used_ids | other.used_ids,
        )


def count_usage(encoders: Mapping[str, TextEncoder], texts: Sequence[str], threads: int) -> dict[str, Usage]:
    """Each tokenizer's use of the same texts, with the ids and rules of its own file."""
    text_bytes = sum(len(text.encode()) for text in texts)
    usage = {
        name: Usage(len(texts), text_bytes, 0, 0, np.zeros(encoder.processor.vocab_size(), bool))
        for name, encoder in encoders.items()
    }
    for _, batch in _batches(texts):
        for name, encoder in encoders.items():
            ids = np.concatenate(encoder.encode(batch, threads))
            counts = np.bincount(ids, minlength=encoder.processor.vocab_size())
            usage[name].tokens += len(ids)
            usage[name].unknown_tokens += int(counts[encoder.processor.unk_id()])
            usage[name].used_ids |= counts > 0
    return usage


def _batches(texts: Sequence[str]) -> Iterator[tuple[int, Sequence[str]]]:
    """Number of the first text, and some texts."""
    for start in range(0, len(texts), _BATCH_DOCUMENTS):
        yield start, texts[start : start + _BATCH_DOCUMENTS]
