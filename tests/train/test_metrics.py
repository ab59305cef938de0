"""metrics.jsonl and the W&B run page."""

import json
import logging
import math
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from openmoe.train.metrics import JsonlWriter, WandbWriter, wandb_name


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_floats_keep_all_digits(tmp_path: Path) -> None:
    """Bug: rounded losses hide that a resumed run differs in the last bits."""
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    values = [0.1 + 0.2, 1e-300, 2.0**-1074, 123456789.12345679]
    writer.write({"step": 1, "loss": values[0], "list": values})
    assert read_lines(path) == [{"step": 1, "loss": values[0], "list": values}]


def test_non_finite_floats_stay_valid_json(tmp_path: Path) -> None:
    """Bug: a bare NaN, which Python writes and no other JSON reader accepts."""
    path = tmp_path / "metrics.jsonl"
    JsonlWriter(path).write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "load": [1.0, -math.inf]})
    line = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert line == {"step": 1, "loss": "nan", "grad_norm": "inf", "load": [1.0, "-inf"]}
    assert math.isnan(float(line["loss"]))


def test_a_line_is_there_when_the_process_is_killed(tmp_path: Path) -> None:
    """Bug: a buffered line is lost with the process, and the resumed record has a hole."""
    path = tmp_path / "metrics.jsonl"
    program = (
        "import os, sys; from pathlib import Path; from openmoe.train.metrics import JsonlWriter\n"
        "JsonlWriter(Path(sys.argv[1])).write({'step': 1}); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", program, path]).returncode == -9
    assert read_lines(path) == [{"step": 1}]


def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    """Bug: the system takes part of a line, says how much, and nobody looks: a record torn in its middle."""
    program = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from openmoe.train.metrics import JsonlWriter\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "writer = JsonlWriter(Path(sys.argv[1]))\n"
        "for step in (1, 2): writer.write({'step': step, 'text': 50 * 'x'})"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "metrics.jsonl"], capture_output=True, text=True
    )
    assert run.returncode != 0
    assert "OSError" in run.stderr


@pytest.mark.parametrize("tail", [b"", b'{"step": 9, "lo', b'{"step": 3}', b"\0\0\0\n", b'{"step": 1'])
@pytest.mark.parametrize("keep", [0, 1, 4, 7, 99])
def test_truncation_keeps_just_the_steps_before(tmp_path: Path, tail: bytes, keep: int) -> None:
    """Bugs: later lines survive a resume and steps appear twice; a torn last line swallows the next one;
    the writer goes on behind the old end and leaves zeros in between."""
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    for step in range(1, 8):
        writer.write({"step": step, "loss": 1 / step})
    with path.open("ab") as file:
        file.write(tail)
    writer.truncate_after(keep)
    assert [line["step"] for line in read_lines(path)] == list(range(1, min(keep, 7) + 1))
    writer.write({"step": keep + 1})
    assert read_lines(path)[-1] == {"step": keep + 1}


def test_a_new_record_continues_the_old_one(tmp_path: Path) -> None:
    """Bug: opening the record of a run that is resumed empties it."""
    path = tmp_path / "metrics.jsonl"
    first = JsonlWriter(path)
    first.truncate_after(0)
    first.write({"step": 1})
    first.close()
    second = JsonlWriter(path)
    second.truncate_after(5)
    second.write({"step": 2})
    assert [line["step"] for line in read_lines(path)] == [1, 2]


