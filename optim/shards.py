"""What the optimizer knows of a layout: which groups share a parameter, and how sums over them are made.

The optimizer itself sees plain tensors, each a part of a whole parameter, and no process group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from openmoe.optim.factor_rules import FactorRule


class Shards(Protocol):
    """The parts of parameters that this process holds, by the parameters' names.

    A group is a set of ranks and has a name. Where `splits` names one for a dimension, each of its ranks
    holds a run of this dimension's indices; the runs follow each other and together are all indices, but
    may differ in length, down to none at all. A dimension that several groups share is cut by the first of
    them and each of its runs by the next. Ranks that differ in other groups alone hold copies.
    """

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        ...

    def splits(self, name: str) -> tuple[tuple[str, ...], ...]:
        """For each dimension the groups that share it, outermost first; () for a dimension held whole.

        A group shares at most one dimension of a parameter, and groups of one rank are left out.
        """
        ...

    def sum_(self, parts: Sequence[tuple[Tensor, frozenset[str]]]) -> None:
        """Replaces each tensor, in place, by its sum over the product of its groups (never none).

        All ranks call it together with equally many parts in the same order, and the ranks of a part's
        groups with the same shape, which may have no elements. All of them must get the same bits.
        """
        ...


@dataclass(frozen=True)
class SideGroups:
    """Names of the groups that share the two sides of a parameter's matrix, the batch dimensions apart."""

    left: frozenset[str]
    right: frozenset[str]
    matrix: frozenset[str]  # both
    row: frozenset[str]  # those of the side that v_row belongs to; none where the moment is kept in full


def side_groups(rule: FactorRule, name: str, part: Tensor, shards: Shards | None) -> SideGroups:
    """Groups that share the sides of the parameter `name`, of which this process holds `part`.

    Without `shards` the part is the whole. A moment kept in full has only a left side, as in `rule.view`.

    Raises ValueError where the part, the rule and the splits contradict each other.
    """
    splits = shards.splits(name) if shards is not None else ((),) * len(rule.shape)
    if not len(splits) == part.dim() == len(rule.shape):
        raise ValueError(
            f"{name}: a part of shape {tuple(part.shape)} with splits {splits} in a rule for {rule.shape}: "
            f"allowed equally many dimensions"
        )
    for dim, (here, whole, groups) in enumerate(zip(part.shape, rule.shape, splits, strict=True)):
        if here > whole or (here < whole and not groups):
            raise ValueError(
                f"{name}: dimension {dim} has {here} of {whole} elements here and is shared by "
                f"{groups or 'no group'}: allowed {f'at most {whole}' if groups else whole}"
            )
    named = [group for groups in splits for group in groups]
    if len(set(named)) < len(named):
        raise ValueError(f"{name}: splits {splits}: allowed each group once")
    end = len(splits) if rule.split is None else rule.split
    left = frozenset(group for groups in splits[rule.batch_dims : end] for group in groups)
    right = frozenset(group for groups in splits[end:] for group in groups)
    row = frozenset[str]() if rule.split is None else left if rule.row_is_left else right
    return SideGroups(left, right, left | right, row)
