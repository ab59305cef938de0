"""Where the time of a step goes: to which part each operation is counted."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.autograd.profiler import record_function
from torch.profiler import profile

from openmoe.train.profile import PartTime, Profile, table, time_by_part


@dataclass(eq=False)
class Event:
    """What is read of torch's FunctionEvent; times in microseconds."""

    name: str
    start: float = 0
    microseconds: float = 0
    cpu_parent: Any = None
    sequence_nr: int = -1
    device_type: Any = DeviceType.CPU
    kernels: list[Any] = field(default_factory=list)

    @property
    def time_range(self) -> Any:
        end = self.start + self.microseconds
        return SimpleNamespace(start=self.start, end=end, elapsed_us=lambda: self.microseconds)

    @property
    def self_cpu_time_total(self) -> float:
        return self.microseconds


class Doubled(torch.autograd.Function):
    """A node with arithmetic of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.exp()


def node(name: str, number: int) -> Event:
    return Event(f"autograd::engine::evaluate_function: {name}", sequence_nr=number)


def test_backward_belongs_to_the_part_that_made_its_node() -> None:
    """Bug: all of a backward pass counts as one lump, or goes to the part whose forward pass ran last."""
    x, w = (torch.randn(8, 8, requires_grad=True) for _ in range(2))
    profiler = profile()
    profiler.start()
    with record_function("part: router"):
        x.detach().relu()  # makes no node, and bears the number of the next one
    with record_function("part: attention"):
        y = x @ w
    with record_function("part: experts"):
        z = Doubled.apply(y)
    z.sum().backward()
    with record_function("part: optimizer"), torch.no_grad():
        w.sub_(1)
    profiler.stop()
    recorded = profiler.events()
    assert recorded is not None
    found = time_by_part([Told(event) for event in recorded], 10.0)
    assert found["attention"] == PartTime(1.0, 2.0)
    assert found["experts"] == PartTime(0.0, 1.0)
    assert found["optimizer"] == PartTime(1.0, 0.0)
    assert found["idle"] == PartTime(5.0, 0.0)


class Told:
    """A recorded event; one of three operations takes a second, all others nothing."""

    def __init__(self, event: Any) -> None:
        self._event = event
        self.self_cpu_time_total = 1e6 * (event.name in ("aten::mm", "aten::exp", "aten::sub_"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._event, name)


def test_what_runs_again_belongs_to_its_module() -> None:
    """Bug: with recomputation, a forward pass inside the backward pass counts to the node that asks."""
    asks = node("Checkpoint", 1)
    forward = Event("aten::view", sequence_nr=1, cpu_parent=Event("part: FFN"))
    again = Event("aten::mm", microseconds=3e6, cpu_parent=Event("part: router", cpu_parent=asks))
    own = Event("aten::add", microseconds=2e6, cpu_parent=asks)
    found = time_by_part([forward, asks, again, own], 10.0)
    assert found["router"] == PartTime(0.0, 3.0)
    assert found["FFN"] == PartTime(0.0, 2.0)


def test_kernels_of_a_gpu() -> None:
    """Bug: the time that a host takes to launch counts as the device's; kernels that overlap, or ranges that
    span gaps, hide that the device is idle; waiting for data counts twice."""

    def kernel(start: float, seconds: float, name: str = "kernel") -> Event:
        return Event(name, start * 1e6, seconds * 1e6, device_type=DeviceType.CUDA)

    def launched(seconds: float, name: str = "kernel") -> Any:
        return SimpleNamespace(name=name, duration=seconds * 1e6)

    attention = Event("part: attention", kernels=[launched(9, "part: attention")])
    events = [
        attention,
        Event("aten::mm", 1, 5e6, attention, kernels=[launched(2)]),
        Event("c10d::allreduce_", 2, 5e6, attention, kernels=[launched(1)]),
        Event("part: data", 3, 1.5e6),
        kernel(1, 2), kernel(2, 2), kernel(6, 1), kernel(0, 9, "part: attention"),
    ]  # fmt: skip
    found = time_by_part(events, 10.0)
    assert found["attention"] == PartTime(2.0, 0.0)
    assert found["communication"] == PartTime(1.0, 0.0)
    assert found["data"] == PartTime(1.5, 0.0)
    assert found["idle"] == PartTime(4.5, 0.0)


class OnePart(torch.nn.Module):
    """As much of a decoder as a profile touches."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.Linear(2, 2)

    def token_losses(self, x: Tensor) -> Tensor:
        return x.sum()


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    """Bug: hooks that open ranges at every step of the run after the profile, or from its first step on."""
    model = OnePart()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    said: list[str] = []
    batch: Any = SimpleNamespace(step=0, positions=1, loss_tokens=1)
    cpu = torch.device("cpu")
    watching = Profile(model, optimizer, cpu, tmp_path, lambda *_: 0.5, 10, said.append)  # type: ignore[arg-type]

    def hooked() -> list[bool]:
        of_module = model.attention._forward_hooks, model.attention._forward_pre_hooks
        of_optimizer = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
        return [*map(bool, of_module), *map(bool, of_optimizer), "token_losses" in vars(model)]

    for ticks in range(8):
        assert hooked() == [3 <= ticks < 6] * 5
        with watching.data():
            model.token_losses(model.attention(torch.ones(1, 2))).backward()
        optimizer.step()
        watching.tick(batch)
    assert len(said) == 1
    assert "MFU 50.0%" in said[0]


def test_table() -> None:
    """Bug: seconds of all steps shown as those of one, or parts in the order of chance."""
    parts = {"idle": PartTime(1.0, 0.0), "attention": PartTime(0.6, 1.4), "router": PartTime(0.0, 0.0)}
    assert table(parts, 4.0, 2)[1:] == [
        "  attention                   300.00       700.00   50.0%",
        "  idle                        500.00         0.00   25.0%",
    ]
