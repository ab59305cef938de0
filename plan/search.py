"""Every layout that a run can be cut into on a cluster, with what it needs and how long a step takes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

from openmoe.model.config import ModelConfig
from openmoe.optim.config import OptimConfig
from openmoe.parallel.build import exchange_of
from openmoe.parallel.config import ParallelConfig
from openmoe.parallel.placement import ParameterLayout
from openmoe.parallel.recompute import Recompute
from openmoe.parallel.topology import Topology, TopologyError, check_fit
from openmoe.parallel.traffic import Step, Traffic, Update, layouts_of, pass_traffic
from openmoe.plan.cluster import ClusterConfig
from openmoe.plan.memory import Memory, state_memory, with_micro_batch
from openmoe.plan.micro_batch import MicroBatchShape, shape_of, trace_micro_batch
from openmoe.plan.step_time import StepTime, step_time
from openmoe.plan.trace import Operations, Trace, trace_operations
from openmoe.train.config import TrainConfig

# Of a micro-batch: from here on matrix products are as fast as they get, and tracing gets slow.
MOST_POSITIONS = 65_536
RECOMPUTE: tuple[Recompute, ...] = get_args(Recompute)


@dataclass(frozen=True)
class Request:
    """What is to be trained."""

    model: ModelConfig
    optim: OptimConfig
    train: TrainConfig
    parallel: ParallelConfig  # the exchange; its degrees are what is looked for
    loss_share: float  # of the positions that reach the head, in the phase with most of them


@dataclass(frozen=True)
class Candidate:
    step: Step
    memory: Memory
    seconds: StepTime | None  # None where it does not fit


class Planner:
    """Looks at one layout after the other; what several share is traced once."""

    def __init__(self, request: Request, cluster: ClusterConfig) -> None:
        self.request = request
        self.cluster = cluster
        self._traces: dict[MicroBatchShape, Trace] = {}
        self._updates: dict[tuple[int, int, int], _Update] = {}

    def layouts(self) -> list[tuple[Topology, Recompute]]:
        """All that the model and its batch can be cut into, with each way of recomputation.

        Raises TopologyError where there are none.
        """
        return [(topology, mode) for topology in self._topologies() for mode in self.modes()]

    def modes(self) -> list[Recompute]:
        """Ways of recomputation that the `parallel` section allows."""
        return [mode for mode in RECOMPUTE if mode != "selective" or not self.request.parallel.compile]

    def check(self, topology: Topology) -> None:
        """Raises TopologyError where the model, its batch or its exchange does not fit the layout."""
        train, model = self.request.train, self.request.model
        check_fit(topology, model, train.seq_len, train.global_batch_rows, -1)
        exchange_of(model, self.request.parallel, topology)

    def _topologies(self) -> list[Topology]:
        found, refused = [], None
        for degrees in self._degrees():
            try:
                topology = Topology(self.cluster.devices, *degrees)
                self.check(topology)
                found.append(topology)
            except TopologyError as error:
                refused = refused or error
        if not found and refused is not None:
            raise refused
        return found

    def _degrees(self) -> Iterator[tuple[int, int, int, int]]:
        """replicate, shard, tensor, expert."""
        devices = self.cluster.devices
        degrees = [degree for degree in range(1, devices + 1) if devices % degree == 0]
        experts = degrees if self.request.model.moe_every else [1]
        for tensor in degrees:
            # Each layer waits for its tensor ranks four times: between nodes that is not worth a look.
            if tensor > self.cluster.devices_per_node:
                continue
            for replicate in degrees:
                for expert in experts:
                    if devices // replicate % tensor == 0:
                        yield replicate, devices // replicate // tensor, tensor, expert

    def candidate(self, topology: Topology, recompute: Recompute) -> Candidate:
        """With the most rows in a micro-batch that fit, and at least those of a routing group."""
        limit = self.cluster.memory_bytes - self.cluster.reserved_bytes
        rows = self._possible_rows(topology)
        step = self._step(topology, recompute, rows[0])
        state = self._update(step).memory
        least = with_micro_batch(state, self._trace(step))
        if least.total > limit:
            return Candidate(step, least, None)
        # Bytes are a constant and a share of each row; the end is checked.
        one, two = (
            self._trace(self._step(topology, recompute, n)).peak_bytes for n in (rows[0], 2 * rows[0])
        )
        per_row = max(1, (two - one) // rows[0])
        most = rows[0] + max(0, limit - state.total - one) // per_row
        for n in sorted((n for n in rows if rows[0] < n <= most), reverse=True):
            larger = self._step(topology, recompute, n)
            memory = with_micro_batch(state, self._trace(larger))
            if memory.total <= limit:
                return Candidate(larger, memory, self._seconds(larger))
        return Candidate(step, least, self._seconds(step))

    def _possible_rows(self, topology: Topology) -> list[int]:
        model, train = self.request.model, self.request.train
        group = model.group_rows if model.moe_every and model.group_rule == "rows" else 1
        rows = topology.rows_of(0, train.global_batch_rows).stop
        most = max(group, MOST_POSITIONS // train.seq_len)
        return [n for n in range(group, min(rows, most) + 1, group) if rows % n == 0]

    def _step(self, topology: Topology, recompute: Recompute, micro_batch_rows: int) -> Step:
        request = self.request
        rows = topology.rows_of(0, request.train.global_batch_rows).stop
        parallel = request.parallel.model_copy(
            update={
                "replicate": topology.replicate,
                "shard": topology.shard,
                "tensor": topology.tensor,
                "expert": topology.expert,
                "recompute": recompute,
            }
        )
        return Step(
            request.model, parallel, topology, request.train.precision, request.train.seq_len,
            max(1, rows // micro_batch_rows), micro_batch_rows,
        )  # fmt: skip

    def _trace(self, step: Step) -> Trace:
        shape = shape_of(step, self.request.loss_share)
        if shape not in self._traces:
            self._traces[shape] = trace_micro_batch(self.request.model, self.request.train, shape)
        return self._traces[shape]

    def _seconds(self, step: Step) -> StepTime:
        update = self._update(step)
        traffic = [*pass_traffic(step, update.layouts), *update.traffic]
        return step_time(step, self._trace(step), update.operations, traffic, self.cluster)

    def _update(self, step: Step) -> "_Update":
        topology = step.topology
        degrees = topology.shard, topology.tensor, topology.expert
        if degrees not in self._updates:
            layouts = layouts_of(step)
            update = Update(step, layouts, self.request.optim)
            memory = state_memory(step, layouts, update)
            traffic, operations = trace_operations(update.run)
            self._updates[degrees] = _Update(layouts, memory, traffic, operations)
        return self._updates[degrees]


@dataclass(frozen=True)
class _Update:
    """Of a rank that holds a certain share of the model; copies of it change nothing."""

    layouts: dict[str, ParameterLayout]
    memory: Memory
    traffic: list[Traffic]
    operations: list[Operations]
