"""Any sentencepiece model can be used: pad 0, eos 1, sentinels last, and the text cut as it was."""

import io
import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from openmoe.data.config import DataConfig
from openmoe.data.errors import DataError
from openmoe.data.objectives import make_objective
from openmoe.data.tokenizer import EOS, SENTINELS, Tokenizer, load_processor, parse_model

from .umt5_standin import PIECES, umt5_standin

DATA = Path(os.environ.get("OPENMOE_DATA", Path(__file__).parents[3] / "shared" / "data"))
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
WORDS = [f"some words {i} and {i % 13} more, here and there {i % 7}" for i in range(300)]


def trained(**options: Any) -> bytes:
    """A small model as sentencepiece makes it (unk 0, <s> 1, </s> 2, no pad), or as `options` say."""
    model = io.BytesIO()
    settings = {"vocab_size": 400, "byte_fallback": True, "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS), model_writer=model, **(settings | options)
    )
    return model.getvalue()


def pieces_of(model: bytes) -> list[str]:
    return [piece.piece for piece in parse_model(model, "model").pieces]


def expected_ids(model: bytes, tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """What the model itself makes of `texts`, in the ids of `tokenizer`."""
    given_pieces = pieces_of(model)
    new_id = {piece: index for index, piece in enumerate(pieces_of(tokenizer.model))}
    stock = load_processor(model, "model")
    return [[new_id[given_pieces[i]] for i in ids] for ids in stock.encode(texts)]


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def llama_type(request: pytest.FixtureRequest) -> tuple[bytes, Tokenizer]:
    model = trained(model_type=request.param)
    return model, Tokenizer(model)


def test_llama_type_ids(llama_type: tuple[bytes, Tokenizer]) -> None:
    """Catches a pad or eos at another id, pieces that change places, and a proto whose notes disagree."""
    model, tokenizer = llama_type
    given_pieces, pieces = pieces_of(model), pieces_of(tokenizer.model)
    assert given_pieces[:3] == ["<unk>", "<s>", "</s>"]
    assert pieces[:-SENTINELS] == ["<pad>", "</s>", "<unk>", "<s>", *given_pieces[3:]]
    assert pieces[-SENTINELS:] == [f"<extra_id_{i}>" for i in range(299, -1, -1)]
    assert tokenizer.size == len(given_pieces) + 1 + SENTINELS
    processor = load_processor(tokenizer.model, "model")
    assert [processor.pad_id(), processor.eos_id(), processor.unk_id(), processor.bos_id()] == [0, 1, 2, 3]
    spec = parse_model(tokenizer.model, "model").trainer_spec
    assert [spec.pad_id, spec.eos_id, spec.unk_id, spec.bos_id] == [0, 1, 2, 3]
    assert Tokenizer(tokenizer.model).sha256 == tokenizer.sha256


@settings(max_examples=100, deadline=None)
@given(text=TEXT)
def test_llama_type_cuts_as_before(llama_type: tuple[bytes, Tokenizer], text: str) -> None:
    """Catches scores or types lost on the way, which would cut text otherwise."""
    model, tokenizer = llama_type
    assert [tokenizer.encode(text)] == expected_ids(model, tokenizer, [text])


@pytest.mark.parametrize(
    "special",
    [
        {"pad_id": 3},  # pad elsewhere
        {"bos_id": -1, "eos_id": -1},  # neither
        {"pad_id": 0, "eos_id": 2, "unk_id": 1, "bos_id": -1},
        {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "pad_piece": "[PAD]", "eos_piece": "[END]"},
    ],
)
def test_special_pieces_anywhere(special: dict[str, Any]) -> None:
    """Catches pad or eos looked for by a fixed name or place, and one added beside one that is there."""
    model = trained(**special)
    tokenizer = Tokenizer(model)
    pad, eos = special.get("pad_piece", "<pad>"), special.get("eos_piece", "</s>")
    others = [piece for piece in pieces_of(model) if piece not in (pad, eos)]
    assert pieces_of(tokenizer.model)[:-SENTINELS] == [pad, eos, *others]
    assert tokenizer.encode_batch(WORDS, 1) == expected_ids(model, tokenizer, WORDS)
    assert tokenizer.decode([0, EOS]) == ""


def test_eos_is_never_text() -> None:
    """Catches an eos that text can become, where a model has "</s>" and "<pad>" as pieces of text."""
    model = trained(bos_id=-1, eos_id=-1, user_defined_symbols=["</s>", "<pad>", "<<pad>>"])
    tokenizer = Tokenizer(model)
    assert pieces_of(tokenizer.model)[:2] == ["<<<pad>>>", "<</s>>"]
    text = "a </s> <pad> <<pad>> <<<pad>>> <</s>>"
    processor = load_processor(tokenizer.model, "model")
    assert (processor.pad_id(), processor.eos_id()) == (0, EOS)
    assert not {0, EOS} & set(tokenizer.encode(text))
    assert [tokenizer.encode(text)] == expected_ids(model, tokenizer, [text])


def test_sentinels_of_another_number_are_replaced() -> None:
    """Catches T5's models with 100 sentinels keeping them as text, or having some twice."""
    sentinels = [f"<extra_id_{i}>" for i in range(100)]
    tokenizer = Tokenizer(trained(user_defined_symbols=sentinels))
    pieces = pieces_of(tokenizer.model)
    assert len(set(pieces)) == len(pieces)
    assert pieces[-SENTINELS:] == [f"<extra_id_{i}>" for i in range(299, -1, -1)]
    ids = tokenizer.encode("see <extra_id_5>")
    assert max(ids) < tokenizer.size - SENTINELS
    assert tokenizer.decode(ids) == "see <extra_id_5>"


def test_a_sentinel_that_is_text_is_refused() -> None:
    """Catches a piece of ordinary text being taken out of a model."""
    proto = parse_model(trained(), "model")
    proto.pieces.add(piece="<extra_id_7>", score=-3.0)
    with pytest.raises(DataError, match="MODEL has <extra_id_7> as an ordinary piece"):
        Tokenizer(proto.SerializeToString(), "MODEL")


@pytest.mark.parametrize("name", ["maxtext_default", "mistral-v1", "mistral-v3", "seqio_test"])
def test_models_that_are_in_use(name: str) -> None:
    """Catches real text cut otherwise than by the model itself, and text that becomes a special piece."""
    found = sorted((DATA / "tokenizers").glob(f"{name}*.model"))
    if not found:
        pytest.skip(f"OPENMOE_DATA={DATA} has no tokenizers/{name}*.model")
    model = found[0].read_bytes()
    tokenizer = Tokenizer(model)
    texts = [
        json.loads(line)["text"]
        for path in sorted(DATA.glob("*/valid/*.jsonl"))
        if path.parts[-3] != "instruction"
        for line in itertools.islice(path.open(), 6)
    ]
    assert len(texts) > 60
    proto = parse_model(tokenizer.model, "model")
    forbidden = {
        i for i, piece in enumerate(proto.pieces) if piece.type in (piece.CONTROL, piece.USER_DEFINED)
    }
    texts.append(" ".join(proto.pieces[index].piece for index in forbidden))
    encoded = tokenizer.encode_batch(texts, 2)
    assert encoded == expected_ids(model, tokenizer, texts)
    assert forbidden > {0, 1, tokenizer.first_sentinel}
    assert not forbidden & set(itertools.chain(*encoded))


@pytest.fixture(scope="module")
def umt5() -> Tokenizer:
    return Tokenizer(umt5_standin())


def test_umt5_ids(umt5: Tokenizer) -> None:
    """Catches another id than the original's for any piece of a model like umT5's, or for a sentinel."""
    assert PIECES == 256_000
    pieces = pieces_of(umt5.model)
    assert pieces[:PIECES] == pieces_of(umt5_standin())
    assert (pieces[0], pieces[EOS]) == ("<pad>", "</s>")
    assert pieces[PIECES:] == [f"<extra_id_{256_299 - i}>" for i in range(256_000, 256_300)]
    assert (umt5.first_sentinel, umt5.size) == (256_299, 256_300)
    text = "the rest <extra_id_0> ☃ [NLU] "
    assert max(umt5.encode(text)) < 400
    assert umt5.decode(umt5.encode(text)) == text


def test_umt5_ids_in_ul2(umt5: Tokenizer) -> None:
    """Catches sentinels that rise, start elsewhere or leave the 300, in the densest denoiser (256 spans)."""
    objective = make_objective("ul2", 2048, umt5, DataConfig())
    index = max(range(6), key=lambda i: len(sentinels_of(objective, i)[0]))
    inputs, targets = sentinels_of(objective, index)
    assert targets == list(range(256_299, 256_299 - 256, -1))
    assert inputs == targets[: len(inputs)]
    assert len(inputs) >= 250  # the mode string pushes the last ones out (facts 5.3)


def sentinels_of(objective: Any, index: int) -> tuple[list[int], list[int]]:
    """The sentinels of one example of a class, in inputs and targets."""
    raw_tokens = objective.classes[index].raw_tokens
    tokens = np.arange(1000, 1000 + raw_tokens, dtype=np.int32)[None]
    example = objective.build(index, tokens, np.array([7], np.uint64))
    sequence, cut = example.sequences[0], example.input_tokens[0]
    return tuple([int(i) for i in part if i >= PIECES] for part in (sequence[:cut], sequence[cut:]))  # type: ignore[return-value]
