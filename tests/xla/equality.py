"""Ten steps across the switch over a mesh against the same in one process.

`python -m tests.xla.equality` (in the environment of `make test-xla`, with its variables) prints all cases.
"""

from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

import torch
from torch import Tensor

from openmoe.parallel.xla import start
from tests.xla.training import MARK, Training, batches, mesh, on_host, page, routed

Shape = tuple[int, int, int]

MODELS = ("tiny", "tiny_released")
MESHES: list[Shape] = [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 4, 2)]
LOSSES = ("loss", "lm_loss", "z_loss", "load_balancing_loss", "router_z_loss", "accuracy")
MARGIN = 1e-5  # a choice whose probability is closer to the next one's may fall either way


def programs() -> int:
    """Compiled so far."""
    from torch_xla.debug import metrics

    return int((metrics.metric_data("CompileTime") or [0])[0])


def host_operations() -> dict[str, int]:
    """What XLA could not do, and the host did: how often so far."""
    from torch_xla.debug import metrics

    return {
        name: metrics.counter_value(name) for name in metrics.counter_names() if name.startswith("aten::")
    }


@dataclass
class Course:
    lines: list[dict[str, Any]] = field(default_factory=list)
    routing: list[list[tuple[Tensor, Tensor, Tensor]]] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)  # of the first step of each objective
    compiled: list[int] = field(default_factory=list)  # new programs of each step


def train(training: Training, experiment: str) -> Course:
    course = Course()
    for number, batch in enumerate(batches(experiment)):
        course.routing.append(list(training.route(batch)))
        before = programs()
        course.lines.append(training.step(number, batch))
        course.compiled.append(programs() - before)
        if number in (0, MARK):
            [gradients] = on_host([list(training.gradients.values())])
            names = [f"{batch.objective}/{name}" for name in training.gradients]
            course.gradients |= dict(zip(names, gradients, strict=True))
    return course


@cache
def in_one_process(experiment: str) -> Course:
    return train(Training(page(experiment)), experiment)


@dataclass(frozen=True)
class Comparison:
    """The worst of all steps, layers and tensors."""

    loss_error: float  # of any loss of any step; above 1 relative to it
    norm_error: float  # relative, of the first step's gradients
    gradient_error: float  # relative to the largest of its tensor, of the first step of each objective
    choices: int  # of tokens in MoE layers, those with a margin
    near_ties: int  # those without
    other_choices: int  # with a margin, and to other experts
    other_kept: int  # to the same experts in a step and layer without any difference, and dropped otherwise
    new_programs: list[int]  # of each step
    on_the_host: list[str]  # operations that XLA could not do


def compare(experiment: str, shape: Shape, devices: int) -> Comparison:
    expected = in_one_process(experiment)
    training = Training(page(experiment, *mesh(*shape)), devices)
    assert training.topology.xla_shape() == shape
    before = host_operations()
    found = train(training, experiment)
    assert found.gradients.keys() == expected.gradients.keys()
    assert {name.split("/")[0] for name in found.gradients} == {"ul2", "causal_lm"}

    choices = near_ties = other_choices = other_kept = 0
    for number, batch in enumerate(batches(experiment)):
        tokens = torch.from_numpy(routed(batch, training.config))
        for ours, theirs in zip(found.routing[number], expected.routing[number], strict=True):
            clear = theirs[2] > MARGIN
            same = (ours[0] == theirs[0]).all(-1)
            choices += int((tokens & clear).sum())
            near_ties += int((tokens & ~clear).sum())
            other_choices += int((tokens & clear & ~same).sum())
            if same[tokens].all():  # a near tie may move the slots of those behind it in its group
                other_kept += int((tokens & (ours[1] != theirs[1]).any(-1)).sum())
    return Comparison(
        loss_error=max(
            abs(ours[name] - theirs[name]) / max(1, abs(theirs[name]))
            for ours, theirs in zip(found.lines, expected.lines, strict=True)
            for name in LOSSES
        ),
        norm_error=abs(found.lines[0]["grad_norm"] / expected.lines[0]["grad_norm"] - 1),
        gradient_error=max(
            float((found.gradients[name] - whole).abs().max() / whole.abs().max())
            for name, whole in expected.gradients.items()
        ),
        choices=choices,
        near_ties=near_ties,
        other_choices=other_choices,
        other_kept=other_kept,
        new_programs=found.compiled,
        on_the_host=[name for name, count in host_operations().items() if count > before.get(name, 0)],
    )


def main() -> None:
    devices = start()
    names = [column.name.replace("_", " ") for column in fields(Comparison)]
    print(f"| model | data x expert x model | {' | '.join(names)} |")
    print("|---" * (2 + len(names)) + "|")
    for experiment in MODELS:
        for shape in MESHES:
            found = compare(experiment, shape, devices)
            values = [getattr(found, column.name) for column in fields(Comparison)]
            cells = [f"{value:.1e}" if isinstance(value, float) else str(value) for value in values]
            print(f"| {experiment} | {' x '.join(map(str, shape))} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
