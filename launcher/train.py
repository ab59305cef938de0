"""Train: `python -m openmoe.launcher.train experiment=NAME [key=value ...]`, or `openmoe-train`; alone or
under torchrun."""

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from openmoe.checkpoint.manager import CheckpointManager, load_checkpoint
from openmoe.checkpoint.manifest import read_manifest
from openmoe.checkpoint.origin import require_tokenizer
from openmoe.checkpoint.state import model_tensors, restore_counters, training_tensors
from openmoe.checkpoint.weights import load_weights
from openmoe.data.batch_memory import AllocateBytes, ordinary_memory
from openmoe.data.config import ObjectiveName
from openmoe.data.curriculum import Curriculum
from openmoe.data.loader import Loader
from openmoe.data.packing import empty_batch
from openmoe.data.plan import Repetition
from openmoe.data.prepare import PreparedData, prepare
from openmoe.data.shards import TOKENIZER
from openmoe.data.tokenizer import Tokenizer
from openmoe.launcher.entry import run_joined
from openmoe.launcher.errors import ConfigError
from openmoe.launcher.layout import count_ranks, describe, lay_out, members_of, place, rows_of_process
from openmoe.launcher.outputs import Outputs, await_folder, find_start, hold_folder, open_outputs
from openmoe.launcher.processes import ALONE, Processes
from openmoe.launcher.run_folder import belongs_to, start_point
from openmoe.launcher.schema import Config
from openmoe.launcher.stopped import tell_stopped
from openmoe.model.accounting import count_flops, count_parameters
from openmoe.optim.build import build_optimizer
from openmoe.optim.schedules import learning_rate
from openmoe.parallel.build import DTYPES, build
from openmoe.parallel.ranks import Ranks
from openmoe.train.loop import Run, fit
from openmoe.train.profile import Profile
from openmoe.train.signals import StopSignals
from openmoe.train.step import MicroBatch, host_memory, micro_batches
from openmoe.train.throughput import PeakFlops, data_sheet_peak, peak_flops
from openmoe.train.validation import validation_share

NO_PEAK = PeakFlops(1.0, "")  # where nobody reads the utilisation


def main() -> None:
    run_joined(train, "config")


