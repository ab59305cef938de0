"""Batches of a run, step after step: planned in order, built by any number of threads, resumed exactly."""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from openmoe.data.config import DataConfig, ObjectiveName, PhaseConfig
from openmoe.data.curriculum import Curriculum
from openmoe.data.errors import DataError
from openmoe.data.objectives import make_objective
from openmoe.data.plan import Planner, StepPlan, materialise, phase_objectives, validation_plan
from openmoe.data.prepare import PreparedData
from openmoe.data.sources import TokenSource


@dataclass(frozen=True)
class StepBatch:
    """The batch of one step. Arrays hold this rank's rows, all counts the whole global batch."""

    # Steps finished before this one.
    step: int
    # Index into the run's phases.
    phase: int
    objective: ObjectiveName
    # [rows, seq_len] by name: input_tokens, target_tokens, loss_weights, segment_ids, prefix_mask,
    # source_ids.
    arrays: dict[str, np.ndarray]
    # Row positions, padding included.
    positions: int
    # Row positions that hold an example.
    nonpad_tokens: int
    # Row positions that carry loss.
    loss_tokens: int
    # Text tokens read of each source for this step (what a mix per token counts).
    source_text_tokens: dict[str, int]
    # Non-padding row positions of each source.
    source_tokens: dict[str, int]
    # How often each source has been gone through after this step, e.g. 1.25.
    source_epochs: dict[str, float]


class Loader:
    """Endless iterator over the steps of a run.

    `state_dict` is the state after the batch yielded last, whatever was built ahead. The batches are a pure
    function of (seed, curriculum, data, step): they don't depend on `rows`, on workers or on where a run was
    resumed.
    """

    def __init__(
        self,
        prepared: PreparedData,
        phases: Sequence[PhaseConfig],
        data_config: DataConfig,
        seq_len: int,
        global_batch_rows: int,
        seed: int,
        rows: slice | None = None,
    ) -> None:
        """`rows` selects this rank's rows of the global batch (None: all).

        Raises DataError for a curriculum that is out of order, names a source that is not there, or has an
        objective that needs longer rows.
        """
        self.curriculum = Curriculum(phases, seq_len, global_batch_rows)
        # Indices into this list are the batch's source_ids.
        self.source_names = sorted(prepared.sources)
        self._require_sources()
        self._prepared = prepared
        self._config = data_config
        self._seq_len = seq_len
        self._global_batch_rows = global_batch_rows
        self._seed = seed
        self._rows = rows if rows is not None else slice(None)
        self._sources = [
            TokenSource(name, prepared.sources[name].splits["train"], seed, data_config.document_chunk_tokens)
            for name in self.source_names
        ]
        self._objectives = phase_objectives(self.curriculum, prepared, data_config, seq_len)
        self._planner = Planner(
            self.curriculum, self._sources, self._objectives, data_config, seq_len, global_batch_rows, seed
        )
        self._state = self._planner.state_dict()
        self._pool = ThreadPoolExecutor(data_config.workers) if data_config.workers else None
        self._ahead: deque[tuple[Future[StepBatch], dict[str, Any]]] = deque()

    def _require_sources(self) -> None:
        for index, phase in enumerate(self.curriculum.phases):
            for name in phase.mix:
                if name not in self.source_names:
                    raise DataError(
                        f"curriculum[{index}].mix names the source {name!r}; there are "
                        f"{', '.join(self.source_names)}"
                    )

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> StepBatch:
        if self._pool is None:
            batch = self._build(self._planner.plan_step())
            self._state = self._planner.state_dict()
            return batch
        while len(self._ahead) <= self._config.workers:
            plan = self._planner.plan_step()
            self._ahead.append((self._pool.submit(self._build, plan), self._planner.state_dict()))
        future, state = self._ahead.popleft()
        batch = future.result()
        self._state = state
        return batch

    def _build(self, plan: StepPlan) -> StepBatch:
        names = self.source_names
        text_tokens, tokens = [0] * len(names), [0] * len(names)
        loss_tokens = 0
        for row in plan.rows:
            for example in row:
                text_tokens[example.source] += example.size.raw_tokens
                tokens[example.source] += example.row_tokens
                loss_tokens += example.size.target_tokens
        return StepBatch(
            step=plan.step,
            phase=plan.phase,
            objective=self.curriculum.phases[plan.phase].objective,
            arrays=materialise(
                plan.rows[self._rows], self._sources, self._objectives[plan.phase], self._seq_len
            ),
            positions=self.curriculum.tokens_per_step,
            nonpad_tokens=sum(tokens),
            loss_tokens=loss_tokens,
            source_text_tokens=dict(zip(names, text_tokens, strict=True)),
            source_tokens=dict(zip(names, tokens, strict=True)),
            source_epochs=dict(zip(names, plan.epochs, strict=True)),
        )

    def _identity(self) -> dict[str, Any]:
        return self._prepared.fingerprint | {
            "run.seed": self._seed,
            "train.seq_len": self._seq_len,
            "train.global_batch_rows": self._global_batch_rows,
            "data.mix_rates": self._config.mix_rates,
            "data.document_chunk_tokens": self._config.document_chunk_tokens,
            "data.row_end_eos": self._config.row_end_eos,
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON: where the run stands after the batch yielded last, and what data it reads."""
        return {"identity": self._identity(), "plan": self._state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the step after the state's. Raises DataError where it belongs to other data."""
        saved, here = state.get("identity", {}), self._identity()
        # Another tokenizer changes the sources too, so they come last.
        for key in sorted(saved.keys() | here.keys(), key=lambda key: (key.startswith("source "), key)):
            if saved.get(key) == here.get(key):
                continue
            if key not in here or key not in saved:
                where = "is not in this curriculum" if key in saved else "is new in this curriculum"
                raise DataError(f"a resumed run must read the same sources: {key} {where}")
            raise DataError(f"a resumed run must agree in {key}: saved with {saved[key]}, now {here[key]}")
        self._ahead.clear()
        self._planner.load_state_dict(state["plan"])
        self._state = self._planner.state_dict()

    def validation_rows(self, objective: ObjectiveName, source: str, rows: int) -> dict[str, np.ndarray]:
        """Held-back text of one source as `objective` shows it: the same arrays [rows, seq_len] in every run.

        Each piece of text comes at most once; where there is too little, the last rows are padding.
        """
        index = self.source_names.index(source)
        held_back = self._prepared.sources[source].splits["valid"]
        reader = TokenSource(source, held_back, seed=0, chunk_tokens=None)
        made = make_objective(objective, self._seq_len, self._prepared.tokenizer, self._config.row_end_eos)
        plan = validation_plan(index, reader, made, self._seq_len, rows)
        sources = [reader] * len(self.source_names)
        return materialise(plan, sources, made, self._seq_len)

    def close(self) -> None:
        """Stop the threads that build ahead."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
