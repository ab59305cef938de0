"""What a model knows of the ranks that share its rows.

Under tensor and sequence parallelism each of `size` ranks holds a slice of every row's positions between the
matrices, and a slice of each matrix's heads, hidden units or vocabulary inside them. The model says where the
one becomes the other; how, a parallel layout hands in.
"""

from typing import Protocol

from torch import Tensor


class TensorRanks(Protocol):
    """The ranks of one tensor group, seen from one of them."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def gather_sequence(self, x: Tensor) -> Tensor:
        """Slices `[rows, seq_len / size, ...]` -> whole rows `[rows, seq_len, ...]`.

        In the backward pass each slice gets the sum of the gradients of all ranks.
        """

    def scatter_sequence(self, x: Tensor) -> Tensor:
        """Partial sums over whole rows `[rows, seq_len, ...]` -> own slice of their sum over the ranks."""

    def own_slice(self, x: Tensor) -> Tensor:
        """`[rows, seq_len, ...]`, the same on all ranks -> own slice; no gradient passes between ranks."""

    def stack(self, x: Tensor) -> Tensor:
        """`[...]` -> `[size, ...]`, everyone's, without gradient."""


class OneRank:
    """A tensor group of one: rows are whole already."""

    rank = 0
    size = 1

    def gather_sequence(self, x: Tensor) -> Tensor:
        return x

    def scatter_sequence(self, x: Tensor) -> Tensor:
        return x

    def own_slice(self, x: Tensor) -> Tensor:
        return x

    def stack(self, x: Tensor) -> Tensor:
        return x[None]


ONE_RANK = OneRank()
