"""The `checkpoint` section of the configuration."""

from typing import Annotated, Self

from pydantic import BaseModel, Field, StringConstraints, model_validator

PathText = Annotated[str, StringConstraints(min_length=1, pattern=r"^[^\x00]+$")]


class CheckpointConfig(BaseModel, strict=True, extra="forbid", frozen=True, allow_inf_nan=False):
    """When checkpoints are written, which are kept, and where a run goes on."""

    every_steps: int = Field(0, ge=0)  # a checkpoint each so many steps; 0 = only at the end
    keep: int = Field(2, ge=0)  # newest checkpoints kept, beside the milestones; 0 = all
    # A checkpoint at the first step at or after each multiple, in tokens; never deleted. null = none.
    milestone_every_tokens: int | None = Field(None, gt=0)
    # The run goes on while a checkpoint is written, from copies in host memory; at most one at a time.
    asynchronous: bool = True
    save_timeout_seconds: float = Field(3600.0, gt=0)  # a save that takes longer ends the run
    # none = start afresh; auto = the newest checkpoint in run.dir, afresh where there is none;
    # anything else = the folder of a checkpoint, or of a run (its newest one).
    resume: PathText = "none"
    # A checkpoint whose weights the run starts from, with a fresh optimizer at step 0; null = initial values.
    # With resume=auto it counts where there is nothing to resume yet.
    initialise_from: PathText | None = None

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.initialise_from is not None and self.resume not in ("none", "auto"):
            raise ValueError(
                f"initialise_from={self.initialise_from}: allowed with resume=none or auto, which is "
                f"{self.resume}: a resumed run has its weights"
            )
        return self
