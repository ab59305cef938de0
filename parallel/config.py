"""The `parallel` section: which engine runs the step and how the ranks are laid out."""

from typing import Literal, Self

from pydantic import BaseModel, Field, model_validator


class ParallelConfig(BaseModel, strict=True, extra="forbid", frozen=True, allow_inf_nan=False):
    """Degrees of the layout: replicate * shard * tensor processes; experts borrow from shard * tensor."""

    engine: Literal["torch", "deepspeed", "xla"] = "torch"
    replicate: int = Field(1, ge=1)  # copies of the sharded model
    shard: int = Field(-1, ge=-1)  # ranks that share one copy by rows of data; -1 fills
    tensor: int = Field(1, ge=1)  # ranks that share each row
    expert: int = Field(1, ge=1)  # ranks among which the experts are spread
    zero_stage: int = Field(0, ge=0, le=3)  # DeepSpeed only

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.zero_stage and self.engine != "deepspeed":
            raise ValueError(f"zero_stage={self.zero_stage}: allowed 0 unless parallel.engine=deepspeed")
        return self