def train(config: Config, processes: Processes = ALONE) -> None:
    """One run from its configuration to its last checkpoint; every process of the run calls it."""
    ranks_of_run = processes.agree(lambda: count_ranks(config, processes.world_size))
    topology = processes.agree(lambda: lay_out(config, ranks_of_run, alone=processes is ALONE))
    total_steps = processes.agree(lambda: count_steps(config))
    device = processes.start("cpu" if config.parallel.engine == "xla" else config.run.device)
    run_dir = Path(config.run.dir)
    if processes.restarted:
        processes.agree(lambda: await_folder(run_dir) if processes.rank == 0 else None)
    resume_from = processes.agree(lambda: find_start(config, processes.restarted))
    weights_from = processes.agree(lambda: start_point(config.checkpoint.initialise_from, resume_from))
    data = processes.first_of_node(
        lambda: prepare(config.data, config.model.vocab_size, source_names(config))
    )
    same = {"the checkpoint to go on from": str(resume_from), "checkpoint.initialise_from": str(weights_from)}
    processes.require_same(same | data.fingerprint)
    if weights_from is not None:
        processes.agree(
            lambda: require_tokenizer(weights_from, read_manifest(weights_from), data.tokenizer.sha256)
        )
    rows = rows_of_process(config, topology, processes.rank)
    loader = processes.agree(lambda: build_loader(config, data, host_memory(device), rows))

    with ExitStack() as stack:
        watchdog = stack.enter_context(
            processes.watchdog(partial(members_of, topology, processes.world_size, processes.rank))
        )
        torch.manual_seed(config.run.seed)
        model, ranks = build(
            config.model, config.parallel, topology, config.train.precision, device, config.run.seed,
            observe=watchdog.enter, watchdog=watchdog,
        )  # fmt: skip
        optimizer = build_optimizer(config.optim, ranks.named_parameters(), ranks.shards)
        ranks.attach(optimizer)
        held_back = processes.agree(lambda: _held_back(config, loader, device, ranks))
        step = tokens_seen = 0
        counters, wandb_run_id = {"nonpad_tokens": 0, "loss_tokens": 0}, None
        if weights_from is not None:
            with watchdog.pause():
                load_weights(
                    weights_from, model_tensors(model, ranks), model_identity(config), processes.peers
                )
        if resume_from is not None:
            tensors = training_tensors(model, optimizer, ranks)
            with watchdog.pause():
                manifest = load_checkpoint(resume_from, tensors, model_identity(config), processes.peers)
            step, tokens_seen = manifest.step, manifest.tokens_seen
            restore_counters(optimizer, tensors, step, ranks)
            processes.agree(lambda: loader.load_state_dict(manifest.metadata["data"]))
            counters = manifest.metadata["counters"]
            if belongs_to(resume_from, run_dir):  # a branch of another run gets a page of its own
                wandb_run_id = manifest.metadata["wandb_run_id"]
        repetitions = processes.agree(lambda: loader.repetitions(total_steps))

        # Until all is closed: a second SIGTERM must not undo a good end.
        closing = stack.enter_context(ExitStack())
        stop = closing.enter_context(StopSignals())
        # Everything that can be wrong with the input has been found; from here on files are written.
        is_first = processes.rank == 0
        processes.agree(
            lambda: (
                closing.enter_context(hold_folder(config, resume_from, processes.restarted))
                if is_first
                else None
            )
        )
        checkpoints = CheckpointManager(
            run_dir, config.checkpoint, processes.peers, lambda: processes.log.fileno()
        )
        optimizer.register_step_pre_hook(lambda *_: checkpoints.wait_to_update())
        checkpoints.set_aside_newer(step)  # before their lines go: a crash in between must leave them some
        outputs = processes.agree(
            lambda: (
                closing.enter_context(open_outputs(config, step, wandb_run_id, total_steps))
                if is_first
                else None
            )
        )
        processes.open_log(run_dir, f"{device}, {place(topology, processes.rank, rows, ranks)}")
        peak = _peak(device, DTYPES[config.train.precision][1], ranks) if outputs else NO_PEAK
        flops = count_flops(config.model, longest_segment(config) or config.train.seq_len)
        run = Run(
            config=config.train,
            model=model,
            optimizer=optimizer,
            learning_rate=partial(learning_rate, config.optim.schedule),
            loader=loader,
            held_back=held_back,
            total_steps=total_steps,
            save=partial(_save, checkpoints, config, data.tokenizer, outputs),
            save_has_failed=lambda: checkpoints.has_failed,
            finish_save=checkpoints.finish,
            save_due=checkpoints.is_due,
            utilization=lambda positions, loss_tokens, seconds: (
                flops.of_step(positions, loss_tokens) / seconds / peak.per_second / topology.world_size
            ),
            writers=outputs.writers if outputs else [],
            device=device,
            ranks=ranks,
            watchdog=watchdog,
            read_every_steps=config.logging.read_every_steps,
            longest_segment=longest_segment(config),
            step=step,
            tokens_seen=tokens_seen,
            counters=counters,
        )
        say = outputs.progress.print if outputs else processes.log.write
        if config.train.profile and is_first:
            folder, steps = run_dir / "profile", total_steps - step
            run.profile = Profile(model, optimizer, device, folder, run.utilization, steps, say)
        layout = describe(topology, device, ranks)
        _announce(say, run, config, layout, resume_from or weights_from, peak.source, repetitions)
        _fit(run, stop, say, run_dir, checkpoints)
        if outputs:
            outputs.exit_code = 0
        with watchdog.pause():  # W&B may take its time
            closing.close()


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


def build_loader(
    config: Config,
    data: PreparedData,
    allocate: AllocateBytes = ordinary_memory,
    rows: slice | None = None,
) -> Loader:
    """`rows` of each global batch; None = all."""
    return Loader(
        data,
        config.curriculum,
        config.data,
        config.train.seq_len,
        config.train.global_batch_rows,
        config.run.seed,
        rows,
        allocate,
    )


def longest_segment(config: Config) -> int | None:
    """Positions an example may take where long rows hold many; None where rows are attended to whole."""
    if config.data.packing == "released":
        return None
    return config.data.example_tokens or config.train.seq_len


def _held_back(
    config: Config, loader: Loader, device: torch.device, ranks: Ranks
) -> dict[str, dict[str, list[MicroBatch]]]:
    """This rank's validation batches by objective and source."""
    if not config.train.validation_rows:
        return {}
    objectives = dict.fromkeys(["causal_lm", *(phase.objective for phase in config.curriculum)])
    return {
        objective: {
            source: _validation_batches(config, loader, device, ranks, objective, source)
            for source in source_names(config)
        }
        for objective in objectives
    }


