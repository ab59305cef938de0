"""What DeepSpeed's engine is tried with; everything else is refused before a run starts, with the reason."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from openmoe.optim.config import OptimConfig
from openmoe.parallel.config import ParallelConfig
from openmoe.parallel.topology import TopologyError


@dataclass(frozen=True)
class Asked:
    """What a configuration wants of the engine."""

    parallel: ParallelConfig
    optimizer: str
    precision: str
    freezes: bool  # routers, at some step
    alone: bool  # in a process that nobody has started as one of a run

    @property
    def splits_state(self) -> bool:
        return self.parallel.zero_stage > 0


@dataclass(frozen=True)
class Refusal:
    applies: Callable[[Asked], bool]
    line: str  # with the fields of `Asked`


REFUSALS = (
    Refusal(
        lambda asked: asked.parallel.zero_stage == 3,
        "parallel.zero_stage=3: allowed 0, 1 and 2; it would share out experts among ranks that hold "
        "different ones (parallel.engine=torch shares out parameters too)",
    ),
    Refusal(
        lambda asked: asked.splits_state and asked.optimizer != "adamw",
        "parallel.zero_stage={parallel.zero_stage} with optim={optimizer}: allowed optim=adamw; ZeRO hands "
        "the optimizer flat runs of many parameters, which have no rows and columns",
    ),
    Refusal(
        lambda asked: asked.splits_state and asked.precision == "fp64",
        "parallel.zero_stage={parallel.zero_stage} with train.precision=fp64: allowed fp32 and bf16; ZeRO "
        "updates in float32",
    ),
    Refusal(
        lambda asked: asked.splits_state and asked.freezes,
        "train.freeze_router_at_step with parallel.zero_stage={parallel.zero_stage}: allowed null; ZeRO "
        "takes a missing gradient for zeros, by which decay and momentum would go on",
    ),
    Refusal(
        lambda asked: asked.parallel.compile,
        "parallel.compile=true: allowed false with parallel.engine=deepspeed, where it is untried",
    ),
    Refusal(
        lambda asked: asked.alone,
        "parallel.engine=deepspeed: allowed in processes that torchrun or deepspeed has started, if only one",
    ),
    Refusal(
        lambda asked: importlib.util.find_spec("deepspeed") is None,
        "parallel.engine=deepspeed: the package deepspeed is not installed here; pip install "
        "'openmoe[deepspeed]' brings it",
    ),
)


def check_supported(
    parallel: ParallelConfig, optim: OptimConfig, precision: str, *, freezes: bool, alone: bool
) -> None:
    """Raises TopologyError, with one line, for the first thing asked that the engine does not do."""
    asked = Asked(parallel, optim.name, precision, freezes, alone)
    for refusal in REFUSALS:
        if refusal.applies(asked):
            raise TopologyError(refusal.line.format(**vars(asked)))
