"""Batches of a run, step after step: planned in order, built by any number of threads, resumed exactly."""

import copy
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from openmoe.data.batch_memory import AllocateBytes, BatchMemory, ordinary_memory
from openmoe.data.config import DataConfig, ObjectiveName, PhaseConfig
from openmoe.data.curriculum import Curriculum
from openmoe.data.errors import DataError
from openmoe.data.objectives import Objective, make_objective
from openmoe.data.packing import empty_batch
from openmoe.data.plan import Planner, Repetition, StepPlan, held_back_examples, materialise
from openmoe.data.prepare import PreparedData
from openmoe.data.recipe import PlannedExamples
from openmoe.data.stream import TokenStream

# The keys of the data section that decide what stands in a row.
_ROW_KEYS = {
    *("document_chunk_tokens", "row_end_eos", "mode_strings", "denoisers", "example_tokens", "packing"),
}


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
    # What stands where in the whole global batch; `row` counts from its first row.
    examples: PlannedExamples


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
        allocate: AllocateBytes = ordinary_memory,
    ) -> None:
        """`rows` selects this rank's rows of the global batch (None: all); `allocate` gives their memory.

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
        self._memory = BatchMemory(allocate)
        self._rows = rows if rows is not None else slice(None)
        assert self._rows.step is None, "a rank's rows follow one another"
        self._require_rows()
        self._streams = [
            TokenStream(name, prepared.sources[name].splits["train"], seed, data_config.document_chunk_tokens)
            for name in self.source_names
        ]
        self._objectives = [self._objective(phase.objective) for phase in self.curriculum.phases]
        self._planner = Planner(
            self.curriculum, self._streams, self._objectives, data_config, seq_len, global_batch_rows, seed
        )
        # As it stands after the batch yielded last, whatever was planned ahead.
        self._yielded = copy.copy(self._planner)
        self._pool = ThreadPoolExecutor(data_config.workers) if data_config.workers else None
        self._ahead: deque[tuple[Future[StepBatch], Planner]] = deque()

    def _require_rows(self) -> None:
        example_tokens, packing = self._config.example_tokens, self._config.packing
        if example_tokens is None or example_tokens == self._seq_len:
            return
        if packing == "released" or example_tokens > self._seq_len:
            allowed = "null" if packing == "released" else f"at most train.seq_len={self._seq_len}, or null"
            raise DataError(
                f"data.example_tokens={example_tokens} with data.packing={packing}: allowed {allowed}"
            )

    def _require_sources(self) -> None:
        for index, phase in enumerate(self.curriculum.phases):
            for name, rate in phase.mix.items():
                if rate > 0 and name not in self.source_names:
                    raise DataError(
                        f"curriculum[{index}].mix names the source {name!r}; there are "
                        f"{', '.join(self.source_names)}"
                    )

    def _objective(self, name: ObjectiveName) -> Objective:
        example_tokens = self._config.example_tokens or self._seq_len
        return make_objective(name, example_tokens, self._prepared.tokenizer, self._config)

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> StepBatch:
        if self._pool is None:
            plan = self._planner.plan_step()
            self._yielded = copy.copy(self._planner)
            return self._build(plan)
        while len(self._ahead) <= self._config.workers:
            plan = self._planner.plan_step()
            self._ahead.append((self._pool.submit(self._build, plan), copy.copy(self._planner)))
        future, planner = self._ahead.popleft()
        batch = future.result()
        self._yielded = planner
        return batch

    def _build(self, plan: StepPlan) -> StepBatch:
        examples, names = plan.examples, self.source_names
        first_row, past_row, _ = self._rows.indices(self._global_batch_rows)
        first, past = np.searchsorted(examples.row, [first_row, past_row])
        mine = PlannedExamples(*(array[first:past] for array in examples))
        sizes = examples.input_tokens + examples.target_tokens

        def by_source(tokens: np.ndarray) -> dict[str, int]:
            sums = np.bincount(examples.source, tokens, len(names)).astype(np.int64)
            return dict(zip(names, sums.tolist(), strict=True))

        return StepBatch(
            step=plan.step,
            phase=plan.phase,
            objective=self.curriculum.phases[plan.phase].objective,
            arrays=materialise(
                mine._replace(row=mine.row - first_row),
                self._streams,
                self._objectives[plan.phase],
                self._memory.empty_batch(past_row - first_row, self._seq_len),
            ),
            positions=self.curriculum.tokens_per_step,
            nonpad_tokens=int(sizes.sum()),
            loss_tokens=int(examples.target_tokens.sum()),
            source_text_tokens=by_source(examples.raw_tokens),
            source_tokens=by_source(sizes),
            source_epochs=dict(zip(names, plan.epochs, strict=True)),
            examples=examples,
        )

    def class_names(self, phase: int) -> list[str]:
        """The classes of a phase's examples, by `examples.kind`."""
        return [c.name for c in self._objectives[phase].classes]

    def seek(self, step: int) -> None:
        """Go to `step` of a run that began with nothing read, in a time that doesn't depend on it."""
        self._ahead.clear()
        self._planner.seek(step)
        self._yielded = copy.copy(self._planner)

    def repetitions(self, total_steps: int) -> list[Repetition]:
        """The sources that a run of `total_steps` reads more than once from here on.

        Raises DataError where data.repetition forbids it.
        """
        found = self._yielded.repetitions(total_steps)
        if found and self._config.repetition == "forbid":
            source, step, epochs = found[0]
            raise DataError(
                f"source {source!r} is used up at step {step} and would be read {epochs:.2f} times by step "
                f"{total_steps}; data.repetition=forbid allows once: more text, fewer steps or a smaller rate"
            )
        return found

    def _identity(self) -> dict[str, Any]:
        return self._prepared.fingerprint | {
            "run.seed": self._seed,
            "train.seq_len": self._seq_len,
            "train.global_batch_rows": self._global_batch_rows,
            **{f"data.{key}": value for key, value in self._config.model_dump(include=_ROW_KEYS).items()},
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON: where the run stands after the batch yielded last, and what data it reads."""
        return {"identity": self._identity(), "plan": self._yielded.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the step after the state's. Sources and their text may have been added since.

        Raises DataError where the state belongs to other data.
        """
        saved, here = state.get("identity", {}), self._identity()
        # Another tokenizer changes the sources too, so they come last.
        for key in sorted(saved.keys() | here.keys(), key=lambda key: (key.startswith("source "), key)):
            if key.startswith("source "):
                # A source may come or go with the curriculum, and text may have been added to it.
                same = key not in saved or key not in here or here[key][: len(saved[key])] == saved[key]
            else:
                same = saved.get(key) == here.get(key)
            if not same:
                raise DataError(
                    f"a resumed run must agree in {key}: saved with {saved.get(key)}, now {here.get(key)}"
                )
        self._ahead.clear()
        self._planner.load_state_dict(state.get("plan", {}))
        self._yielded = copy.copy(self._planner)

    def validation_rows(self, objective: ObjectiveName, source: str, rows: int) -> dict[str, np.ndarray]:
        """Held-back text of one source as `objective` shows it: the same arrays [rows, seq_len] in every run.

        Each piece of text comes at most once; where there is too little, the last rows are padding.
        """
        index = self.source_names.index(source)
        held_back = TokenStream(source, self._prepared.sources[source].splits["valid"], 0, None)
        made = self._objective(objective)
        examples = held_back_examples(index, held_back, made, self._seq_len, rows)
        batch = empty_batch(rows, self._seq_len)
        return materialise(examples, [held_back] * len(self.source_names), made, batch)

    def close(self) -> None:
        """Stop the threads that build ahead."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
