"""Where a step's metrics go: `metrics.jsonl`, the run's own record, and a Weights & Biases run page.

A step's metrics are one flat mapping from names to numbers, strings or lists of them (DESIGN: step,
tokens_seen, loss, ..., `router/layer03/...`, `eval/...`). Both writers read the same mapping.
"""

import json
import logging
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

log = logging.getLogger(__name__)

# W&B may wait this long at the start and at the end, not longer: what was not uploaded stays in the run's
# folder for `wandb sync`.
WANDB_TIMEOUT_SECONDS = 60

# Panels of the W&B page, by the name or its first part. Other names that contain a slash bring their group
# along (router/..., eval/...), and the rest belongs to `train`.
WANDB_GROUPS = {
    "learning_rate": "optim",
    "grad_norm": "optim",
    "load_balancing_loss": "router",
    "router_z_loss": "router",
    "dropped_fraction": "router",
    "nonpad_tokens": "data",
    "loss_tokens": "data",
    "phase": "data",
    "objective": "data",
    "share": "data",
    "epoch": "data",
    "tokens_per_second": "speed",
    "step_seconds": "speed",
    "data_seconds": "speed",
    "peak_memory_bytes": "speed",
    "mfu": "speed",
}
WANDB_AXES = ("step", "tokens_seen")  # kept at the top level: every panel can be drawn over either


class Writer(Protocol):
    """Takes each step's line."""

    def write(self, metrics: Mapping[str, Any]) -> None: ...


class JsonlWriter:
    """One JSON object a line, in the order of the steps.

    Each line reaches the operating system at once, so a killed process loses none; `sync` makes them survive
    a crash of the machine and is called before a checkpoint is committed, whose step's line must not be
    missing after a resume. Floats have all their digits; NaN and infinities, which JSON lacks, are written as
    the strings "nan", "inf" and "-inf", which `float()` reads back.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)  # a buffer would fail a second time when it is closed

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Raises OSError where the line does not fit on the disk."""
        line = json.dumps({name: _json_value(value) for name, value in metrics.items()}, allow_nan=False)
        rest = line.encode() + b"\n"
        try:
            while rest:  # a disk that fills up takes a part first and complains about the rest
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._file.name) from None

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def truncate_after(self, step: int) -> None:
        """Drop the lines of later steps and what a crash left of a last line, in one cut of the file."""
        path = Path(self._file.name)
        end = path.stat().st_size
        if not end:
            return
        with path.open("r+b") as file:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
                while end:
                    start = text.rfind(b"\n", 0, end - 1) + 1
                    if _step_of(text[start:end]) <= step:
                        break
                    end = start
            file.truncate(end)
            os.fsync(file.fileno())

    def close(self) -> None:
        self._file.close()


def _json_value(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return repr(float(value))
    if isinstance(value, list):
        return [_json_value(item) for item in value]
    return value


def _step_of(line: bytes) -> float:
    """Infinity where the line is torn."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except ValueError:
        return math.inf


class WandbWriter:
    """One W&B run for the whole training, continued under the same id after a resume.

    Args:
        mode: `offline` writes below `folder`/wandb for a later `wandb sync`; `disabled` does nothing.
        run_id: id of the run to continue; None starts one. `run_id` then holds its id, for the checkpoint.
        config: the composed configuration, shown on the page.

    A failure of W&B (not installed, no network, no key, full disk) is told once and never stops a training.
    Steps that are run again after a resume are logged again; panels are drawn over `step`, so they coincide.
    """

    def __init__(
        self,
        mode: Literal["offline", "online", "disabled"],
        folder: Path,
        run_id: str | None,
        config: Mapping[str, Any],
        *,
        project: str,
        name: str,
    ) -> None:
        self.run_id = run_id
        self._run: Any = None
        if mode == "disabled":
            return
        try:
            import wandb

            # console: the progress line would fill W&B's log. silent: offline there is no page to point at.
            settings = wandb.Settings(
                console="off",
                silent=mode == "offline",
                init_timeout=WANDB_TIMEOUT_SECONDS,
                finish_timeout=WANDB_TIMEOUT_SECONDS,
            )
            self._run = wandb.init(
                project=project, name=name, id=run_id, resume="allow", mode=mode, dir=folder,
                config=dict(config), settings=settings,
            )  # fmt: skip
            self.run_id = self._run.id
            for axis in WANDB_AXES:
                self._run.define_metric(axis, hidden=True)
            self._run.define_metric("*", step_metric="step")
        except Exception as error:
            self._give_up(error)

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Lists stay in `metrics.jsonl`: W&B has no panel for them."""
        if self._run is None:
            return
        row = {wandb_name(name): value for name, value in metrics.items() if not isinstance(value, list)}
        try:
            self._run.log(row)
        except Exception as error:
            self._give_up(error)

    def close(self, exit_code: int = 0) -> None:
        """`exit_code` other than 0 marks the run as failed."""
        if self._run is None:
            return
        try:
            self._run.finish(exit_code=exit_code)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        reason = str(error).partition("\n")[0]
        log.warning("W&B is off for the rest of this run: %s: %s", type(error).__name__, reason)


def wandb_name(name: str) -> str:
    """`loss` -> `train/loss`, `grad_norm` -> `optim/grad_norm`, `eval/...` unchanged."""
    if name in WANDB_AXES:
        return name
    group = WANDB_GROUPS.get(name.partition("/")[0])
    if group is None and "/" in name:
        return name
    return f"{group or 'train'}/{name}"
