"""Adafactor's update of one whole parameter as one expression (the formula is in `optim.adafactor`).

For devices whose compiler fuses operations and lays tensors out over many chips (XLA). Tiles would cut
across such a layout, and so would a view that merges a dimension that is shared out with one that is not:
here every dimension stays as it is.
"""

from typing import NamedTuple

from torch import Tensor

from openmoe.optim.config import AdafactorConfig
from openmoe.optim.factor_rules import FactorRule


class Updated(NamedTuple):
    param: Tensor
    state: dict[str, Tensor]


def updated(
    param: Tensor,
    grad: Tensor,
    state: dict[str, Tensor],
    rule: FactorRule,
    config: AdafactorConfig,
    beta2: Tensor,
    new_weight: Tensor,
    learning_rate: Tensor,
) -> Updated:
    """The parameter and its moments after one step; nothing is changed in place. `new_weight` is 1 - beta2,
    which is worked out where it is exact."""
    matrix = tuple(range(rule.batch_dims, param.dim()))
    scale = _rms(param, matrix).clamp(min=config.epsilon2)
    square = grad.square()
    if rule.split is None:
        new = {"v": state["v"] * beta2 + (square + config.epsilon1) * new_weight}
        u = grad * new["v"].rsqrt()
    else:
        left, right = matrix[: rule.split - rule.batch_dims], matrix[rule.split - rule.batch_dims :]
        row, column = (left, right) if rule.row_is_left else (right, left)
        # The mean of g^2 + epsilon1; adding epsilon1 to the mean is the same.
        of_rows = (square.mean(column, keepdim=True) + config.epsilon1) * new_weight
        of_columns = (square.mean(row, keepdim=True) + config.epsilon1) * new_weight
        v_row = state["v_row"].view_as(of_rows) * beta2 + of_rows
        v_col = state["v_col"].view_as(of_columns) * beta2 + of_columns
        u = grad * (v_row / v_row.mean(row, keepdim=True)).rsqrt() * v_col.rsqrt()
        new = {"v_row": v_row.view_as(state["v_row"]), "v_col": v_col.view_as(state["v_col"])}
    clip = (_rms(u, matrix) / config.clipping_threshold).clamp(min=1)
    return Updated(param - u * (scale / clip * learning_rate), new)


def _rms(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return x.square().mean(dims, keepdim=True).sqrt()
