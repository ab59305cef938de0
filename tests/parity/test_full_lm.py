"""Causal-LM rows against the original's `full_lm`: documents joined by EOS, cut, and the released trim."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from openmoe.data.config import DataConfig
from openmoe.data.objectives import Objective, make_objective
from openmoe.data.tokenizer import EOS

from .golden import golden_files

# The original joins this many documents at a time and cuts each such piece on its own; ours joins all.
JOINED_DOCUMENTS = 128


def rows_of(documents: list[list[int]], objective: Objective) -> list[list[int]]:
    """The targets of every example of the joined documents, the short one at the end too."""
    assert objective.joins_with_eos
    text = np.array([token for document in documents for token in [*document, EOS]], np.int32)
    (only,) = objective.classes
    draw = np.zeros(1, np.uint64)
    rows = []
    for start in range(0, len(text), only.raw_tokens):
        tokens = text[start : start + only.raw_tokens]
        inputs, targets = objective.sizes(0, len(tokens), draw)
        assert (inputs.tolist(), targets.item() <= only.row_tokens) == ([0], True)
        rows.append(objective.build(0, tokens[np.newaxis], draw).sequences[0, : targets.item()].tolist())
    return rows


@pytest.mark.parametrize("path", golden_files("full_lm*.json"), ids=lambda path: path.stem)
def test_rows(path: Path) -> None:
    """Catches a missing or doubled EOS between documents, rows cut elsewhere, a released row without EOS."""
    content = json.loads(path.read_text())
    seq_len = int(re.search(r"targets=(\d+)", content["what"]).group(1))  # type: ignore[union-attr]
    documents = content["docs"]
    joined = [documents[i : i + JOINED_DOCUMENTS] for i in range(0, len(documents), JOINED_DOCUMENTS)]
    found = []
    for row_end_eos in (False, True):
        config = DataConfig(row_end_eos=row_end_eos)
        objective = make_objective("causal_lm", seq_len, None, config)  # type: ignore[arg-type]
        found.append([row for part in joined for row in rows_of(part, objective)])
    assert found == [content["segments"], content["after_append_eos_after_trim"]]
