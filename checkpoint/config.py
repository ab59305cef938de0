"""The `checkpoint` section of the configuration."""

from typing import Annotated

from pydantic import BaseModel, Field, StringConstraints


class CheckpointConfig(BaseModel, strict=True, extra="forbid", frozen=True, allow_inf_nan=False):
    """When checkpoints are written, which are kept, and where a run goes on."""

    every_steps: int = Field(0, ge=0)  # a checkpoint each so many steps; 0 = only at the end
    keep: int = Field(2, ge=0)  # newest checkpoints kept, beside the milestones; 0 = all
    # A checkpoint at the first step at or after each multiple, in tokens; never deleted. null = none.
    milestone_every_tokens: int | None = Field(None, gt=0)
    # none = start afresh; auto = the newest checkpoint in run.dir, afresh where there is none;
    # anything else = the folder of a checkpoint, or of a run (its newest one).
    resume: Annotated[str, StringConstraints(min_length=1, pattern=r"^[^\x00]+$")] = "none"
