"""The training loop: a batch, an update, a line; validation and checkpoints where they are due."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from openmoe.data.loader import Loader, StepBatch
from openmoe.model.decoder import Decoder
from openmoe.parallel.ranks import Ranks
from openmoe.parallel.watchdog import NoWatchdog
from openmoe.train.config import TrainConfig
from openmoe.train.metrics import Writer
from openmoe.train.record import step_metrics
from openmoe.train.signals import StopSignals
from openmoe.train.step import MicroBatch, micro_batches, train_step
from openmoe.train.throughput import peak_memory_bytes
from openmoe.train.validation import validate


class NonFiniteLoss(RuntimeError):
    """The loss, its gradient or the model is NaN or infinite; the message names step, phase and batch."""


@dataclass
class Run:
    """Everything a run holds. `step` and `tokens_seen` are those after the last finished update."""

    config: TrainConfig
    model: Decoder
    optimizer: torch.optim.Optimizer
    learning_rate: Callable[[int], float]  # of the update that follows `step` earlier ones
    loader: Loader
    held_back: Mapping[str, Mapping[str, Sequence[MicroBatch]]]  # objective -> source -> batches
    total_steps: int
    save: Callable[["Run"], None]  # may go on in the background
    save_has_failed: Callable[[], bool]  # ... and fail there, as far as this process knows
    finish_save: Callable[[], None]  # waits for it; raises what went wrong
    save_due: Callable[[int, int, int], bool]  # (step, tokens before it, tokens_seen) -> save now?
    utilization: Callable[[int, int, float], float]  # (positions, loss tokens, seconds) of a step -> MFU
    writers: Sequence[Writer]  # of the steps' lines; none on ranks other than 0
    device: torch.device
    ranks: Ranks
    watchdog: NoWatchdog
    longest_segment: int | None = (
        None  # positions an example may take where rows hold many; see micro_batches
    )
    step: int = 0
    tokens_before: int = 0  # tokens_seen one update earlier
    tokens_seen: int = 0
    counters: dict[str, int] = field(default_factory=lambda: {"nonpad_tokens": 0, "loss_tokens": 0})


def fit(run: Run, stop: StopSignals) -> str | None:
    """Train to run.total_steps, or save and leave at a signal; returns its name, or None.

    Raises NonFiniteLoss, and what went wrong in a save at the end of the next step; checkpoints written
    before stay as they are.
    """
    moe_layers = run.model.config.moe_layers
    stopped_by: str | None = None
    while run.step < run.total_steps:
        start = time.perf_counter()
        run.watchdog.step(run.step + 1)
        batch = next(run.loader)  # inside the clock: a loader that is the limit must show
        data_seconds = time.perf_counter() - start
        frozen = run.config.freeze_router_at_step
        if frozen is not None and run.step >= frozen:
            run.model.freeze_routers()
        rate = run.learning_rate(run.step)
        micro = micro_batches(
            batch.arrays,
            run.config.micro_batch_rows,
            run.device,
            run.longest_segment,
            packed=run.longest_segment is not None,
        )
        result = train_step(run.model, run.optimizer, micro, batch.loss_tokens, rate, run.config, run.ranks)
        own = {
            "data_seconds": data_seconds,
            "peak_memory_bytes": peak_memory_bytes(run.device),
            "votes_to_stop": stop.vote(),
            "failed_saves": float(run.save_has_failed()),
        }
        metrics, of_ranks = step_metrics(result, moe_layers, run.ranks, own)
        seconds = time.perf_counter() - start
        run.step += 1
        run.tokens_before, run.tokens_seen = run.tokens_seen, run.tokens_seen + batch.positions
        _require_finite({name: metrics[name] for name in ("loss", "grad_norm")}, run, batch)
        if any(of_ranks["failed_saves"]):
            _finish_save(run)

        stopped_by = stop.agreed(sum(of_ranks["votes_to_stop"]))
        line = _line(run, batch, metrics, rate, seconds) | {
            "data_seconds": max(of_ranks["data_seconds"]),
            "peak_memory_bytes": max(of_ranks["peak_memory_bytes"]),
        }
        if _validation_due(run, batch):
            line |= validate(run.model, _held_back(run, batch), run.ranks)
        for writer in run.writers:
            writer.write(line)
        due = run.save_due(run.step, run.tokens_before, run.tokens_seen)
        if due or run.step == run.total_steps or stopped_by:
            # Not finite where an update has ruined the model: it must not become the newest checkpoint.
            _require_finite({"norm of the parameters": run.ranks.parameter_norm().item()}, run, batch)
            with run.watchdog.pause():
                run.save(run)
            if stopped_by:
                break
    _finish_save(run)
    return stopped_by


def _finish_save(run: Run) -> None:
    with run.watchdog.pause():
        run.finish_save()


def _line(run: Run, batch: StepBatch, metrics: dict[str, Any], rate: float, seconds: float) -> dict[str, Any]:
    """The step's line of metrics.jsonl. Counts of tokens are totals of the run; shares are of this step."""
    run.counters["nonpad_tokens"] += batch.nonpad_tokens
    run.counters["loss_tokens"] += batch.loss_tokens
    text_tokens = max(1, sum(batch.source_text_tokens.values()))
    return {
        "step": run.step,
        "tokens_seen": run.tokens_seen,
        **run.counters,
        "phase": batch.phase,
        "objective": batch.objective,
        **metrics,
        "learning_rate": rate,
        **{f"share/{name}": count / text_tokens for name, count in batch.source_text_tokens.items()},
        **{f"epoch/{name}": epochs for name, epochs in batch.source_epochs.items()},
        "tokens_per_second": batch.positions / seconds,
        "step_seconds": seconds,
        "mfu": run.utilization(batch.positions, batch.loss_tokens, seconds),
    }


def _require_finite(values: Mapping[str, float], run: Run, batch: StepBatch) -> None:
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        shares = ", ".join(f"{name} {count}" for name, count in batch.source_tokens.items() if count)
        first_row = batch.step * run.config.global_batch_rows
        raise NonFiniteLoss(
            f"{bad[0]}={values[bad[0]]} at step {run.step}, phase {batch.phase} ({batch.objective}), batch "
            f"of rows {first_row} to {first_row + run.config.global_batch_rows - 1} (tokens: {shares})"
        )


def _validation_due(run: Run, batch: StepBatch) -> bool:
    """Every so often, and where a phase or the run ends."""
    every = run.config.validate_every_steps
    phase_ends = run.loader.curriculum.phase_at(run.step) != batch.phase
    return phase_ends or run.step == run.total_steps or (every > 0 and run.step % every == 0)


def _held_back(run: Run, batch: StepBatch) -> dict[str, Sequence[MicroBatch]]:
    """Causal LM, comparable over the whole run, and the phase's own objective."""
    objectives = dict.fromkeys(("causal_lm", batch.objective))
    return {
        f"{objective}/{source}": batches
        for objective in objectives
        for source, batches in run.held_back.get(objective, {}).items()
    }
