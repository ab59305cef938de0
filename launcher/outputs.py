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


@contextmanager
def hold_folder(config: Config, resume_from: Path | None, restarted: bool = False) -> Iterator[None]:
    """The run's folder for this run alone; one that was `restarted` waits for the life before to let go.

    Raises ConfigError where another one trains there, or has since `resume_from` was found.
    """
    run_dir = Path(config.run.dir)
    with sole_writer(run_dir, _PATIENCE_SECONDS if restarted else 0.0):
        if resume_point(config.checkpoint.resume, run_dir) != resume_from:
            raise ConfigError(f"run.dir={run_dir}: another process has just trained there; start again")
        yield


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
