"""Which dimensions of a parameter share one second moment: the factoring policy of Adafactor as a table.

The original decides on its own tensors (facts 4.3; t5x adafactor.py, contrib/moe/adafactor_utils.py):

* three and more dimensions: every logical axis has a role. Batch axes (experts) keep statistics of their
  own, the others form the rows and the columns of one matrix, which is always factored;
* one and two dimensions: the roles are ignored. A matrix is factored where its smaller side has at least
  `min_dim_size_to_factor` elements; the larger side is the column, of two equal sides the last one of the
  original.

Our parameters are the transposes of most of these tensors (torch keeps [out, in]) and have the two halves
of wi_0 as an axis of their own, so a table gives each of them its logical axes and the order in which the
original has them.
"""

from dataclasses import dataclass
from enum import Enum
from math import prod

from torch import Tensor


class Role(Enum):
    """What an axis does in a factored second moment."""

    ROW = "row"
    COLUMN = "column"
    BATCH = "batch"  # statistics, RMS and clipping apart for each index
    NONE = "none"


# Logical axis -> role.
AXIS_ROLES: dict[str, Role] = {
    "vocab": Role.COLUMN,
    "embed": Role.ROW,
    "mlp": Role.COLUMN,
    "mlp_embed": Role.ROW,
    "heads": Role.COLUMN,
    "kv": Role.COLUMN,
    "joined_kv": Role.COLUMN,
    "layers": Role.BATCH,
    "stack": Role.BATCH,
    "expert": Role.BATCH,
    "expert_mlp": Role.COLUMN,
    "unmodeled": Role.NONE,
}

# End of a parameter's name -> (logical axes of our tensor, does the original hold the transposed matrix?).
# wi_0 of the four-matrix FFN has a further axis of 2 before "mlp" or "expert_mlp", part of the same matrix
# side.
PARAMETER_AXES: dict[str, tuple[tuple[str, ...], bool]] = {
    "embedding.weight": (("vocab", "embed"), False),
    "head.weight": (("vocab", "embed"), True),
    "attention.q.weight": (("joined_kv", "embed"), True),
    "attention.k.weight": (("joined_kv", "embed"), True),
    "attention.v.weight": (("joined_kv", "embed"), True),
    "attention.o.weight": (("embed", "joined_kv"), True),
    "ffn.wi_0": (("mlp", "mlp_embed"), True),
    "ffn.wi_1": (("mlp", "mlp_embed"), True),
    "ffn.wo": (("mlp_embed", "mlp"), True),
    "moe.experts.wi_0": (("expert", "expert_mlp", "mlp_embed"), True),
    "moe.experts.wi_1": (("expert", "expert_mlp", "mlp_embed"), True),
    "moe.experts.wo": (("expert", "mlp_embed", "expert_mlp"), True),
    "moe.router.weight": (("unmodeled", "embed"), True),
    "norm.scale": (("embed",), False),
}


