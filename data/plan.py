"""What every row of every step holds, decided without touching a token.

A step's rows follow from its number: the phase it lies in, that phase's recipe, and the token number at which
each source stood when the phase began. The same on every rank; any rank or thread can build any row.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from openmoe.data.config import DataConfig
from openmoe.data.curriculum import Curriculum
from openmoe.data.errors import DataError
from openmoe.data.objectives import Objective
from openmoe.data.packing import NextFit, place
from openmoe.data.recipe import PhaseRecipe, PlannedExamples
from openmoe.data.rng import random_key
from openmoe.data.stream import Position, TokenStream

# Positions built at once: few enough for their temporaries to stay in the processor's cache.
_TOKENS_AT_ONCE = 131_072


@dataclass(frozen=True)
class StepPlan:
    """All rows of one step."""

    step: int
    phase: int
    # `start` counts from the beginning of each source.
    examples: PlannedExamples
    # How often each source has been gone through after this step, e.g. 1.25.
    epochs: list[float]


class Repetition(NamedTuple):
    """A source that a run reads more than once."""

    source: str
    # Steps finished before the first one that reads text again.
    step: int
    # How often the source is gone through by the end.
    epochs: float


class Planner:
    """Plans the steps of a run, one after the other or from any step on."""

    def __init__(
        self,
        curriculum: Curriculum,
        streams: Sequence[TokenStream],
        objectives: Sequence[Objective],
        config: DataConfig,
        seq_len: int,
        global_batch_rows: int,
        seed: int,
    ) -> None:
        """`objectives` are those of the curriculum's phases."""
        self._curriculum = curriculum
        self._streams = streams
        self._objectives = objectives
        self._rows = global_batch_rows
        # The sources each phase reads: others, present or not, change nothing in it.
        self._active = [np.flatnonzero(self._rates(index, True)) for index in range(len(curriculum.phases))]
        self._recipes = [
            self._recipe(index, seq_len, config.packing == "dense", seed) for index in range(len(objectives))
        ]
        self.step = 0
        self._phase = 0
        self._phase_step = 0
        self._bases = np.zeros(len(streams), np.int64)
        # Sources that the run read earlier and no phase names now: kept in case they come back.
        self._absent: dict[str, list[int]] = {}

    def _rates(self, index: int, with_ramp: bool = False) -> np.ndarray:
        """The phase's rate of each source; `with_ramp` adds those of the mix it comes from.

        Every source's text is cut into the same classes of examples, so its share of the examples is its
        share of the text: rates per token and per example give the same rows.
        """
        phase = self._curriculum.phases[index]
        rates = np.array([phase.mix.get(stream.name, 0.0) for stream in self._streams])
        rates = rates / rates.sum()
        return rates + self._rates(index - 1) if with_ramp and phase.ramp_steps else rates

    def _recipe(self, index: int, seq_len: int, packed: bool, seed: int) -> PhaseRecipe:
        ramp_steps, active = self._curriculum.phases[index].ramp_steps, self._active[index]
        ramp_from = self._rates(index - 1)[active] if ramp_steps else None
        ramp_rows = ramp_steps * self._rows
        rates = self._rates(index)[active]
        return PhaseRecipe(self._objectives[index], rates, seq_len, packed, seed, index, ramp_from, ramp_rows)

    def plan_step(self) -> StepPlan:
        """The plan of the next step."""
        self._enter(self._curriculum.phase_at(self.step))
        first_row = (self.step - self._phase_step) * self._rows
        examples = self._recipes[self._phase].examples(first_row, self._rows)
        source = self._active[self._phase][examples.source]
        examples = examples._replace(source=source, start=examples.start + self._bases[source])
        self.step += 1
        return StepPlan(self.step - 1, self._phase, examples, self._epochs())

    def seek(self, step: int) -> None:
        """Go to `step` of the run that began with nothing read."""
        self.step = self._phase = self._phase_step = 0
        self._bases = np.zeros_like(self._bases)
        self._enter(self._curriculum.phase_at(step))
        self.step = step

    def _joins(self) -> bool:
        return self._objectives[self._phase].joins_with_eos

    def _enter(self, phase: int) -> None:
        """Go on to `phase`; every source's text goes on where the phases before it stopped."""
        while self._phase < phase:
            first_step = self._curriculum.first_step(self._phase + 1)
            positions = self._positions(first_step)
            self._phase, self._phase_step = self._phase + 1, first_step
            self._bases = self._numbers_of(positions)

    def _numbers(self, step: int) -> np.ndarray:
        """The token number each source has reached when `step` of this phase begins, int64 [sources]."""
        rows = (step - self._phase_step) * self._rows
        numbers = self._bases.copy()
        numbers[self._active[self._phase]] += self._recipes[self._phase].tokens_before(rows)
        return numbers

    def _positions(self, step: int) -> list[Position]:
        numbers = self._numbers(step).tolist()
        return [s.position(n, self._joins()) for s, n in zip(self._streams, numbers, strict=True)]

    def _numbers_of(self, positions: Sequence[Position]) -> np.ndarray:
        return np.array([s.number(p, self._joins()) for s, p in zip(self._streams, positions, strict=True)])

    def _epochs(self) -> list[float]:
        sizes = [stream.epoch_tokens(self._joins()) for stream in self._streams]
        return (self._numbers(self.step) / sizes).tolist()

    def repetitions(self, total_steps: int) -> list[Repetition]:
        """The sources that a run of `total_steps` reads more than once from here on."""
        ahead = copy.copy(self)
        first_steps: dict[int, int] = {}
        sizes = np.zeros(0)
        while ahead.step < total_steps:
            ahead._enter(self._curriculum.phase_at(ahead.step))
            end = self._curriculum.end_step(ahead._phase)
            # The last phase goes on behind its mark.
            end = total_steps if end is None or end <= ahead.step else min(total_steps, end)
            sizes = np.array([stream.epoch_tokens(ahead._joins()) for stream in self._streams])
            before, after = ahead._numbers(ahead.step), ahead._numbers(end)
            for source in np.flatnonzero((after > sizes) & (after > before)).tolist():
                if source not in first_steps:
                    first_steps[source] = _first_step_beyond(ahead, source, int(sizes[source]), end)
            ahead.step = end
        if not first_steps:
            return []
        epochs = ahead._numbers(ahead.step) / sizes
        return [
            Repetition(self._streams[source].name, step, float(epochs[source]))
            for source, step in sorted(first_steps.items())
        ]

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on, as plain JSON of a few numbers per source."""
        positions = self._positions(self.step)
        return {
            "step": self.step,
            "phase": self._phase,
            "phase_step": self._phase_step,
            "sources": self._absent
            | {stream.name: list(place) for stream, place in zip(self._streams, positions, strict=True)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the step the state was taken at. Raises DataError where it is of another form.

        Whatever has changed in the curriculum since, every source goes on with the text that comes next; one
        that is new begins at its start.
        """
        try:
            step, phase, phase_step = (int(state[name]) for name in ("step", "phase", "phase_step"))
            entries = {name: [int(number) for number in entry] for name, entry in state["sources"].items()}
            positions = [Position(*entries.pop(stream.name, (0, 0, 0))) for stream in self._streams]
            self.step, self._absent = step, entries
            self._phase, self._phase_step = phase, phase_step
            if phase != self._curriculum.phase_at(max(step - 1, phase_step)):
                self._phase, self._phase_step = self._curriculum.phase_at(step), step
            # From what the rows before `step` take now, whether or not they took the same then: with another
            # mix they didn't, and text that was added lies in every epoch, the finished ones too.
            self._bases = np.zeros_like(self._bases)
            self._bases = self._numbers_of(positions) - self._numbers(step)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise DataError(f"the data state is not one of this program: {error!r}") from None


