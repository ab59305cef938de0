"""What the partitioner makes of a training step: what travels between the devices, and what does not."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from openmoe.parallel.hlo import shapes_of

ROOT = Path(__file__).resolve().parents[2]
# Two steps, which are one program.
STEPS = """
import sys
from openmoe.parallel.xla import start
devices = start()
from tests.xla.training import Training, batches, mesh, page
experiment, shape = sys.argv[1], tuple(map(int, sys.argv[2:]))
training = Training(page(experiment, *mesh(*shape)), devices)
for number, batch in enumerate(batches(experiment)[:2]):
    training.step(number, batch)
"""


@pytest.mark.parametrize(
    ("experiment", "shape"), [("tiny", (2, 4, 1)), ("tiny_released", (2, 2, 2)), ("tiny", (1, 4, 2))], ids=str
)
def test_tokens_travel_and_experts_stay(experiment: str, shape: tuple[int, int, int], tmp_path: Path) -> None:
    """Bugs: a constraint that is missing, so that experts come to the tokens or all tokens to all devices; a
    reshape that merges a dimension that is cut with one that is not, so that it is made whole first."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={tmp_path} --xla_dump_hlo_as_text"
    subprocess.run(
        [sys.executable, "-c", STEPS, experiment, *map(str, shape)],
        cwd=ROOT, env=os.environ | {"XLA_FLAGS": flags}, check=True, timeout=280,
    )  # fmt: skip
    programs = [path.read_text() for path in tmp_path.glob("*after_optimizations.txt")]
    steps = [text for text in programs if " all-to-all" in text]
    assert len(steps) == 1

    d_model, moe_layers = 128, 2
    one_expert = 256 * d_model // shape[2]  # elements of a matrix of it on a device
    for text in steps:
        tokens = {dims: n for dims, n in shapes_of(text, "all-to-all").items() if dims[-1] == d_model}
        # To the experts and back, and their gradients the same ways; a part for each device of the axis.
        assert sum(tokens.values()) == 4 * moe_layers * shape[1], tokens
        gathered = [dims for kind in ("all-gather", "collective-permute") for dims in shapes_of(text, kind)]
        assert not [dims for dims in gathered if math.prod(dims) >= one_expert], gathered
