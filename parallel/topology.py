"""How the processes of a run are laid out, as one frozen object."""

from dataclasses import dataclass

from openmoe.parallel.config import ParallelConfig


class TopologyError(ValueError):
    """A layout that the processes at hand cannot form."""


@dataclass(frozen=True)
class Topology:
    """Degrees with replicate * shard * tensor = world_size; expert divides shard * tensor."""

    world_size: int
    replicate: int
    shard: int
    tensor: int
    expert: int

    @property
    def data_ranks(self) -> int:
        """Ranks that read different rows."""
        return self.replicate * self.shard


def resolve(config: ParallelConfig, world_size: int) -> Topology:
    """The layout of `world_size` processes; shard = -1 takes what the other degrees leave.

    Raises TopologyError naming the degrees that do not fit.
    """
    rest = config.replicate * config.tensor
    if config.shard == 0:
        raise TopologyError("parallel.shard=0: allowed -1 (fill) or a number of ranks from 1")
    if world_size % rest or (config.shard != -1 and rest * config.shard != world_size):
        raise TopologyError(
            f"parallel.replicate={config.replicate} x parallel.shard={config.shard} x "
            f"parallel.tensor={config.tensor} does not make the {world_size} processes of this run"
        )
    topology = Topology(world_size, config.replicate, world_size // rest, config.tensor, config.expert)
    if topology.shard * topology.tensor % topology.expert:
        raise TopologyError(
            f"parallel.expert={config.expert}: allowed a divisor of shard x tensor = "
            f"{topology.shard * topology.tensor}"
        )
    return topology
