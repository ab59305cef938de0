"""Causal-LM rows against the original's `full_lm`: documents joined by EOS, cut, and the released trim."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from openmoe.data.objectives import CausalLM
from openmoe.data.rng import IndexPermutation, random_key
from openmoe.data.shards import TokenShard
from openmoe.data.sources import START, TokenSource

from .golden import golden_files

# The original joins this many documents at a time and cuts each such piece on its own; ours joins all.
JOINED_DOCUMENTS = 128


def source_in_order(documents: list[list[int]]) -> TokenSource:
    """A source whose shuffled order is the given one."""
    places = IndexPermutation(len(documents), 0, "full_lm", 0)(np.arange(len(documents)))
    stored: list[list[int]] = [[] for _ in documents]
    for place, document in zip(places, documents, strict=True):
        stored[place] = document
    offsets = np.concatenate([[0], np.cumsum([len(d) for d in stored])]).astype(np.int64)
    shard = TokenShard(np.concatenate(stored).astype(np.int32), offsets)
    return TokenSource("full_lm", shard, seed=0, chunk_tokens=65_536)


def rows_of(documents: list[list[int]], objective: CausalLM) -> list[list[int]]:
    source = source_in_order(documents)
    position, left = START, source.epoch_tokens(join_eos=True)
    key = random_key("unused")
    rows = []
    while left:
        size = objective.measure(key, left)
        inputs, targets = objective.build(source.read(position, size.raw_tokens, True), key)
        assert (len(inputs), len(targets)) == (0, size.target_tokens)
        rows.append(targets.tolist())
        position = source.skip(position, size.raw_tokens, True)
        left -= size.raw_tokens
    return rows


@pytest.mark.parametrize("path", golden_files("full_lm*.json"), ids=lambda path: path.stem)
def test_rows(path: Path) -> None:
    """Catches a missing or doubled EOS between documents, rows cut elsewhere, a released row without EOS."""
    content = json.loads(path.read_text())
    seq_len = int(re.search(r"targets=(\d+)", content["what"]).group(1))  # type: ignore[union-attr]
    documents = content["docs"]
    joined = [documents[i : i + JOINED_DOCUMENTS] for i in range(0, len(documents), JOINED_DOCUMENTS)]
    plain = [row for part in joined for row in rows_of(part, CausalLM(seq_len, row_end_eos=False))]
    released = [row for part in joined for row in rows_of(part, CausalLM(seq_len, row_end_eos=True))]
    assert plain == content["segments"]
    assert released == content["after_append_eos_after_trim"]
