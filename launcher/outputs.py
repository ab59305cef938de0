"""The folder of a run and what stands in it beside checkpoints; rank 0 alone writes there."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from openmoe.launcher.entry import write_config
from openmoe.launcher.errors import ConfigError
from openmoe.launcher.run_folder import resume_point, sole_writer
from openmoe.launcher.schema import Config
from openmoe.train.metrics import JsonlWriter, WandbWriter, Writer
from openmoe.train.progress import Progress

_PATIENCE_SECONDS = 120.0  # file servers forget a dead node's locks after a minute and a half


@dataclass
class Outputs:
    jsonl: JsonlWriter
    wandb: WandbWriter
    progress: Progress
    exit_code: int = 1  # what W&B is told at the end

    @property
    def writers(self) -> list[Writer]:
        return [self.jsonl, self.wandb, self.progress]


def await_folder(run_dir: Path) -> None:
    """For a run that was started again: returns when the life before has let go of the folder, so that what
    is found there next is all it has left.

    Raises ConfigError where that takes too long.
    """
    if run_dir.is_dir():
        with sole_writer(run_dir, _PATIENCE_SECONDS):
            pass


@contextmanager
def hold_folder(config: Config, resume_from: Path | None, restarted: bool = False) -> Iterator[None]:
    """The run's folder for this run alone.

    Raises ConfigError where another one trains there, or has since `resume_from` was found.
    """
    run_dir = Path(config.run.dir)
    with sole_writer(run_dir):
        if find_start(config, restarted) != resume_from:
            raise ConfigError(f"run.dir={run_dir}: another process has just trained there; start again")
        yield


def find_start(config: Config, restarted: bool = False) -> Path | None:
    """The checkpoint to go on from, None for a fresh start. Raises as `resume_point` does."""
    branch = config.model_dump() if restarted else None
    return resume_point(config.checkpoint.resume, Path(config.run.dir), branch)


@contextmanager
def open_outputs(config: Config, step: int, wandb_run_id: str | None, total_steps: int) -> Iterator[Outputs]:
    """The writers, `step` updates having been made: lines of later ones go."""
    run_dir = Path(config.run.dir)
    jsonl = JsonlWriter(run_dir / "metrics.jsonl")
    jsonl.truncate_after(step)
    write_config(config, run_dir / "config.yaml")
    wandb = WandbWriter(
        config.logging.wandb,
        run_dir,
        wandb_run_id,
        config.model_dump(),
        project=config.logging.project,
        name=run_dir.name,
    )
    outputs = Outputs(jsonl, wandb, Progress(total_steps, config.logging.every_steps))
    try:
        yield outputs
    finally:
        outputs.progress.close()
        jsonl.close()
        wandb.close(outputs.exit_code)
