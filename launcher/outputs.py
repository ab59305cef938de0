"""What a run writes while it trains: its configuration, its lines, its page; in rank 0 only."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from openmoe.checkpoint.manager import CheckpointManager
from openmoe.launcher.entry import write_config
from openmoe.launcher.errors import ConfigError
from openmoe.launcher.run_folder import resume_point, sole_writer
from openmoe.launcher.schema import Config
from openmoe.train.metrics import JsonlWriter, WandbWriter, Writer
from openmoe.train.progress import Progress


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
def open_outputs(
    config: Config, resume_from: Path | None, step: int, wandb_run_id: str | None, total_steps: int
) -> Iterator[Outputs]:
    """Takes the run's folder, puts aside what is newer than `step`, and opens the writers.

    Raises ConfigError where another process trains there, or has since `resume_from` was found.
    """
    run_dir = Path(config.run.dir)
    with sole_writer(run_dir):
        if resume_point(config.checkpoint.resume, run_dir) != resume_from:
            raise ConfigError(f"run.dir={run_dir}: another process has just trained there; start again")
        # Before their lines go: a crash in between must leave them some.
        CheckpointManager(run_dir, config.checkpoint).set_aside_newer(step)
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