def _validation_batches(
    config: Config,
    loader: Loader,
    device: torch.device,
    ranks: Ranks,
    objective: ObjectiveName,
    source: str,
) -> list[MicroBatch]:
    rows = config.train.validation_rows
    whole = loader.validation_rows(objective, source, rows)
    group_rows = config.model.group_rows if config.model.group_rule == "rows" else 1
    if ranks.rows:
        group_rows *= ranks.rows.data_ranks
    share = validation_share(rows, group_rows, ranks.data_rank, ranks.data_size)
    own = empty_batch(share.stop - share.start, config.train.seq_len)
    for name, array in whole.items():
        mine = array[share]
        own[name][: len(mine)] = mine
    packed = bool(whole["segment_ids"].max() > 1)
    micro = config.train.micro_batch_rows
    return micro_batches(own, micro, device, longest_segment(config), packed, ranks.rows)


def model_identity(config: Config) -> dict[str, Any]:
    """What a checkpoint's model must agree in: all but how the same sum is computed."""
    return config.model.model_dump(exclude={"dispatch"})


def _save(
    checkpoints: CheckpointManager, config: Config, tokenizer: Tokenizer, outputs: Outputs | None, run: Run
) -> None:
    checkpoints.finish()  # its tensors may be copies, and go before there are new ones
    checkpoints.save(
        training_tensors(run.model, run.optimizer, run.ranks),
        step=run.step,
        tokens_seen=run.tokens_seen,
        milestone=checkpoints.is_milestone(run.tokens_before, run.tokens_seen),
        model=model_identity(config),
        metadata={
            "phase": run.loader.curriculum.phase_at(run.step),
            "data": run.loader.state_dict(),
            "counters": run.counters,
            "wandb_run_id": outputs.wandb.run_id if outputs else None,
            "config": config.model_dump(),
        },
        # What reads the model later needs none of its data.
        other_files={TOKENIZER: tokenizer.model},
        # The checkpoint's own line must be there after a crash.
        before_commit=outputs.jsonl.sync if outputs else lambda: None,
    )


def _peak(device: torch.device, dtype: torch.dtype, ranks: Ranks) -> PeakFlops:
    """Of one rank of the layout."""
    if ranks.rows is None:
        return peak_flops(device, dtype)
    known = data_sheet_peak(ranks.rows.kind, dtype)
    if known is not None:
        return PeakFlops(known, f"data sheet of {ranks.rows.kind}, a device")
    host = peak_flops(device, dtype)  # virtual devices share it
    return PeakFlops(host.per_second / ranks.rows.count, host.source)


def _announce(
    say: Callable[[str], None],
    run: Run,
    config: Config,
    layout: str,
    origin: Path | None,
    peak_source: str,
    repetitions: list[Repetition],
) -> None:
    parameters = count_parameters(config.model).total
    start = "from the start"
    if origin is not None:
        start = f"resumed from {origin} (step {run.step})" if run.step else f"with the weights of {origin}"
    say(
        f"{config.run.dir}: {parameters:,} parameters, {config.train.precision} on {layout}, "
        f"{run.total_steps:,} steps, {start}; MFU against {peak_source}"
    )
    if config.data.repetition == "warn":
        for source, first_step, epochs in repetitions:
            say(
                f"warning: source {source!r} is used up at step {first_step} and read again: "
                f"{epochs:.2f} times by step {run.total_steps}"
            )


def _fit(
    run: Run, stop: StopSignals, say: Callable[[str], None], run_dir: Path, checkpoints: CheckpointManager
) -> None:
    start, first_step = time.monotonic(), run.step
    try:
        stopped_by = fit(run, stop)
    except BaseException as error:
        with run.watchdog.pause():
            checkpoints.leave(error)
        raise
    finally:
        run.loader.close()
    if stopped_by:
        tell_stopped(os.environ, stopped_by)
    seconds = time.monotonic() - start
    end = f"stopped by {stopped_by}, saved" if stopped_by else "finished"
    say(f"{end} at step {run.step} after {run.step - first_step} steps, {seconds:.0f} s: {run_dir}")


if __name__ == "__main__":
    main()
