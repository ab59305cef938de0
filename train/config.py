"""The `train` section: batch, length, precision, losses and validation."""

from typing import Literal, Self

from pydantic import BaseModel, Field, model_validator


class TrainConfig(BaseModel, strict=True, extra="forbid", frozen=True, allow_inf_nan=False):
    # The run ends after `steps` updates, or at the first step at or after `tokens` row positions; both null:
    # at the last mark of the curriculum.
    steps: int | None = Field(None, gt=0, le=2**53)
    tokens: int | None = Field(None, gt=0, le=2**53)
    global_batch_rows: int = Field(gt=0, le=2**20)  # rows of one update over all ranks (paper Table 12)
    micro_batch_rows: int = Field(-1, ge=-1)  # rows of one data rank at a time; -1 = all it has
    seq_len: int = Field(gt=1, le=2**20)  # positions of a row
    precision: Literal["fp64", "fp32", "bf16"] = "fp32"  # bf16: float32 parameters, bfloat16 activations
    # global_tokens: LM loss = sum over the global batch / its number of loss tokens. per_microbatch: each
    # micro-batch by its own number, then summed, as the original; depends on the number of micro-batches.
    loss_normalization: Literal["global_tokens", "per_microbatch"] = "global_tokens"
    z_loss_weight: float = Field(1e-3, ge=0, le=1e6)  # of log(Z)^2 of the head (Table 12)
    load_balancing_weight: float = Field(1e-2, ge=0, le=1e6)  # Table 12
    router_z_loss_weight: float = Field(1e-4, ge=0, le=1e6)  # Table 12
    freeze_router_at_step: int | None = Field(None, ge=0)  # from this step on routers get no update
    validate_every_steps: int = Field(0, ge=0)  # 0: only where a phase or the run ends
    validation_rows: int = Field(16, ge=0, le=2**16)  # of each source; 0: no validation
    profile: bool = False  # some of the first steps, into the folder `profile` of run.dir

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.steps is not None and self.tokens is not None:
            raise ValueError(
                f"steps={self.steps} and tokens={self.tokens}: give one of the two, null the other"
            )
        if self.micro_batch_rows == 0:
            raise ValueError("micro_batch_rows=0: allowed -1 (all) or a number of rows from 1")
        return self