def _first_step_beyond(planner: Planner, source: int, number: int, end: int) -> int:
    """The first step of the planner's phase that reads token `number` of `source`, or one after it."""
    low, high = planner.step, end - 1
    while low < high:
        middle = (low + high) // 2
        if planner._numbers(middle + 1)[source] > number:
            high = middle
        else:
            low = middle + 1
    return low


def materialise(
    examples: PlannedExamples,
    streams: Sequence[TokenStream],
    objective: Objective,
    batch: dict[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """Fill the rows of `batch`, which holds padding: arrays [rows, seq_len], see packing.BATCH_ARRAYS.

    The examples of a source must follow one another in its text.
    """
    rows, seq_len = batch["target_tokens"].shape
    at_once = max(1, _TOKENS_AT_ONCE // seq_len)
    for first_row in range(0, rows, at_once):
        first, past = np.searchsorted(examples.row, [first_row, first_row + at_once])
        _build(PlannedExamples(*(array[first:past] for array in examples)), streams, objective, batch)
    return batch


def _build(
    examples: PlannedExamples,
    streams: Sequence[TokenStream],
    objective: Objective,
    batch: dict[str, np.ndarray],
) -> None:
    texts: dict[int, tuple[int, np.ndarray]] = {}
    for source in np.unique(examples.source).tolist():
        mine = np.flatnonzero(examples.source == source)
        first = int(examples.start[mine[0]])
        count = int(examples.start[mine[-1]] + examples.raw_tokens[mine[-1]]) - first
        texts[source] = first, streams[source].read(first, count, objective.joins_with_eos)
    for mine in _alike(examples, len(objective.classes) == 1):
        tokens = _cut(examples, mine, texts)
        built = objective.build(int(examples.kind[mine[0]]), tokens, examples.draw[mine])
        row, start, segment = examples.row[mine], examples.place[mine], examples.segment[mine]
        sources = examples.source[mine].tolist()
        place(batch, row.tolist(), start.tolist(), segment.tolist(), built, sources)


def _alike(examples: PlannedExamples, one_class: bool) -> list[np.ndarray]:
    """Indices of examples that are built together: of one class and, where it is the only one, one source.

    Only the last example of a held-back text is shorter than the others of its class.
    """
    group = examples.source if one_class else examples.kind
    group = group * (int(examples.raw_tokens.max(initial=0)) + 1) + examples.raw_tokens
    return [np.flatnonzero(group == number) for number in np.unique(group).tolist()]


def _cut(examples: PlannedExamples, mine: np.ndarray, texts: dict[int, tuple[int, np.ndarray]]) -> np.ndarray:
    """The text of examples of one length, int32 [n, raw tokens]; `texts` are first number and tokens."""
    raw_tokens = int(examples.raw_tokens[mine[0]])
    sources, starts = examples.source[mine].tolist(), examples.start[mine].tolist()
    if len(set(sources)) == 1 and starts[-1] - starts[0] == (len(mine) - 1) * raw_tokens:
        first, text = texts[sources[0]]  # one after the other: no copy
        return text[starts[0] - first :][: len(mine) * raw_tokens].reshape(len(mine), raw_tokens)
    pieces = []
    for source, start in zip(sources, starts, strict=True):
        first, text = texts[source]
        pieces.append(text[start - first : start - first + raw_tokens])
    return np.concatenate(pieces).reshape(len(mine), raw_tokens)


def held_back_examples(
    source: int, stream: TokenStream, objective: Objective, seq_len: int, rows: int
) -> PlannedExamples:
    """`rows` rows of one source's held-back text, next-fit, each text at most once.

    Rows beyond its end stay empty. `source` is its place in the run's source names.
    """
    shares = np.cumsum([c.rate for c in objective.classes])
    lines: list[tuple[int, ...]] = []
    draws: list[int] = []
    packing = NextFit(seq_len)
    start, left = 0, stream.epoch_tokens(objective.joins_with_eos)
    while left:
        key = random_key("validation", stream.name, len(lines))
        kind = min(int(np.searchsorted(shares, key.first / 2**64, "right")), len(shares) - 1)
        raw = min(objective.classes[kind].raw_tokens, left)
        sizes = objective.sizes(kind, raw, np.array([key.second], np.uint64))
        inputs, targets = (int(size[0]) for size in sizes)
        row, place_in_row, segment = packing.add(inputs + targets)
        if row == rows:
            break
        lines.append((source, kind, row, place_in_row, segment, start, raw, inputs, targets))
        draws.append(key.second)
        start += raw
        left -= raw
    source_of, kinds, *rest = np.array(lines, np.int64).reshape(len(lines), 9).T
    return PlannedExamples(source_of, kinds, np.array(draws, np.uint64), *rest)
