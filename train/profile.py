"""A few steps under torch's profiler: a trace to look at, and where the time of a step goes.

Modules are followed by hooks, which put a named range around their forward pass; what a backward pass
computes belongs to the part whose forward pass made its node of the graph. Nothing is hooked before the steps
begin or after they end, and the steps themselves take longer than others: shares are worth more than seconds.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile
from torch.utils.hooks import RemovableHandle

from openmoe.data.loader import StepBatch
from openmoe.model.decoder import Decoder
from openmoe.model.parts import HEAD, PARTS, modules_by_part

SKIPPED_STEPS, STEPS = 3, 3
_RANGE = "part: "
_BACKWARD = "autograd::engine::evaluate_function"
DATA, OPTIMIZER, VALIDATION = "data", "optimizer", "validation"
COMMUNICATION, REST, IDLE = "communication", "the rest", "idle"
_COMMUNICATION = ("c10d::", "nccl:", "gloo:", "ncclDevKernel")
ORDER = (*dict.fromkeys(PARTS.values()), HEAD, OPTIMIZER, COMMUNICATION, DATA, VALIDATION, REST, IDLE)


class NoProfile:
    """Where no step is profiled."""

    def data(self) -> AbstractContextManager[Any]:
        """Around waiting for a batch."""
        return nullcontext()

    def tick(self, batch: StepBatch) -> None:
        """After each update."""

    def close(self) -> None:
        """At the end of the run."""


NO_PROFILE = NoProfile()


@dataclass(frozen=True)
class PartTime:
    """Seconds of all profiled steps."""

    forward: float
    backward: float


class Profile(NoProfile):
    """Profiles `STEPS` steps after `SKIPPED_STEPS`; of a shorter run, those there are after the first."""

    def __init__(
        self,
        model: Decoder,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        folder: Path,
        utilization: Callable[[int, int, float], float],
        steps: int,
        say: Callable[[str], None],
    ) -> None:
        """`steps` of the whole run from here on; `utilization` as in `loop.Run`."""
        self._model = model
        self._optimizer = optimizer
        self._device = device
        self._folder = folder
        self._utilization = utilization
        self._say = say
        self._skipped = max(1, min(SKIPPED_STEPS, steps - STEPS))
        self._ticks = self._step = self._positions = self._loss_tokens = 0
        self._profiler: profile | None = None
        self._hooks: list[RemovableHandle] = []
        self._ranges: list[Any] = []
        self._since = 0.0

    def data(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._profiler is None else record_function(f"{_RANGE}{DATA}")

    def tick(self, batch: StepBatch) -> None:
        self._ticks, self._step = self._ticks + 1, batch.step + 1
        if self._profiler is not None:
            self._positions += batch.positions
            self._loss_tokens += batch.loss_tokens
        if self._ticks == self._skipped:
            self._start()
        elif self._ticks == self._skipped + STEPS:
            self._finish()

    def close(self) -> None:
        if self._profiler is not None:
            self._finish()

    def _start(self) -> None:
        for module, part in modules_by_part(self._model):
            self._hooks.append(
                module.register_forward_pre_hook(lambda module, _, part=part: self._enter(part))
            )
            self._hooks.append(module.register_forward_hook(self._leave, always_call=True))
        self._hooks.append(self._optimizer.register_step_pre_hook(lambda *_: self._enter(OPTIMIZER)))
        self._hooks.append(self._optimizer.register_step_post_hook(self._leave))
        losses = self._model.token_losses

        def token_losses(*arguments: Any, **named: Any) -> Any:
            self._enter(HEAD)
            try:
                return losses(*arguments, **named)
            finally:
                self._leave()

        self._model.token_losses = token_losses  # type: ignore[method-assign]
        self._wait_for_device()
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(activities=activities)
        self._profiler.start()
        self._since = time.perf_counter()

    def _enter(self, part: str) -> None:
        entered = record_function(_RANGE + (part if self._model.training else VALIDATION))
        entered.__enter__()
        self._ranges.append(entered)

    def _leave(self, *_: Any) -> None:
        self._ranges.pop().__exit__(None, None, None)

    def _finish(self) -> None:
        assert self._profiler is not None
        self._wait_for_device()
        wall = time.perf_counter() - self._since
        self._profiler.stop()
        for hook in self._hooks:
            hook.remove()
        del self._model.token_losses  # the method shows again
        profiler, self._profiler = self._profiler, None
        steps = self._ticks - self._skipped
        if not steps:
            self._say("no profile: the run has ended before its second step")
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self._folder / "trace.json.gz"))
        parts = time_by_part(profiler.events() or [], wall)
        lines = table(parts, wall, steps)
        utilization = self._utilization(self._positions, self._loss_tokens, wall)
        head = f"profile of steps {self._step - steps + 1} to {self._step}: {wall / steps:.4g} s a step"
        text = "\n".join([f"{head}, MFU {utilization:.1%}, traced", *lines])
        (self._folder / "table.txt").write_text(text + "\n")
        self._say(f"{text}\n{self._folder / 'trace.json.gz'}: for chrome://tracing or ui.perfetto.dev")

    def _wait_for_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def time_by_part(events: Iterable[Any], wall: float) -> dict[str, PartTime]:
    """Seconds by part of `events` (torch's FunctionEvent) within `wall` seconds.

    On a GPU the time of its kernels; idle is when none runs, and data as much of it as the host waited for a
    batch. On a CPU all that a part does, Python included; idle is what is outside of all parts and
    operations, and where a collective waits for others, as it does so in a thread of its own.
    """
    ordered = sorted(events, key=lambda event: event.time_range.start)
    host = [event for event in ordered if event.device_type == torch.autograd.DeviceType.CPU]
    # Ranges show on the device too, from their first kernel to their last.
    on_device = [event for event in ordered if event.device_type != torch.autograd.DeviceType.CPU]
    kernels = [event for event in on_device if not _is_range(event)]
    of_node: dict[int, str] = {}  # part of a node of the graph, by its number
    forward: defaultdict[str, float] = defaultdict(float)
    backward: defaultdict[str, float] = defaultdict(float)
    waited = 0.0
    for event in host:
        part, in_backward = _part(event, of_node)
        if event.sequence_nr >= 0 and not in_backward:
            of_node[event.sequence_nr] = part  # the last one that bears the number makes the node
        if kernels:
            seconds = sum(kernel.duration for kernel in event.kernels if not _is_range(kernel)) / 1e6
            waited += event.time_range.elapsed_us() / 1e6 if event.name == _RANGE + DATA else 0.0
        else:
            seconds = event.self_cpu_time_total / 1e6
        (backward if in_backward else forward)[part] += seconds
    busy = _union(kernels) if kernels else sum(forward.values()) + sum(backward.values())
    idle = max(0.0, wall - busy)
    if kernels:
        forward[DATA] = min(waited, idle)
        idle -= forward[DATA]
    forward[IDLE] = idle
    return {part: PartTime(forward[part], backward[part]) for part in forward | backward}


def table(parts: dict[str, PartTime], wall: float, steps: int) -> list[str]:
    """Milliseconds a step and share of `wall` by part, in a fixed order."""
    lines = [f"  {'part':<22}{'forward ms':>12}{'backward ms':>13}{'share':>8}"]
    for part in ORDER:
        time = parts.get(part)
        if time is not None and time.forward + time.backward > 0:
            milliseconds = [seconds * 1e3 / steps for seconds in (time.forward, time.backward)]
            share = (time.forward + time.backward) / wall
            lines.append(f"  {part:<22}{milliseconds[0]:>12.2f}{milliseconds[1]:>13.2f}{share:>8.1%}")
    return lines


def _part(event: Any, of_node: dict[int, str]) -> tuple[str, bool]:
    """(part, is it in the backward pass) of an event, from the ranges and nodes that it lies in.

    The innermost counts: a module that runs again in the backward pass is known by its range."""
    part: str | None = None
    in_backward = False
    while event is not None:
        if part is None:
            if event.name.startswith(_COMMUNICATION):
                part = COMMUNICATION
            elif event.name.startswith(_RANGE):
                part = event.name.removeprefix(_RANGE)
        if event.name.startswith(_BACKWARD):
            in_backward = True
            part = part or of_node.get(event.sequence_nr, REST)
        event = event.cpu_parent
    return part or REST, in_backward


def _is_range(event: Any) -> bool:
    return bool(event.name.startswith(_RANGE))


def _union(kernels: Iterable[Any]) -> float:
    """Seconds in which any of them runs; in the order of their starts."""
    busy, end = 0.0, 0.0
    for kernel in kernels:
        start, stop = max(kernel.time_range.start, end), kernel.time_range.end
        if stop > start:
            busy, end = busy + (stop - start) / 1e6, stop
    return busy
