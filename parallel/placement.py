"""Which rank holds which part of each parameter: a table, and what follows from it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn

from openmoe.parallel.topology import GroupName, Topology

# End of a parameter's name -> the dimension that tensor ranks share; None = each holds all of it, and sees a
# part of the tokens, so that its gradients are terms of a sum over the tensor group. Columns of a matrix are
# shared before a non-linearity (q, k, v, wi_0, wi_1) and rows after it (o, wo), so that nothing travels in
# between; -2 of wi_0 is d_ff with and without its two halves.
TENSOR_DIMS: dict[str, int | None] = {
    "embedding.weight": 0,
    "head.weight": 0,
    "attention.q.weight": 0,
    "attention.k.weight": 0,
    "attention.v.weight": 0,
    "attention.o.weight": 1,
    "ffn.wi_0": -2,
    "ffn.wi_1": -2,
    "ffn.wo": -1,
    "router.weight": None,
    "norm.scale": None,
}
EXPERTS = ".experts."  # their first dimension is shared by the expert group, whatever they are


@dataclass(frozen=True)
class ParameterLayout:
    """How one parameter is spread over the ranks of a copy of the model."""

    shape: tuple[int, ...]  # of the whole parameter
    # For each dimension the groups that share it, outermost first: an outer group cuts it into contiguous
    # parts, an inner one cuts these. Groups of one rank are left out.
    splits: tuple[tuple[GroupName, ...], ...]
    shard_dim: int  # the dimension that FSDP shares out
    is_expert: bool
    partial_over_tensor: bool  # the gradient is a term of a sum over the tensor group

    def slices(self, topology: Topology, rank: int, with_shards: bool = True) -> tuple[slice, ...]:
        """The part of `rank`, by dimension; without the shards of FSDP what its modules compute with."""
        return tuple(
            _cut(size, [group for group in groups if with_shards or not _is_shard(group)], topology, rank)
            for size, groups in zip(self.shape, self.splits, strict=True)
        )


def _is_shard(group: GroupName) -> bool:
    return group in ("shard", "expert_shard")


def _cut(size: int, groups: Iterable[GroupName], topology: Topology, rank: int) -> slice:
    """Parts as torch.chunk makes them: of equal size, rounded up, until nothing is left."""
    start, stop = 0, size
    for group in groups:
        part = -(-(stop - start) // topology.size(group))
        first = min(start + part * topology.coordinate(group, rank), stop)
        start, stop = first, min(first + part, stop)
    return slice(start, stop)


def parameter_layouts(model: nn.Module, topology: Topology) -> dict[str, ParameterLayout]:
    """The layout of every parameter of a model that has its global shapes (on the meta device).

    Raises ValueError for a parameter that the table does not know: a guess would train another model.
    """
    return {
        name: _layout(name, tuple(parameter.shape), topology) for name, parameter in model.named_parameters()
    }


def whole_on_data_ranks(layouts: dict[str, ParameterLayout]) -> dict[str, ParameterLayout]:
    """The same slices over tensor and expert groups, and no shards: ranks that read different rows hold
    copies."""
    return {
        name: replace(
            layout,
            splits=tuple(
                tuple(group for group in groups if not _is_shard(group)) for groups in layout.splits
            ),
        )
        for name, layout in layouts.items()
    }


def _layout(name: str, shape: tuple[int, ...], topology: Topology) -> ParameterLayout:
    is_expert = EXPERTS in name
    inner: GroupName = "expert" if is_expert else "tensor"
    outer: GroupName = "expert_shard" if is_expert else "shard"
    dim = 0 if is_expert else _tensor_dim(name, len(shape))
    splits: list[list[GroupName]] = [[] for _ in shape]
    held = list(shape)
    if dim is not None and topology.size(inner) > 1:
        if shape[dim] % topology.size(inner):
            raise ValueError(f"{name} {list(shape)}: dimension {dim} over {topology.size(inner)} ranks")
        held[dim] //= topology.size(inner)
        splits[dim].append(inner)
    shard_dim = _shard_dim(held, topology.size(outer))
    if topology.size(outer) > 1:
        splits[shard_dim].append(outer)
    return ParameterLayout(
        shape=shape,
        splits=tuple(map(tuple, splits)),
        shard_dim=shard_dim,
        is_expert=is_expert,
        partial_over_tensor=dim is None and topology.tensor > 1,
    )


def _tensor_dim(name: str, dims: int) -> int | None:
    for ending, dim in TENSOR_DIMS.items():
        if name.endswith(ending):
            return dim if dim is None or dim >= 0 else dims + dim
    raise ValueError(f"no placement for the parameter {name}; known endings: {', '.join(TENSOR_DIMS)}")


def _shard_dim(held: list[int], ranks: int) -> int:
    """The first dimension that the ranks can share evenly; the first of all where there is none.

    FSDP pads the first dimension and demands even shares of any other. Experts come first in theirs, so
    whole experts go to the ranks as long as there are enough of them.
    """
    return next((dim for dim, size in enumerate(held) if size % ranks == 0), 0)
