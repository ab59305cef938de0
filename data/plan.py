"""What every row of every step will hold, decided without touching a token.

The plan is made step after step, the same on every rank, from a state of a few numbers per source. What it
decides for an example (source, position, key, sizes) is all that is needed to build it, so any rank or thread
can build any row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from openmoe.data.config import DataConfig
from openmoe.data.curriculum import Curriculum
from openmoe.data.errors import DataError
from openmoe.data.mixture import next_source
from openmoe.data.objectives import ExampleSize, Objective, make_objective
from openmoe.data.packing import empty_batch, fill_row
from openmoe.data.prepare import PreparedData
from openmoe.data.rng import RandomKey, random_key
from openmoe.data.sources import START, Position, TokenSource


@dataclass(frozen=True, slots=True)
class ExamplePlan:
    """One example to be built."""

    # Index into the run's source names.
    source: int
    position: Position
    key: RandomKey
    size: ExampleSize

    @property
    def row_tokens(self) -> int:
        """Row positions the example takes."""
        return self.size.input_tokens + self.size.target_tokens


RowPlan = list[ExamplePlan]


@dataclass(frozen=True)
class StepPlan:
    """All rows of one step."""

    step: int
    phase: int
    rows: list[RowPlan]
    # Epochs of each source's text used after this step, whole and fraction, by source index.
    epochs: list[float]


class Planner:
    """Plans the steps of a run, one after the other.

    Its state: the number of planned steps, the phase, what the mix has given each source in this phase, and
    each source's position and number of examples, which go on across phases.
    """

    def __init__(
        self,
        curriculum: Curriculum,
        sources: Sequence[TokenSource],
        objectives: Sequence[Objective],
        data_config: DataConfig,
        seq_len: int,
        global_batch_rows: int,
        seed: int,
    ) -> None:
        """`objectives` are those of the curriculum's phases."""
        self._curriculum = curriculum
        self._sources = sources
        self._objectives = objectives
        self._count_tokens = data_config.mix_rates == "per_token"
        self._seq_len = seq_len
        self._rows = global_batch_rows
        self._seed = seed
        self._rates = [self._phase_rates(phase.mix) for phase in curriculum.phases]
        self.step = 0
        self._phase = 0
        self._given = [0] * len(sources)
        self._positions = [START] * len(sources)
        self._examples = [0] * len(sources)

    def _phase_rates(self, mix: dict[str, float]) -> list[float]:
        total = sum(mix.values())
        return [mix.get(source.name, 0.0) / total for source in self._sources]

    def plan_step(self) -> StepPlan:
        """The plan of the next step."""
        phase = self._curriculum.phase_at(self.step)
        if phase != self._phase:
            # The new mix holds from here on; it does not make up for the old one.
            self._phase, self._given = phase, [0] * len(self._sources)
        rows: list[RowPlan] = []
        example = self._next_example()
        for _ in range(self._rows):
            row: RowPlan = []
            room = self._seq_len
            # Next-fit: the first example that doesn't fit closes the row and opens the next one. At the end
            # of the step it is dropped, and as nothing was counted for it yet it comes again.
            while example.row_tokens <= room:
                row.append(example)
                room -= example.row_tokens
                self._use(example)
                example = self._next_example()
            rows.append(row)
        plan = StepPlan(self.step, phase, rows, self._epochs())
        self.step += 1
        return plan

    def _next_example(self) -> ExamplePlan:
        source = next_source(self._rates[self._phase], self._given)
        key = random_key("example", self._seed, self._sources[source].name, self._examples[source])
        size = self._objectives[self._phase].measure(key)
        return ExamplePlan(source, self._positions[source], key, size)

    def _use(self, example: ExamplePlan) -> None:
        source, raw_tokens = example.source, example.size.raw_tokens
        join_eos = self._objectives[self._phase].joins_with_eos
        self._positions[source] = self._sources[source].skip(example.position, raw_tokens, join_eos)
        self._examples[source] += 1
        self._given[source] += raw_tokens if self._count_tokens else 1

    def _epochs(self) -> list[float]:
        return [
            position.epoch + position.rank / source.documents
            for position, source in zip(self._positions, self._sources, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on, as plain JSON."""
        return {
            "step": self.step,
            "phase": self._phase,
            "sources": {
                source.name: {
                    "given": self._given[index],
                    "position": list(self._positions[index]),
                    "examples": self._examples[index],
                }
                for index, source in enumerate(self._sources)
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the step the state was taken at. Raises DataError where it is of another form."""
        try:
            entries = [state["sources"][source.name] for source in self._sources]
            self.step, self._phase = int(state["step"]), int(state["phase"])
            self._given = [int(entry["given"]) for entry in entries]
            self._positions = [Position(*map(int, entry["position"])) for entry in entries]
            self._examples = [int(entry["examples"]) for entry in entries]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"the data state is not one of this program: {error!r}") from None


def materialise(
    rows: Sequence[RowPlan], sources: Sequence[TokenSource], objective: Objective, seq_len: int
) -> dict[str, np.ndarray]:
    """Build the rows: arrays [rows, seq_len] by name (see packing.BATCH_ARRAYS)."""
    batch = empty_batch(len(rows), seq_len)
    for index, row in enumerate(rows):
        examples = [
            objective.build(
                sources[plan.source].read(plan.position, plan.size.raw_tokens, objective.joins_with_eos),
                plan.key,
            )
            for plan in row
        ]
        fill_row(batch, index, examples, [plan.source for plan in row])
    return batch


def validation_plan(
    index: int, source: TokenSource, objective: Objective, seq_len: int, rows: int
) -> list[RowPlan]:
    """`rows` rows of one source's held-back text, each text at most once; rows beyond its end stay empty.

    `index` is the source's place in the run's source names.
    """
    plans: list[RowPlan] = [[] for _ in range(rows)]
    position, row, room, number = START, 0, seq_len, 0
    left = source.epoch_tokens(objective.joins_with_eos)
    while left:
        key = random_key("validation", source.name, number)
        example = ExamplePlan(index, position, key, objective.measure(key, left))
        if example.row_tokens > room:
            row, room = row + 1, seq_len
        if row == rows:
            break
        plans[row].append(example)
        room -= example.row_tokens
        position = source.skip(position, example.size.raw_tokens, objective.joins_with_eos)
        left -= example.size.raw_tokens
        number += 1
    return plans


def phase_objectives(
    curriculum: Curriculum, prepared: PreparedData, data_config: DataConfig, seq_len: int
) -> list[Objective]:
    """The objective of each phase. Raises DataError as `make_objective` does."""
    return [
        make_objective(phase.objective, seq_len, prepared.tokenizer, data_config.row_end_eos)
        for phase in curriculum.phases
    ]
