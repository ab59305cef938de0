"""A run on real text and code (OPENMOE_DATA, default ../shared/data)."""

import os
from pathlib import Path

import pytest

from openmoe.launcher.entry import load_config
from openmoe.launcher.train import train

from .conftest import Small, lines

MIX = "{c4: 2, stack_python: 1, wikipedia_multi: 1}"
DATA = Path(os.environ.get("OPENMOE_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.mark.skipif(not (DATA / "c4").is_dir(), reason=f"OPENMOE_DATA={DATA} is not there")
def test_real_text_and_code(small: Small, tmp_path: Path) -> None:
    """Bug: only made-up text works: train/ and valid/ folders, long documents, several scripts."""
    phases = ", ".join(
        f"{{until_steps: {steps}, mix: {MIX}, objective: {objective}}}"
        for steps, objective in ((4, "ul2"), (8, "causal_lm"))
    )
    overrides = [
        f"data.root={DATA}",
        "data.tokenizer.vocab_size=4096",
        "model.vocab_size=4480",
        f"curriculum=[{phases}]",
    ]
    train(load_config(small(tmp_path / "run", *overrides, "train.seq_len=256")))
    record = lines(tmp_path / "run")
    assert record[-1]["loss"] < record[0]["loss"]
    assert {name for name in record[-1] if name.startswith("eval/causal_lm/") and name.endswith("/loss")} == {
        f"eval/causal_lm/{source}/loss" for source in ("c4", "stack_python", "wikipedia_multi")
    }
