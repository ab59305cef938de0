"""Train: `python -m openmoe.launcher.train experiment=NAME [key=value ...]`, or `openmoe-train`."""

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from openmoe.checkpoint.manager import CheckpointManager, load_checkpoint
from openmoe.checkpoint.state import restore_counters, training_tensors
from openmoe.data.batch_memory import AllocateBytes, ordinary_memory
from openmoe.data.curriculum import Curriculum
from openmoe.data.loader import Loader
from openmoe.data.plan import Repetition
from openmoe.data.prepare import PreparedData, prepare
from openmoe.launcher.entry import run_command, write_config
from openmoe.launcher.errors import ConfigError
from openmoe.launcher.run_folder import belongs_to, resume_point, sole_writer
from openmoe.launcher.schema import Config
from openmoe.model.accounting import count_flops
from openmoe.optim.build import build_optimizer
from openmoe.optim.schedules import learning_rate
from openmoe.parallel.build import DTYPES, build
from openmoe.parallel.topology import Topology, check_fit, resolve
from openmoe.train.loop import Run, fit
from openmoe.train.metrics import JsonlWriter, WandbWriter
from openmoe.train.progress import Progress
from openmoe.train.signals import StopSignals
from openmoe.train.step import MicroBatch, host_memory, micro_batches
from openmoe.train.throughput import peak_flops


def main() -> None:
    run_command(train, Config, "config")


def train(config: Config) -> None:
    """One run from its configuration to its last checkpoint."""
    device, topology = pick_device(config)
    total_steps = count_steps(config)
    run_dir = Path(config.run.dir)
    resume_from = resume_point(config.checkpoint.resume, run_dir)
    data = prepare(config.data, config.model.vocab_size, source_names(config))
    loader = build_loader(config, data, host_memory(device))
    held_back = _held_back(config, loader, device)

    torch.manual_seed(config.run.seed)
    model, ranks = build(
        config.model, config.parallel, topology, config.train.precision, device, config.run.seed
    )
    optimizer = build_optimizer(config.optim, ranks.named_parameters(), ranks.shards)
    step = tokens_seen = 0
    counters, wandb_run_id = {"nonpad_tokens": 0, "loss_tokens": 0}, None
    if resume_from is not None:
        tensors = training_tensors(model, optimizer)
        manifest = load_checkpoint(resume_from, tensors, model_identity(config))
        step, tokens_seen = manifest.step, manifest.tokens_seen
        restore_counters(optimizer, tensors, step)
        loader.load_state_dict(manifest.metadata["data"])
        counters = manifest.metadata["counters"]
        if belongs_to(resume_from, run_dir):  # a branch of another run gets a page of its own
            wandb_run_id = manifest.metadata["wandb_run_id"]
    repetitions = loader.repetitions(total_steps)

    # Everything that can be wrong with the input has been found; from here on files are written.
    with sole_writer(run_dir):
        if resume_point(config.checkpoint.resume, run_dir) != resume_from:
            raise ConfigError(f"run.dir={run_dir}: another process has just trained there; start again")
        checkpoints = CheckpointManager(run_dir, config.checkpoint)
        checkpoints.set_aside_newer(step)  # before their lines go: a crash in between must leave them some
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
        peak = peak_flops(device, DTYPES[config.train.precision][1])
        flops = count_flops(config.model, longest_segment(config) or config.train.seq_len)
        run = Run(
            config=config.train,
            model=model,
            optimizer=optimizer,
            learning_rate=partial(learning_rate, config.optim.schedule),
            loader=loader,
            held_back=held_back,
            total_steps=total_steps,
            save=partial(_save, checkpoints, config),
            save_due=checkpoints.is_due,
            utilization=lambda positions, loss_tokens, seconds: (
                flops.of_step(positions, loss_tokens) / seconds / peak.per_second
            ),
            jsonl=jsonl,
            wandb=wandb,
            progress=Progress(total_steps, config.logging.every_steps),
            device=device,
            ranks=ranks,
            longest_segment=longest_segment(config),
            step=step,
            tokens_seen=tokens_seen,
            counters=counters,
        )
        _announce(run, config, resume_from, peak.source, repetitions)
        _fit_and_close(run, run_dir)


