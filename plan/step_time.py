"""Seconds of one update from what it computes and sends, and the rates of a cluster."""

from collections.abc import Iterable
from dataclasses import dataclass

from openmoe.parallel.topology import Topology
from openmoe.parallel.traffic import Step, Traffic
from openmoe.plan.cluster import ClusterConfig
from openmoe.plan.trace import Operations, Trace

# Sent while something else is computed: gathers of the next weights, sums of the last gradients.
HIDDEN_GROUPS = ("shard", "expert_shard", "replicate")


@dataclass(frozen=True)
class StepTime:
    """Seconds of one update."""

    compute: dict[str, float]  # by part, the optimizer among them
    sent: dict[str, float]  # by purpose, whether it is waited for or not
    waiting: float  # for what is sent and not hidden behind compute

    @property
    def total(self) -> float:
        return sum(self.compute.values()) + self.waiting


def step_time(
    step: Step,
    trace: Trace,
    optimizer: Iterable[Operations],
    traffic: Iterable[Traffic],
    cluster: ClusterConfig,
) -> StepTime:
    """Of `step.micro_batches` micro-batches like the traced one."""
    flops_per_second = cluster.flops_per_second[step.precision]
    compute = {
        part: step.micro_batches * _seconds(operations, flops_per_second, cluster)
        for part, operations in trace.by_part.items()
    }
    passes = sum(compute.values())
    compute["optimizer"] = _seconds(optimizer, flops_per_second, cluster)
    sent: dict[str, float] = {}
    hidden = exposed = 0.0
    for part in traffic:
        seconds = part.times * collective_seconds(part, step.topology, cluster)
        sent[part.purpose] = sent.get(part.purpose, 0.0) + seconds
        if part.group in HIDDEN_GROUPS and part.purpose != "statistics of the optimizer":
            hidden += seconds
        else:
            exposed += seconds
    return StepTime(compute, sent, exposed + max(0.0, hidden - passes))


def _seconds(operations: Iterable[Operations], flops_per_second: float, cluster: ClusterConfig) -> float:
    """Each operation is limited by arithmetic, by memory or by the host that asks for it."""
    return sum(
        each.times
        * max(
            each.flops / flops_per_second,
            each.touched_bytes / cluster.memory_bytes_per_second,
            cluster.operation_seconds,
        )
        for each in operations
    )


def collective_seconds(part: Traffic, topology: Topology, cluster: ClusterConfig) -> float:
    """Of one collective: a ring over the group, or a direct exchange.

    In a ring of n ranks (n - 1) / n of the bytes pass each link, twice for an all-reduce. Where a group spans
    nodes, its ranks of one node send to the next node together, each through its own adapter.
    """
    ranks = topology.group(part.group, 0)
    n, inside = len(ranks), sum(rank < cluster.devices_per_node for rank in ranks)
    steps = n - 1
    if inside == n:
        rate, latency = cluster.node_bytes_per_second, cluster.node_latency_seconds
        return latency * steps + _passes(part) * part.size_bytes * steps / n / rate
    latency = cluster.network_latency_seconds * (n // inside) + cluster.node_latency_seconds * inside
    if part.kind == "all_to_all":
        return latency + part.size_bytes * (n - inside) / n / cluster.network_bytes_per_second
    rate = min(cluster.node_bytes_per_second, inside * cluster.network_bytes_per_second)
    return latency + _passes(part) * part.size_bytes * steps / n / rate


def _passes(part: Traffic) -> int:
    return 2 if part.kind == "all_reduce" else 1
