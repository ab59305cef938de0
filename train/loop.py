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
from openmoe.train.profile import NO_PROFILE, NoProfile
from openmoe.train.record import SentStep, read_metrics, send_metrics
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
    profile: NoProfile = NO_PROFILE
    read_every_steps: int = 1  # steps whose metrics are read from the device together
    longest_segment: int | None = (
        None  # positions an example may take where rows hold many; see micro_batches
    )
    step: int = 0
    tokens_before: int = 0  # tokens_seen one update earlier
    tokens_seen: int = 0
    counters: dict[str, int] = field(default_factory=lambda: {"nonpad_tokens": 0, "loss_tokens": 0})


@dataclass(frozen=True)
class _Update:
    """One update; the device may still be at it, and copy from the batch, until its metrics are read."""

    step: int
    tokens_seen: int
    batch: StepBatch
    rate: float
    metrics: SentStep


def fit(run: Run, stop: StopSignals) -> str | None:
    """Train to run.total_steps, or save and leave at a signal; returns its name, or None.

    The host waits for the device each `read_every_steps` steps, before a validation and before a save: there
    it reads the metrics of all steps since the last time, and there it hears, on all processes after the same
    step, of signals and of saves that have failed.

    Raises NonFiniteLoss for the first step that has one, and what went wrong in a save, when metrics are read
    the next time; checkpoints written before stay as they are.
    """
    unread: list[_Update] = []
    stopped_by: str | None = None
    start = 0.0
    while run.step < run.total_steps and not stopped_by:
        if not unread:
            start = time.perf_counter()
        unread.append(_update(run, stop))
        batch = unread[-1].batch
        run.profile.tick(batch)
        validation_due = _validation_due(run, batch)
        save_due = run.step == run.total_steps or run.save_due(run.step, run.tokens_before, run.tokens_seen)
        if len(unread) < run.read_every_steps and not validation_due and not save_due:
            continue

        votes_to_stop = 0.0
        read = read_metrics([update.metrics for update in unread], run.model.config.moe_layers, run.ranks)
        seconds = (time.perf_counter() - start) / len(unread)
        for update, (metrics, of_ranks) in zip(unread, read, strict=True):
            _require_finite({name: metrics[name] for name in ("loss", "grad_norm")}, run, update)
            if any(of_ranks["failed_saves"]):
                _finish_save(run)
            votes_to_stop += sum(of_ranks["votes_to_stop"])
            line = _line(run, update, metrics, of_ranks, seconds)
            if validation_due and update is unread[-1]:
                line |= validate(run.model, _held_back(run, batch), run.ranks)
            for writer in run.writers:
                writer.write(line)
        stopped_by = stop.agreed(votes_to_stop)
        if save_due or stopped_by:
            # Not finite where an update has ruined the model: it must not become the newest checkpoint.
            norm = run.ranks.parameter_norm().item()
            _require_finite({"norm of the parameters": norm}, run, unread[-1])
            with run.watchdog.pause():
                run.save(run)
        unread.clear()
    _finish_save(run)
    run.profile.close()
    return stopped_by


def _update(run: Run, stop: StopSignals) -> _Update:
    """The next update, of which nothing is read from the device."""
    run.watchdog.step(run.step + 1)
    start = time.perf_counter()
    with run.profile.data():
        batch = next(run.loader)
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
        spread=run.ranks.rows,
    )
    result = train_step(run.model, run.optimizer, micro, batch.loss_tokens, rate, run.config, run.ranks)
    own = {
        "data_seconds": data_seconds,
        "peak_memory_bytes": peak_memory_bytes(run.device),
        "votes_to_stop": stop.vote(),
        "failed_saves": float(run.save_has_failed()),
    }
    metrics = send_metrics(result, run.model.config.moe_layers, run.ranks, own)
    run.step += 1
    run.tokens_before, run.tokens_seen = run.tokens_seen, run.tokens_seen + batch.positions
    return _Update(run.step, run.tokens_seen, batch, rate, metrics)


def _finish_save(run: Run) -> None:
    with run.watchdog.pause():
        run.finish_save()


def _line(
    run: Run, update: _Update, metrics: dict[str, Any], of_ranks: dict[str, list[float]], seconds: float
) -> dict[str, Any]:
    """The step's line of metrics.jsonl. Counts of tokens are totals of the run; shares are of this step.

    `seconds` are from the first batch to the last metrics of the steps that were read together, a loader that
    is the limit included, in even shares. So are `tokens_per_second` and `mfu`.
    """
    batch = update.batch
    run.counters["nonpad_tokens"] += batch.nonpad_tokens
    run.counters["loss_tokens"] += batch.loss_tokens
    text_tokens = max(1, sum(batch.source_text_tokens.values()))
    return {
        "step": update.step,
        "tokens_seen": update.tokens_seen,
        **run.counters,
        "phase": batch.phase,
        "objective": batch.objective,
        **metrics,
        "learning_rate": update.rate,
        **{f"share/{name}": count / text_tokens for name, count in batch.source_text_tokens.items()},
        **{f"epoch/{name}": epochs for name, epochs in batch.source_epochs.items()},
        "tokens_per_second": batch.positions / seconds,
        "step_seconds": seconds,
        "mfu": run.utilization(batch.positions, batch.loss_tokens, seconds),
        "data_seconds": max(of_ranks["data_seconds"]),
        "peak_memory_bytes": max(of_ranks["peak_memory_bytes"]),
    }


def _require_finite(values: Mapping[str, float], run: Run, update: _Update) -> None:
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        batch = update.batch
        shares = ", ".join(f"{name} {count}" for name, count in batch.source_tokens.items() if count)
        first_row = batch.step * run.config.global_batch_rows
        raise NonFiniteLoss(
            f"{bad[0]}={values[bad[0]]} at step {update.step}, phase {batch.phase} ({batch.objective}), "
            f"batch of rows {first_row} to {first_row + run.config.global_batch_rows - 1} (tokens: {shares})"
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
