"""The tokenizer: exact round trips, sentinels at the end, clear errors."""

import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from openmoe.data.config import TokenizerConfig
from openmoe.data.errors import DataError
from openmoe.data.tokenizer import Tokenizer, TrainingStyle, cut_segments, load_tokenizer, train_tokenizer

from .conftest import made_up_documents

ALL_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(made_up_documents(1, 150, 40), TokenizerConfig(vocab_size=512))


@settings(max_examples=200, deadline=None)
@given(text=ALL_TEXT)
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    """Catches normalisation, dropped spaces, newlines or tabs, and characters lost without byte fallback."""
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", " ", "  a\n\n\tb  \r\n", "▁", "a ▁ b▁▁c", "\x00", "日本語 🎉 e\u0301", "</s><pad><unk>", "<0x41>"],
)
def test_awkward_texts_come_back(tokenizer: Tokenizer, text: str) -> None:
    """Catches sentencepiece's own marks (▁, </s>, byte pieces) being taken for what they only look like."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {0, 1, 2} & set(ids)


def test_text_never_becomes_a_sentinel(tokenizer: Tokenizer) -> None:
    """Catches user-defined pieces matching raw text: a web page about T5 would inject sentinels."""
    text = "see <extra_id_0> and <extra_id_3>, <extra_id_299>"
    ids = tokenizer.encode(text)
    assert max(ids) < tokenizer.size - 300
    assert tokenizer.decode(ids) == text


def test_sentinels_are_the_last_ids_counting_down(tokenizer: Tokenizer) -> None:
    """Catches sentinels in front (sentencepiece's default place) or in rising order."""
    assert tokenizer.first_sentinel == tokenizer.size - 1
    assert tokenizer.decode([tokenizer.first_sentinel]) == "<extra_id_0>"
    assert tokenizer.decode([tokenizer.size - 300]) == "<extra_id_299>"
    assert tokenizer.decode([tokenizer.first_sentinel + 1, 10**6]) == ""


def test_encoding_does_not_depend_on_threads(tokenizer: Tokenizer) -> None:
    """Catches a batch that comes back in another order, or otherwise, with threads."""
    texts = [f"text {i} " * (i % 7) + ("▁" if i == 30 else "") for i in range(60)]
    one = tokenizer.encode_batch(texts, threads=1)
    assert one == tokenizer.encode_batch(texts, threads=4)
    assert one == [tokenizer.encode(text) for text in texts]


def test_a_saved_model_is_the_same_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Catches a second set of 300 sentinels being added to a model that has them."""
    path = tmp_path / "m.model"
    path.write_bytes(tokenizer.model)
    again = load_tokenizer(str(path))
    assert (again.size, again.sha256) == (tokenizer.size, tokenizer.sha256)


def test_a_plain_model_gets_its_sentinels(tmp_path: Path) -> None:
    """Catches a given tokenizer without sentinels (umT5's 256,000 pieces) using ordinary pieces as such."""
    prefix = tmp_path / "plain"
    (tmp_path / "text").write_text("\n".join(f"some words {i} and more" for i in range(500)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(prefix), vocab_size=400, byte_fallback=True, pad_id=0,
        eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    plain = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
    tokenizer = load_tokenizer(f"{prefix}.model")
    assert tokenizer.size == plain.vocab_size() + 300
    assert tokenizer.encode("some words 7") == plain.encode("some words 7")


def test_training_is_deterministic() -> None:
    """Catches a tokenizer, hence all token ids, that differs between two runs on the same text."""
    texts = [f"word{i % 50} other{i % 31}\n\tindented {i}" for i in range(400)]
    first, second = (train_tokenizer(texts, TokenizerConfig(vocab_size=512)) for _ in range(2))
    assert first.sha256 == second.sha256


def test_a_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    """Catches a traceback, or a process abort, for a wrong tokenizer file."""
    path = tmp_path / "broken.model"
    for content in (b"this is no model", b"", b"\x0a\xff\xff"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"broken\.model is not a") as error:
            load_tokenizer(str(path))
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="absent"):
        load_tokenizer(str(tmp_path / "absent.model"))


def test_too_little_text_is_one_line() -> None:
    """Catches sentencepiece's multi-line internal error reaching the user."""
    with pytest.raises(DataError, match="vocab_size=512") as error:
        train_tokenizer([], TokenizerConfig(vocab_size=512))
    assert "\n" not in str(error.value)
    assert sys.getsizeof(str(error.value)) < 2000


WORDS = [f"wörter{i % 50} other{i % 31} ﬁve {i}" for i in range(400)]


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_style_of_a_new_tokenizer(model_type: str, tmp_path: Path) -> None:
    """Catches a style that is taken and not passed on: normaliser, own rules, fallback, spaces."""
    config = TokenizerConfig(vocab_size=512, model_type=model_type)  # type: ignore[arg-type]

    def new(**style: Any) -> Tokenizer:
        return train_tokenizer(WORDS, config, TrainingStyle(**style))

    def back(text: str, **style: Any) -> str:
        tokenizer = new(**style)
        return tokenizer.decode(tokenizer.encode(text))

    for dummy_prefix in (False, True):
        tokenizer = new(dummy_prefix=dummy_prefix)
        pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
        assert pieces.id_to_piece(tokenizer.encode("other")[0]).startswith("▁") == dummy_prefix

    assert back("ﬁve  Ö ☃") == "ﬁve  Ö ☃"
    assert back("ﬁve  Ö ☃", normalization="nfkc") == "five  Ö ☃"
    assert back("ﬁve  Ö ☃", normalization="nmt_nfkc_cf", squeeze_spaces=True, dummy_prefix=True) == "five ö ☃"
    assert back("ﬁve ☃", byte_fallback=False) == "ﬁve  ⁇ "
    rules = tmp_path / "rules.tsv"
    rules.write_text("FB01\t66 69\n")
    assert back("ﬁve Ö", normalization=str(rules)) == "five Ö"


LONG = {
    "words": " ".join(WORDS),
    "lines": "\n".join(WORDS * 2),
    "spaces": "  ".join(word for line in WORDS for word in line.split()),
    "no spaces": "".join(word for line in WORDS for word in line.split()),
    "marks": "▁".join(WORDS),
}


@pytest.mark.parametrize("squeeze_spaces", [False, True])
@pytest.mark.parametrize("dummy_prefix", [False, True])
@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_long_texts_are_cut_without_a_trace(
    model_type: str, dummy_prefix: bool, squeeze_spaces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches tokens lost, changed or put in where a text is longer than sentencepiece can take."""
    config = TokenizerConfig(vocab_size=512, model_type=model_type)  # type: ignore[arg-type]
    style = TrainingStyle(dummy_prefix=dummy_prefix, squeeze_spaces=squeeze_spaces)
    tokenizer = train_tokenizer(WORDS, config, style)
    whole = {name: tokenizer.encode(text) for name, text in LONG.items()}
    monkeypatch.setattr("openmoe.data.tokenizer.SEGMENT_CHARACTERS", 100)
    texts = ["short", *LONG.values(), "x"]
    encoded = tokenizer.encode_batch(texts, threads=2)
    assert encoded == [tokenizer.encode(text) for text in texts]
    for (name, text), ids in zip(LONG.items(), encoded[1:-1], strict=True):
        segments = list(cut_segments(text))
        assert "".join(segments) == text
        assert all(len(segment) <= 100 for segment in segments)
        assert len(segments) > 20
        if name == "words":
            assert ids == whole[name]
        assert tokenizer.decode(ids) == tokenizer.decode(whole[name])
        assert len(ids) <= len(whole[name]) + 2 * len(segments)


def test_character_coverage() -> None:
    """Catches rare characters becoming pieces of their own, or common ones not."""
    texts = [*WORDS, "☃"]
    for coverage, tokens in ((1.0, 1), (0.99, 3)):
        tokenizer = train_tokenizer(
            texts, TokenizerConfig(vocab_size=512), TrainingStyle(character_coverage=coverage)
        )
        assert len(tokenizer.encode("☃")) == tokens


def test_long_lines_are_used() -> None:
    """Catches text without line ends being left out, as sentencepiece does beyond 4192 bytes."""
    tokenizer = train_tokenizer([" ".join(WORDS)], TokenizerConfig(vocab_size=512))
    assert len(tokenizer.encode("other")) < 3


@pytest.mark.parametrize("rules", ["absent.tsv", "bad.tsv", "binary.tsv"])
def test_rules_that_cannot_be_read(rules: str, tmp_path: Path) -> None:
    """Catches a traceback for a file of rules that is missing or is none."""
    (tmp_path / "bad.tsv").write_text("hello world\n")
    (tmp_path / "binary.tsv").write_bytes(b"\xff\xfe\tzz\n")
    with pytest.raises(DataError, match=r"tokenizer\.vocab_size=512") as error:
        train_tokenizer(
            WORDS, TokenizerConfig(vocab_size=512), TrainingStyle(normalization=f"{tmp_path}/{rules}")
        )
    assert "\n" not in str(error.value)
