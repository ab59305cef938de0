"""Samples, round trips and counts of tokenizers."""

import random

import pytest

from openmoe.data.config import TokenizerConfig
from openmoe.data.tokenizer import TextEncoder, Tokenizer, TrainingStyle, train_tokenizer
from openmoe.data.tokenizer_measures import count_usage, round_trip, sample_documents

TEXTS = [f"document {i}: " + " ".join(str(i * j) for j in range(i % 40)) for i in range(700)]


@pytest.fixture(scope="module")
def squeezing() -> Tokenizer:
    """Makes one space of several and has no bytes to fall back on."""
    style = TrainingStyle(squeeze_spaces=True, byte_fallback=False)
    return train_tokenizer(TEXTS, TokenizerConfig(vocab_size=512), style)


def test_a_sample_is_drawn_by_content() -> None:
    """Catches a sample that is the beginning of the text, depends on the order, or exceeds its size."""
    sample = sample_documents(TEXTS, 9000)
    sizes = [len(text.encode()) for text in TEXTS]
    assert 9000 - max(sizes) <= sum(len(text.encode()) for text in sample) <= 9000
    assert sample == sorted(sample, key=TEXTS.index)
    assert TEXTS.index(sample[-1]) > 600
    shuffled = random.Random(1).sample(TEXTS, len(TEXTS))
    for limit_bytes in range(1000, 9001, 250):
        assert set(sample_documents(shuffled, limit_bytes)) == set(sample_documents(TEXTS, limit_bytes))


def test_a_sample_has_a_document() -> None:
    """Catches an empty sample where one document is larger than the limit, and empty documents in it."""
    assert sample_documents(["", "too long", ""], 1) == ["too long"]
    assert sample_documents(["", ""], 10) == []
    assert sample_documents(["a", "a", "b"], 10) == ["a", "a", "b"]


def test_round_trip(squeezing: Tokenizer) -> None:
    """Catches a difference that is missed, counted twice, or shown for the wrong document or place."""
    texts = [*TEXTS[:300], "document 7:  x", "document 8", "document 9:   "]
    trip = round_trip(squeezing, texts, 2)
    assert (trip.documents, trip.exact) == (303, 301 - sum(text.endswith(" ") for text in TEXTS[:300]))
    first = next(i for i, text in enumerate(texts) if text.endswith(" ") or "  " in text)
    assert trip.first_difference is not None
    assert trip.first_difference[0] == first
    assert trip.first_difference[1] != trip.first_difference[2]
    assert trip.text_bytes == sum(len(text.encode()) for text in texts)
    assert trip.tokens == sum(len(squeezing.encode(text)) for text in texts)


def test_a_long_document_is_one(squeezing: Tokenizer) -> None:
    """Catches the segments of a long text being counted as documents."""
    text = "document 1: 2 " * 160_000
    trip = round_trip(squeezing, [text], 2)
    assert (trip.documents, trip.exact, trip.text_bytes) == (1, 0, len(text))


def test_a_long_document_counts_as_when_it_is_prepared(
    squeezing: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a comparison or check that cuts long documents otherwise than preparation."""
    monkeypatch.setattr("openmoe.data.tokenizer.SEGMENT_CHARACTERS", 100)
    encoders = {"a": TextEncoder(squeezing.model, "a")}
    for text in (" ".join(TEXTS), "x" * 1000, "x  " * 400):
        tokens = len(squeezing.encode(text))
        assert count_usage(encoders, [text], 1)["a"].tokens == tokens
        assert round_trip(squeezing, [text], 1).tokens == tokens


def test_counts(squeezing: Tokenizer) -> None:
    """Catches tokens lost between batches, ids counted twice as vocabulary, unknown ones not seen."""
    other = train_tokenizer(TEXTS, TokenizerConfig(vocab_size=512))
    texts = [*TEXTS, "a snowman ☃"]
    models = {"a": squeezing, "b": other}
    usage = count_usage({name: TextEncoder(t.model, name) for name, t in models.items()}, texts, 2)
    for name, tokenizer in models.items():
        ids = [i for text in texts for i in tokenizer.encode(text)]
        assert usage[name].tokens == len(ids)
        assert usage[name].vocabulary_used == len(set(ids))
        assert usage[name].unknown_tokens == ids.count(2)
        assert (ids.count(2) > 0) == (name == "a")
        assert usage[name].documents == len(texts)
        assert usage[name].bytes_per_token == sum(len(t.encode()) for t in texts) / len(ids)


def test_sums_share_their_vocabulary(squeezing: Tokenizer) -> None:
    """Catches the vocabulary of all subsets being the sum of theirs."""
    processors = {"a": TextEncoder(squeezing.model, "a")}
    parts = [count_usage(processors, part, 1)["a"] for part in (TEXTS[:100], TEXTS[100:])]
    whole, total = count_usage(processors, TEXTS, 1)["a"], parts[0] + parts[1]
    assert total.vocabulary_used == whole.vocabulary_used < sum(part.vocabulary_used for part in parts)
    assert (total.tokens, total.text_bytes, total.documents) == (whole.tokens, whole.text_bytes, 700)
