"""The loop under XLA: what a step waits for, and what it compiles."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from openmoe.train import loop
from tests.xla.runs import XLA, lines, run

metrics = pytest.importorskip(
    "torch_xla.debug.metrics", reason="torch_xla is missing here; run `make test-xla`"
)


def count(name: str) -> int:
    return (metrics.metric_data(name) or [0])[0]


def test_steps_wait_for_nothing_between_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs: a value read from the devices in the step, so that the host no longer traces ahead of them; a
    program compiled anew because of a save, a read, a number of the host in the graph, or a tensor that comes
    from a checkpoint."""
    transfers: list[int] = []
    programs: list[int] = []
    real = loop.train_step

    def counted(*args: Any) -> Any:
        transfers.append(count("TransferFromDeviceTime"))
        programs.append(count("CompileTime"))
        return real(*args)

    steps = (
        *("train.validation_rows=0", "logging.read_every_steps=2", "checkpoint.every_steps=4"),
        *("curriculum=[{until_steps: 11, mix: {code: 1, manual: 1}, objective: ul2}]", *XLA),
    )
    run(tmp_path / "run", *steps, "train.steps=3")
    monkeypatch.setattr(loop, "train_step", counted)
    run(tmp_path / "run", *steps)
    # Steps 4 to 11; read, in twos, after 4 (saved), 6, 8 (saved), 10, 11.
    waited = [after > before for before, after in pairwise(transfers)]
    assert waited == [True, False, True, False, True, False, True], transfers
    # Compiled are the first step, the norm before its save and the second, for which tensors lie as the first
    # has left them.
    assert programs[2:] == programs[2:3] * 6, programs
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, 12))
