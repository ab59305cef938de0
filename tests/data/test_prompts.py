"""Prompts as text, and with the tokens that text never becomes."""

import pytest

from openmoe.data.config import TokenizerConfig
from openmoe.data.errors import DataError
from openmoe.data.prompts import encode_prompt
from openmoe.data.tokenizer import EOS, Tokenizer, train_tokenizer

WORDS = "The cat sat on the mat. " * 40 + "[NLU] [S2S] A dog ran </s> <extra_id_3> off. " * 20
MODES = ("[NLU] ", "[S2S] ", "")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([WORDS], TokenizerConfig(vocab_size=600))


@pytest.mark.parametrize("text", ["", "The cat", "[S2S] The cat<extra_id_0> sat</s>"])
def test_text_is_text(text: str, tokenizer: Tokenizer) -> None:
    """Catches a prompt that ends an example, or asks for a span, because it talks about one."""
    tokens = encode_prompt(tokenizer, text, special_tokens=False, modes=MODES)
    assert tokens == tokenizer.encode(text)
    assert EOS not in tokens
    assert max(tokens, default=0) < tokenizer.size - 300


def test_special_tokens(tokenizer: Tokenizer) -> None:
    """Catches sentinels counted upwards, a mode string melted into the text, or one found in its middle."""
    text = "[NLU] cat<extra_id_0> on<extra_id_12></s>[S2S] A"
    expected = [
        *tokenizer.encode("[NLU] "),
        *tokenizer.encode("cat"),
        tokenizer.first_sentinel,
        *tokenizer.encode(" on"),
        tokenizer.first_sentinel - 12,
        EOS,
        *tokenizer.encode("[S2S] A"),
    ]
    assert encode_prompt(tokenizer, text, special_tokens=True, modes=MODES) == expected
    assert tokenizer.encode("[NLU] ") + tokenizer.encode("cat") != tokenizer.encode("[NLU] cat")
    without = encode_prompt(tokenizer, "[NLU] cat", special_tokens=True)
    assert without == tokenizer.encode("[NLU] cat")
    for plain in ("", "cat <extra_id_x> </ s>"):
        assert encode_prompt(tokenizer, plain, special_tokens=True, modes=MODES) == tokenizer.encode(plain)


def test_no_such_sentinel(tokenizer: Tokenizer) -> None:
    """Catches an id below the sentinels, which is an ordinary word."""
    assert encode_prompt(tokenizer, "<extra_id_299>", special_tokens=True) == [tokenizer.size - 300]
    with pytest.raises(DataError, match="<extra_id_300>: no such sentinel; allowed"):
        encode_prompt(tokenizer, "<extra_id_300>", special_tokens=True)
