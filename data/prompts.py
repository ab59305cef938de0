"""From the text that a user gives to the tokens that a model reads."""

import re
from collections.abc import Sequence

from openmoe.data.errors import DataError
from openmoe.data.tokenizer import EOS, SENTINELS, Tokenizer

_SPECIAL = re.compile(r"(</s>|<extra_id_\d+>)")


def encode_prompt(
    tokenizer: Tokenizer, text: str, special_tokens: bool = False, modes: Sequence[str] = ()
) -> list[int]:
    """Tokens of a prompt, without anything in front of it.

    All of it is ordinary text, unless `special_tokens`: then `</s>` is EOS, `<extra_id_N>` the Nth sentinel,
    and one of the `modes` at the start ("[S2S] ") is encoded apart from what follows, as in UL2 examples.

    Raises DataError where there is no such sentinel.
    """
    if not special_tokens:
        return tokenizer.encode(text)
    mode = next((mode for mode in sorted(modes, key=len, reverse=True) if mode and text.startswith(mode)), "")
    tokens = tokenizer.encode(mode) if mode else []
    for part in _SPECIAL.split(text[len(mode) :]):
        if _SPECIAL.fullmatch(part):
            tokens.append(EOS if part == "</s>" else _sentinel(tokenizer, part))
        elif part:
            tokens += tokenizer.encode(part)
    return tokens


def _sentinel(tokenizer: Tokenizer, name: str) -> int:
    number = int(name.removeprefix("<extra_id_").removesuffix(">"))
    if number >= SENTINELS:
        raise DataError(f"{name}: no such sentinel; allowed <extra_id_0> to <extra_id_{SENTINELS - 1}>")
    return tokenizer.first_sentinel - number