def pick_device(config: Config) -> tuple[torch.device, Topology]:
    """The device of this process; checks that this build can run the asked layout."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"WORLD_SIZE={text}: allowed a number of processes from 1")
    world_size = int(text)
    topology = resolve(config.parallel, world_size)
    train = config.train
    check_fit(topology, config.model, train.seq_len, train.global_batch_rows, train.micro_batch_rows)
    if world_size > 1:
        raise ConfigError(f"WORLD_SIZE={world_size}: this version trains in one process; allowed 1")
    if config.parallel.engine != "torch":
        raise ConfigError(f"parallel.engine={config.parallel.engine}: this version has torch only")
    if config.run.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device=cuda: no CUDA device here; allowed auto or cpu")
    use_cuda = config.run.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if use_cuda else "cpu"), topology


def count_steps(config: Config) -> int:
    """Updates of the run: train.steps, train.tokens rounded up, or the curriculum's last mark."""
    curriculum = Curriculum(config.curriculum, config.train.seq_len, config.train.global_batch_rows)
    if config.train.steps is not None:
        return config.train.steps
    if config.train.tokens is not None:
        return -(-config.train.tokens // curriculum.tokens_per_step)
    last = curriculum.last_step()
    if last is None:
        raise ConfigError(
            "the last phase of curriculum has no mark; give it until_tokens or until_steps, or set "
            "train.steps or train.tokens"
        )
    return last


def source_names(config: Config) -> list[str]:
    """The sources that any phase reads."""
    return sorted({name for phase in config.curriculum for name, rate in phase.mix.items() if rate > 0})


def build_loader(config: Config, data: PreparedData, allocate: AllocateBytes = ordinary_memory) -> Loader:
    return Loader(
        data,
        config.curriculum,
        config.data,
        config.train.seq_len,
        config.train.global_batch_rows,
        config.run.seed,
        allocate=allocate,
    )


def longest_segment(config: Config) -> int | None:
    """Positions an example may take where long rows hold many; None where rows are attended to whole."""
    if config.data.packing == "released":
        return None
    return config.data.example_tokens or config.train.seq_len


def _held_back(
    config: Config, loader: Loader, device: torch.device
) -> dict[str, dict[str, list[MicroBatch]]]:
    """Validation batches by objective and source."""
    rows = config.train.validation_rows
    if not rows:
        return {}
    objectives = dict.fromkeys(["causal_lm", *(phase.objective for phase in config.curriculum)])
    return {
        objective: {
            source: micro_batches(
                loader.validation_rows(objective, source, rows),
                config.train.micro_batch_rows,
                device,
                longest_segment(config),
            )
            for source in source_names(config)
        }
        for objective in objectives
    }


def model_identity(config: Config) -> dict[str, Any]:
    """What a checkpoint's model must agree in: all but how the same sum is computed."""
    return config.model.model_dump(exclude={"dispatch"})


def _save(checkpoints: CheckpointManager, config: Config, run: Run) -> None:
    run.jsonl.sync()  # the checkpoint's own line must be there after a crash
    checkpoints.save(
        training_tensors(run.model, run.optimizer),
        step=run.step,
        tokens_seen=run.tokens_seen,
        milestone=checkpoints.is_milestone(run.tokens_before, run.tokens_seen),
        model=model_identity(config),
        metadata={
            "phase": run.loader.curriculum.phase_at(run.step),
            "data": run.loader.state_dict(),
            "counters": run.counters,
            "wandb_run_id": run.wandb.run_id,
            "config": config.model_dump(),
        },
    )


def _announce(
    run: Run,
    config: Config,
    resume_from: Path | None,
    peak_source: str,
    repetitions: list[Repetition],
) -> None:
    parameters = sum(p.numel() for p in run.model.parameters())
    start = f"resumed from {resume_from} (step {run.step})" if resume_from else "from the start"
    run.progress.print(
        f"{config.run.dir}: {parameters:,} parameters, {config.train.precision} on {run.device}, "
        f"{run.total_steps:,} steps, {start}; MFU against {peak_source}"
    )
    if config.data.repetition == "warn":
        for source, first_step, epochs in repetitions:
            run.progress.print(
                f"warning: source {source!r} is used up at step {first_step} and read again: "
                f"{epochs:.2f} times by step {run.total_steps}"
            )


def _fit_and_close(run: Run, run_dir: Path) -> None:
    start, first_step, exit_code = time.monotonic(), run.step, 1
    with StopSignals() as stop:  # until all is closed: a second SIGTERM must not undo a good end
        try:
            stopped_by = fit(run, stop)
            exit_code = 0
        finally:
            run.progress.close()
            run.loader.close()
            run.jsonl.close()
            run.wandb.close(exit_code)
    seconds = time.monotonic() - start
    end = f"stopped by {stopped_by}, saved" if stopped_by else "finished"
    run.progress.print(
        f"{end} at step {run.step} after {run.step - first_step} steps, {seconds:.0f} s: {run_dir}"
    )


if __name__ == "__main__":
    main()