def wandb_records(path: Path) -> Iterator[Any]:
    """Records of an offline run: a 7-byte header, then LevelDB's log format of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if at % 32768 > 32768 - 7:  # a block's rest that is too short for a header is padding
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def wandb_history(folder: Path) -> list[dict[str, Any]]:
    rows = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=os.path.getmtime):
        for record in wandb_records(path):
            if record.HasField("history"):
                items = record.history.item
                rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    return rows


def metrics_of(step: int) -> dict[str, Any]:
    return {
        "step": step, "tokens_seen": 4096 * step, "loss": 1 / step, "learning_rate": 0.01, "grad_norm": 2.0,
        "dropped_fraction": 0.1, "tokens_per_second": 1e4, "objective": "ul2", "loss_tokens": 7,
        "router/layer01/load": [0.5, 0.5], "router/layer01/load_max_over_mean": 1.0,
        "eval/c4/loss": math.nan,
    }  # fmt: skip


def write_run(folder: Path, run_id: str | None, steps: range) -> str | None:
    writer = WandbWriter("offline", folder, run_id, {"model": {"d_ff": 3}}, project="openmoe", name="test")
    for step in steps:
        writer.write(metrics_of(step))
    writer.close()
    return writer.run_id


def test_wandb_offline_run_holds_grouped_metrics_of_every_step(tmp_path: Path) -> None:
    """Bugs: ungrouped panels; W&B's own counter as x-axis, which shifts after a resume; a second run page."""
    run_id = write_run(tmp_path, None, range(1, 4))
    assert write_run(tmp_path, run_id, range(3, 6)) == run_id  # resumed from step 2, step 3 again
    files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert {path.name for path in files} == {f"run-{run_id}.wandb"}
    assert len(files) == 2

    # W&B's own process answers `finish` before it closes the file.
    deadline = time.monotonic() + 20
    while len(rows := wandb_history(tmp_path)) < 6 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [row["step"] for row in rows] == [1, 2, 3, 3, 4, 5]
    assert [row["tokens_seen"] for row in rows] == [4096 * row["step"] for row in rows]
    assert [row["train/loss"] for row in rows] == [1 / row["step"] for row in rows]
    names = {name for name in rows[0] if not name.startswith("_")}
    assert names == {
        "step", "tokens_seen", "train/loss", "optim/learning_rate", "optim/grad_norm",
        "router/dropped_fraction", "speed/tokens_per_second", "data/objective",
        "data/loss_tokens", "router/layer01/load_max_over_mean",
        "eval/c4/loss",
    }  # fmt: skip

    records = [record for path in files for record in wandb_records(path)]
    metrics = [record.metric for record in records if record.HasField("metric")]
    assert {m.glob_name: m.step_metric for m in metrics if m.glob_name} == {"*": "step"}
    runs = [record.run for record in records if record.HasField("run")]
    config = {item.key: json.loads(item.value_json) for run in runs for item in run.config.update}
    assert config["model"] == {"d_ff": 3}


def test_wandb_names() -> None:
    """Bug: two spellings of one panel."""
    assert wandb_name("accuracy") == "train/accuracy"
    assert wandb_name("mfu") == "speed/mfu"
    assert wandb_name("eval/c4/loss") == "eval/c4/loss"
    assert wandb_name("share/c4") == "data/share/c4"
    assert wandb_name("tokens_seen") == "tokens_seen"


def test_wandb_disabled_keeps_the_run_id(tmp_path: Path) -> None:
    """Bug: one stretch of training without W&B forgets the page that the next one would continue."""
    writer = WandbWriter("disabled", tmp_path, "abc", {}, project="p", name="n")
    writer.write(metrics_of(1))
    writer.close()
    assert writer.run_id == "abc"
    assert not list(tmp_path.iterdir())


def test_wandb_failures_warn_once_and_never_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Bugs: a missing package or a failing service ends a training; every step repeats the warning."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with caplog.at_level(logging.WARNING):
        missing = WandbWriter("offline", tmp_path, "abc", {}, project="p", name="n")
        for step in (1, 2):
            missing.write(metrics_of(step))
        missing.close()
    assert len(caplog.records) == 1
    assert missing.run_id == "abc"
    monkeypatch.undo()

    caplog.clear()
    failing = WandbWriter("offline", tmp_path, None, {}, project="p", name="n")
    run = failing._run

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "log", fail)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            failing.write(metrics_of(step))
        failing.close()
    assert [r.message for r in caplog.records if r.name == "openmoe.train.metrics"] == [
        "W&B is off for the rest of this run: OSError: [Errno 28] No space left on device"
    ]
    monkeypatch.undo()
    run.finish()
