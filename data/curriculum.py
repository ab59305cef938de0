"""The phases of a run, and the step at which one follows another."""

from collections.abc import Sequence

from openmoe.data.config import PhaseConfig
from openmoe.data.errors import DataError


class Curriculum:
    """Phases with their marks in steps.

    A phase ends at the first step boundary at or after its mark, where a step is `global_batch_rows *
    seq_len` row positions. The last phase goes on for as long as it is asked.
    """

    def __init__(self, phases: Sequence[PhaseConfig], seq_len: int, global_batch_rows: int) -> None:
        """Raises DataError for no phases, a missing mark, or marks that don't grow."""
        if not phases:
            raise DataError("curriculum is empty; give at least one phase")
        self.phases = list(phases)
        self.tokens_per_step = seq_len * global_batch_rows
        self._end_steps: list[int] = []
        for index, phase in enumerate(self.phases):
            end_step = self._end_step(phase)
            if end_step is None:
                if index < len(self.phases) - 1:
                    raise DataError(
                        f"curriculum[{index}] has no mark; every phase but the last needs until_tokens "
                        "or until_steps"
                    )
                break
            previous = self._end_steps[-1] if self._end_steps else 0
            if end_step <= previous:
                raise DataError(
                    f"curriculum[{index}] ends at step {end_step} ({self._mark(phase)}), but "
                    f"curriculum[{index - 1}] already ends at step {previous} "
                    f"({self._mark(self.phases[index - 1])}); the marks must grow"
                )
            if previous + phase.ramp_steps > end_step:
                raise DataError(
                    f"curriculum[{index}].ramp_steps={phase.ramp_steps}: the phase has {end_step - previous} "
                    "steps; allowed at most as many"
                )
            self._end_steps.append(end_step)
        if self.phases[0].ramp_steps:
            raise DataError(
                f"curriculum[0].ramp_steps={self.phases[0].ramp_steps}: no mix comes before the first phase; "
                "allowed 0"
            )

    def _end_step(self, phase: PhaseConfig) -> int | None:
        if phase.until_tokens is not None:
            return -(-phase.until_tokens // self.tokens_per_step)
        return phase.until_steps

    @staticmethod
    def _mark(phase: PhaseConfig) -> str:
        if phase.until_tokens is not None:
            return f"until_tokens={phase.until_tokens}"
        return f"until_steps={phase.until_steps}"

    def phase_at(self, step: int) -> int:
        """Index of the phase that the step after `step` finished steps belongs to."""
        for index, end_step in enumerate(self._end_steps):
            if step < end_step:
                return index
        return len(self.phases) - 1

    def first_step(self, phase: int) -> int:
        """Finished steps when the phase begins."""
        return self._end_steps[phase - 1] if phase else 0

    def end_step(self, phase: int) -> int | None:
        """Finished steps when the phase is over; None where it has no mark."""
        return self._end_steps[phase] if phase < len(self._end_steps) else None

    def last_step(self) -> int | None:
        """Number of steps up to the last mark; None where the last phase has none."""
        return self._end_steps[-1] if len(self._end_steps) == len(self.phases) else None
