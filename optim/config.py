"""The `optim` section of the configuration: one optimizer with its learning-rate schedule."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator


class OptimSection(BaseModel, strict=True, extra="forbid", frozen=True, allow_inf_nan=False):
    """What every section of this room has in common: strict types, no unknown keys, immutable."""


class InverseSqrtSchedule(OptimSection):
    """base / sqrt(max(step, warmup_steps)): flat at first, without a linear warm-up (facts 4.4)."""

    name: Literal["inverse_sqrt"]
    # Value of the curve at step 1; the flat part has base / sqrt(warmup_steps).
    base: float = Field(default=1.0, gt=0)
    # Steps with the flat learning rate.
    warmup_steps: int = Field(default=10_000, ge=1, le=2**31)


class LinearWarmupSchedule(OptimSection):
    """A linear rise from 0 at step 0 to base / sqrt(warmup_steps), then base / sqrt(step)."""

    name: Literal["linear_warmup"]
    # Value of the inverse square-root curve at step 1.
    base: float = Field(default=1.0, gt=0)
    # Steps of the linear rise.
    warmup_steps: int = Field(default=10_000, ge=1, le=2**31)


class ConstantSchedule(OptimSection):
    """The same learning rate at every step (fine-tuning of the original: 1e-3)."""

    name: Literal["constant"]
    # Learning rate.
    value: float = Field(default=1e-3, gt=0)


class CosineSchedule(OptimSection):
    """A linear rise to `peak` over warmup_steps, then half a cosine down to peak * final_fraction."""

    name: Literal["cosine"]
    # Highest learning rate, reached by update number warmup_steps.
    peak: float = Field(default=3e-4, gt=0)
    # Updates of the linear rise; 0 starts at the peak.
    warmup_steps: int = Field(default=2_000, ge=0, le=2**31)
    # Step from which the learning rate stays at its final value.
    total_steps: int = Field(default=100_000, ge=1, le=2**31)
    # Final learning rate as a share of the peak.
    final_fraction: float = Field(default=0.1, ge=0, le=1)

    @model_validator(mode="after")
    def _warmup_ends_before_the_end(self) -> "CosineSchedule":
        if self.warmup_steps >= self.total_steps:
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) must be smaller than total_steps ({self.total_steps})"
            )
        return self


ScheduleConfig = Annotated[
    InverseSqrtSchedule | LinearWarmupSchedule | ConstantSchedule | CosineSchedule,
    Field(discriminator="name"),
]


class AdafactorConfig(OptimSection):
    """Adafactor with the semantics of t5x (facts 4.3); the defaults are the original's values."""

    name: Literal["adafactor"]
    # Learning rate over steps; multiplied by the RMS of each parameter.
    schedule: ScheduleConfig = InverseSqrtSchedule(name="inverse_sqrt")
    # Exponent r of the second-moment decay beta2 = 1 - (step + 1)^-r.
    decay_rate: float = Field(default=0.8, gt=0, le=1)
    # Added to the squared gradient.
    epsilon1: float = Field(default=1e-30, gt=0)
    # Smallest RMS of a parameter that scales its step.
    epsilon2: float = Field(default=1e-3, gt=0, le=1e30)
    # Largest RMS of an update before the learning rate, per tensor (per expert).
    clipping_threshold: float = Field(default=1.0, gt=0)
    # A matrix keeps a full second moment where its smaller side is below this (experts: never).
    min_dim_size_to_factor: int = Field(default=128, ge=1)


class AdamWConfig(OptimSection):
    """AdamW, the alternative; decay is not applied to norm scales."""

    name: Literal["adamw"]
    # Learning rate over steps.
    schedule: ScheduleConfig = CosineSchedule(name="cosine")
    # Decay of the first moment.
    beta1: float = Field(default=0.9, ge=0, lt=1)
    # Decay of the second moment.
    beta2: float = Field(default=0.95, ge=0, lt=1)
    # Added to the root of the second moment.
    epsilon: float = Field(default=1e-8, gt=0)
    # Share of a parameter taken off per update, times the learning rate.
    weight_decay: float = Field(default=0.1, ge=0)


OptimConfig = Annotated[AdafactorConfig | AdamWConfig, Field(discriminator="name")]