@dataclass(frozen=True)
class FactorRule:
    """How the second moment of one parameter is kept: the tensor seen as [batch, left, right].

    `shape` is that of the whole parameter, also where a process holds a part of it. The first `batch_dims`
    dimensions are the batch; the dimensions up to `split` are the left side of the matrix and the rest the
    right side; without a `split` the moment is kept in full. `row_is_left` only names the two factors:
    v_row belongs to the row side.
    """

    shape: tuple[int, ...]
    batch_dims: int = 0
    split: int | None = None
    row_is_left: bool = True

    @property
    def left_dims(self) -> tuple[int, ...]:
        """Dimensions of the factor over the left side (batch included): the mean over the right side."""
        return tuple(range(len(self.shape)))[: self.split]

    @property
    def right_dims(self) -> tuple[int, ...]:
        """Dimensions of the factor over the right side (batch included): the mean over the left side."""
        dims = tuple(range(len(self.shape)))
        return dims[: self.batch_dims] + dims[self.split :]

    @property
    def state_dims(self) -> dict[str, tuple[int, ...]]:
        """Names of the state, v_row and v_col (or v, where the moment is not factored), each with the
        dimensions of the parameter that it keeps.

        A part's state and the whole one's have the same dimensions, of the part's and the whole's lengths.
        """
        if self.split is None:
            return {"v": self.left_dims}
        left, right = ("v_row", "v_col") if self.row_is_left else ("v_col", "v_row")
        return {left: self.left_dims, right: self.right_dims}

    @property
    def matrix_elements(self) -> int:
        """Number of elements of the whole matrix, for each index of the batch."""
        return prod(self.shape[self.batch_dims :])

    @property
    def left_elements(self) -> int:
        """Number of elements of the whole left side, for each index of the batch."""
        return prod(self.shape[self.batch_dims : self.split])

    def view(self, tensor: Tensor) -> Tensor:
        """`tensor` (the parameter or a part) as [batch, left, right] (not factored: [batch, all, 1])."""
        shape, b = tensor.shape, self.batch_dims
        split = len(shape) if self.split is None else self.split
        return tensor.view(prod(shape[:b]), prod(shape[b:split]), prod(shape[split:]))


def rule_from_axes(
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    *,
    transposed: bool = False,
    min_dim_size_to_factor: int = 128,
) -> FactorRule:
    """Rule of a tensor with the logical `axes`; `transposed` where the original holds the two matrix sides
    swapped.

    A tensor with one dimension more than axes has the halves of wi_0 in front of its first side.

    Raises ValueError for an unknown axis, or where the batch axes are not the first ones.
    """
    unknown = [axis for axis in axes if axis not in AXIS_ROLES]
    if unknown:
        raise ValueError(f"no factoring role for the axes {unknown}; known: {sorted(AXIS_ROLES)}")
    roles = [AXIS_ROLES[axis] for axis in axes]
    if len(axes) < 2:
        return FactorRule(shape)
    if len(axes) == 2:
        split = len(shape) - 1
        left, right = prod(shape[:split]), shape[split]
        if min(left, right) < min_dim_size_to_factor:
            return FactorRule(shape)
        # The larger side is the column; of two equal ones that which comes last in the original.
        return FactorRule(shape, 0, split, row_is_left=left < right or (left == right and not transposed))
    batch_dims = next((i for i, role in enumerate(roles) if role is not Role.BATCH), len(axes))
    matrix = roles[batch_dims:]
    if set(matrix) != {Role.ROW, Role.COLUMN}:
        raise ValueError(f"axes {axes}: expected batch axes first, then rows and columns, got {roles}")
    # Dimensions of one side lie together: the right side starts where the role changes.
    right_dims = next(i for i, role in enumerate(reversed(matrix)) if role is not matrix[-1])
    if len(set(matrix[:-right_dims])) != 1:
        raise ValueError(f"axes {axes}: rows and columns alternate, which no view of the tensor can factor")
    return FactorRule(shape, batch_dims, len(shape) - right_dims, row_is_left=matrix[0] is Role.ROW)


def rule_for(name: str, shape: tuple[int, ...], min_dim_size_to_factor: int = 128) -> FactorRule:
    """Rule of the model's parameter `name` (its fully qualified name) with the global `shape`.

    Raises ValueError for a parameter that the table does not know: a guess would silently train another way.
    """
    for ending, (axes, transposed) in PARAMETER_AXES.items():
        if (
            name == ending
            or name.endswith("." + ending)
            or (ending == "norm.scale" and name.endswith(ending))
        ):
            if not len(axes) <= len(shape) <= len(axes) + ending.endswith("wi_0"):
                raise ValueError(f"{name} has shape {tuple(shape)}, expected the axes {axes}")
            return rule_from_axes(
                tuple(shape), axes, transposed=transposed, min_dim_size_to_factor=min_dim_size_to_factor
            )
    raise ValueError(
        f"no factoring rule for the parameter {name}; known endings: {', '.join(PARAMETER_AXES)}"
    )
