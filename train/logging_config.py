"""What a run tells the world, and how often."""

from typing import Literal

from pydantic import BaseModel, Field


class LoggingConfig(BaseModel, strict=True, extra="forbid", frozen=True, allow_inf_nan=False):
    """`metrics.jsonl` has a line for every step whatever is set here."""

    wandb: Literal["offline", "online", "disabled"] = "offline"  # offline: `wandb sync` uploads the run later
    project: str = Field("openmoe", min_length=1, pattern=r"^[^/\\#?%:\x00-\x1f]+$")  # W&B project
    every_steps: int = Field(10, gt=0)  # steps between progress lines where the output is no terminal
    # Steps whose metrics are read from the device together: it is not waited for in between. A signal, a
    # loss that is not finite and a save that has failed are noticed there too.
    read_every_steps: int = Field(1, gt=0)
