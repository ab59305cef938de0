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
    # Between the ranks of an expert group: fixed sends all slots, uneven only the kept rows. auto: fixed
    # where whole routing groups with a capacity lie on each rank (tensor=1, not dropless).
    exchange: Literal["auto", "fixed", "uneven"] = "auto"
    # The dense FFN of a parallel block runs while tokens travel to their experts. auto: where devices have
    # streams for it (CUDA). Changes no result.
    overlap: Literal["auto", "on", "off"] = "auto"
    # What a backward pass computes again: nothing; of norms, attention, FFN and experts all but what is
    # expensive (their inputs are kept); or all of a block.
    recompute: Literal["none", "selective", "full"] = "none"
    compile: bool = False  # attention, FFN and norms through torch.compile
    zero_stage: int = Field(0, ge=0, le=3)  # DeepSpeed only
    # A run of several processes ends where they did not all come within the first, or where one began
    # nothing new within the second: then it hangs, or its longest step needs more.
    start_timeout_seconds: float = Field(300.0, gt=0, le=1e6)
    timeout_seconds: float = Field(600.0, gt=0, le=1e6)

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.zero_stage and self.engine != "deepspeed":
            raise ValueError(f"zero_stage={self.zero_stage}: allowed 0 unless parallel.engine=deepspeed")
        if self.compile and self.recompute == "selective":
            # What it keeps are results of single operations, which a compiled module does not show.
            raise ValueError("recompute=selective: allowed none or full with parallel.compile=true")
        return self
