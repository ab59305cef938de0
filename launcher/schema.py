"""The whole configuration: each room defines its section beside what it configures; here they meet."""

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator

from openmoe.checkpoint.config import CheckpointConfig
from openmoe.data.config import DataConfig, PathText, PhaseConfig, SourceName
from openmoe.launcher.errors import ConfigError, describe
from openmoe.model.config import ModelConfig
from openmoe.optim.config import OptimConfig
from openmoe.parallel.config import ParallelConfig
from openmoe.train.config import TrainConfig
from openmoe.train.logging_config import LoggingConfig

Page = TypeVar("Page", bound=BaseModel)


class RunConfig(BaseModel, strict=True, extra="forbid", frozen=True, allow_inf_nan=False):
    dir: PathText
    seed: int = Field(0, ge=0, lt=2**63)
    device: Literal["auto", "cpu", "cuda"] = "auto"


class Config(BaseModel, strict=True, extra="forbid", frozen=True, allow_inf_nan=False):
    run: RunConfig
    model: ModelConfig
    optim: OptimConfig
    train: TrainConfig
    curriculum: list[PhaseConfig] = Field(min_length=1)
    # Named mixes that phases refer to as ${mixes.NAME}; only the phases are read.
    mixes: dict[str, dict[SourceName, Annotated[float, Field(ge=0)]]] = Field(default_factory=dict)
    data: DataConfig
    parallel: ParallelConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig

    @model_validator(mode="after")
    def check(self) -> Self:
        train, model = self.train, self.model
        if model.moe_every and model.group_rule == "rows" and train.validation_rows % model.group_rows:
            raise ValueError(
                f"train.validation_rows={train.validation_rows}: allowed a multiple of "
                f"model.group_rows={model.group_rows}"
            )
        if self.data.packing == "dense" and (model.mask_padding or model.route_padding):
            key = "mask_padding" if model.mask_padding else "route_padding"
            raise ValueError(
                f"data.packing=dense: allowed with model.mask_padding=false and model.route_padding=false; "
                f"{key} is true, and what it does to padding is defined for rows attended to whole"
            )
        if train.profile and (self.parallel.compile or self.parallel.engine == "xla"):
            other = "parallel.compile=true" if self.parallel.compile else "parallel.engine=xla"
            raise ValueError(f"train.profile=true: allowed without {other}, which hides the parts of a step")
        return self


def validate(values: dict[str, Any], page: type[Page]) -> Page:
    """The composed values as a page of configuration.

    Raises ConfigError with one line naming key, value and what is allowed.
    """
    try:
        return page.model_validate(values)
    except ValidationError as error:
        raise ConfigError(describe(error, page)) from None
