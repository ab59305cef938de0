"""Learning rates as functions of the step: the number of updates already made, so the first has step 0."""

import math

import numpy as np

from openmoe.optim.config import (
    ConstantSchedule,
    CosineSchedule,
    InverseSqrtSchedule,
    LinearWarmupSchedule,
    ScheduleConfig,
)


def learning_rate(schedule: ScheduleConfig, step: int) -> float:
    """Learning rate of the update that follows `step` earlier ones."""
    match schedule:
        case ConstantSchedule():
            return schedule.value
        case InverseSqrtSchedule():
            return inverse_sqrt(step, schedule.base, schedule.warmup_steps)
        case LinearWarmupSchedule():
            rise = min(1.0, step / schedule.warmup_steps)
            return rise * inverse_sqrt(step, schedule.base, schedule.warmup_steps)
        case CosineSchedule():
            return cosine(
                step,
                schedule.peak,
                schedule.warmup_steps,
                schedule.total_steps,
                schedule.final_fraction,
            )


def inverse_sqrt(step: int, base: float, warmup_steps: int) -> float:
    """base / sqrt(max(step, warmup_steps)) in float32, to the last bit as the original (facts 4.4)."""
    return float(np.float32(base) / np.sqrt(np.float32(max(step, warmup_steps))))


def cosine(step: int, peak: float, warmup_steps: int, total_steps: int, final_fraction: float) -> float:
    """Linear rise to `peak` with update number warmup_steps, then half a cosine to the final value."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
    return peak * (final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress)))
