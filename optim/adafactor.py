"""Adafactor as t5x runs it (Shazeer and Stern 2018; t5x adafactor.py; facts 4.3), in place and tile by tile.

For a parameter p with gradient g at step t (0-based), per tensor, for experts per expert:

    beta2 = 1 - (t + 1)^-0.8
    v_row, v_col = averages over time of the mean of g^2 + epsilon1 over columns and over rows
    u = g / sqrt(v_row / mean(v_row) * v_col)              (not factored: u = g / sqrt(v))
    p -= lr * max(RMS(p), epsilon2) * u / max(1, RMS(u) / clipping_threshold)

One step has three phases, each over all parameters: sums of g^2 and p^2; the new moments and the sum of
u^2; the write. The parts of a tensor are connected by these sums and that of v_row alone. Where a layout
splits tensors, `Shards.sum_` makes the sums whole in two calls a step, for all parameters together:

    before the moments   of p^2                        over the groups that split the matrix
                         of g^2 over the right side    over those that split the right side; and the reverse
                         of all g^2, and of old v_row  over those that split the matrix and the row side: the
                                                       mean of the new v_row is linear in both
    before the write     of u^2                        over the groups that split the matrix

Experts split over ranks need none of this, and sums that are whole here are left out. No value is read back
to the host.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from openmoe.optim.adafactor_expression import updated
from openmoe.optim.config import AdafactorConfig
from openmoe.optim.factor_rules import FactorRule
from openmoe.optim.shards import Shards, SideGroups, side_groups

# Elements worked on at a time: a CPU keeps a tile and its temporary in cache, a GPU wants few large launches.
CPU_TILE_ELEMENTS = 3 * 2**16
DEVICE_TILE_ELEMENTS = 2**24


@dataclass
class _Update:
    """What one parameter carries from phase to phase; batch, left and right are those of the part here."""

    rule: FactorRule
    groups: SideGroups
    param: Tensor  # [batch, left, right]
    grad: Tensor  # [batch, left, right]
    state: dict[str, Tensor]
    squared_param: Tensor  # [batch], sum of p^2
    squared_update: Tensor  # [batch], sum of u^2
    left: Tensor  # [batch, left]: sum of g^2 over the right side, then left factor of 1 / sqrt(v)
    right: Tensor  # [batch, right]: the same for the right side; both are empty where v is kept in full
    # Where the row side is split: [batch] sum of g^2, and [batch] sum of the old v_row.
    row_sums: tuple[Tensor, Tensor] | None = None

    def sums_before_moments(self) -> list[tuple[Tensor, frozenset[str]]]:
        """The sums of phase 1, each with the groups that hold its terms."""
        parts = [(self.squared_param, self.groups.matrix)]
        if self.rule.split is not None:
            parts += [(self.left, self.groups.right), (self.right, self.groups.left)]
        if self.row_sums is not None:
            squared_grad, row_moments = self.row_sums
            parts += [(squared_grad, self.groups.matrix), (row_moments, self.groups.row)]
        return parts

    def sums_before_write(self) -> list[tuple[Tensor, frozenset[str]]]:
        """The sum of phase 2 with the groups that hold its terms."""
        return [(self.squared_update, self.groups.matrix)]


class Adafactor(torch.optim.Optimizer):
    """Adafactor with t5x semantics over named float32 or float64 parameters.

    `group["lr"]` is set from outside before each step, as a Python number. `group["step"]` counts the
    updates made: one count for all parameters, as in t5x, and on the host, where beta2 is worked out, so
    that nothing waits for a device. A parameter without a gradient is left alone, its moments too.

    With `shards` each parameter is a part of a whole one, whose shape its rule has, and its state the same
    part of the whole state. A parameter must then have a gradient on all ranks or on none, also where a
    part has no elements.

    Raises ValueError for a parameter of another type (its small steps would vanish) or one that is no part
    of its rule's shape, KeyError for one without a rule.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        rules: dict[str, FactorRule],
        config: AdafactorConfig,
        shards: Shards | None = None,
    ) -> None:
        named = list(named_parameters)
        super().__init__(named, {"lr": 0.0, "step": 0})
        self.config = config
        self.shards = shards
        self.layouts: dict[Tensor, tuple[FactorRule, SideGroups]] = {}
        for name, param in named:
            if param.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"{name}: Adafactor needs float32 or float64 parameters, got {param.dtype}")
            rule = rules[name]
            self.layouts[param] = rule, side_groups(rule, name, param, shards)
            self.state[param] = {
                key: torch.zeros([param.shape[d] for d in dims], dtype=param.dtype, device=param.device)
                for key, dims in rule.state_dims.items()
            }

    def state_dims(self, param: Tensor) -> dict[str, tuple[int, ...]]:
        """The keys of a parameter's state, each with the dimensions of the parameter that it keeps."""
        return self.layouts[param][0].state_dims

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient, with the learning rate of its group."""
        for group in self.param_groups:
            beta2 = second_moment_decay(group["step"], self.config.decay_rate)
            group["step"] += 1
            if self._has_compiler(group["params"]):
                self._replace(group["params"], beta2, group["lr"])
                continue
            updates = [self._begin(param) for param in group["params"] if param.grad is not None]
            for update in updates:
                self._sum_squares(update)
            self._sum_over_ranks(part for update in updates for part in update.sums_before_moments())
            for update in updates:
                self._update_moments(update, beta2)
            self._sum_over_ranks(part for update in updates for part in update.sums_before_write())
            for update in updates:
                self._write(update, group["lr"])

    def _has_compiler(self, params: list[Tensor]) -> bool:
        """A device for which whole tensors are the right tiles, and whose layout needs no `shards`."""
        return self.shards is None and all(param.device.type == "xla" for param in params)

    def _replace(self, params: list[Tensor], beta2: float, learning_rate: float) -> None:
        # Numbers that change from step to step go in as one tensor: a Python number is a part of the program
        # where it is 0 or 1, and shares a place in it with any other number that it happens to equal.
        numbers = torch.tensor([beta2, 1 - beta2, learning_rate], dtype=params[0].dtype).to(params[0].device)
        for param in params:
            if param.grad is not None:
                rule, state = self.layouts[param][0], self.state[param]
                new = updated(param, param.grad, state, rule, self.config, *numbers.unbind())
                param.copy_(new.param)
                for key, value in new.state.items():
                    state[key].copy_(value)

    def _begin(self, param: Tensor) -> _Update:
        rule, groups = self.layouts[param]
        p = rule.view(param)
        batch, left, right = p.shape if rule.split is not None else (len(p), 0, 0)
        return _Update(
            rule=rule,
            groups=groups,
            param=p,
            grad=rule.view(param.grad.contiguous()),  # type: ignore[union-attr]
            state=self.state[param],
            squared_param=p.new_zeros(batch),
            squared_update=p.new_zeros(batch),
            left=p.new_zeros(batch, left),
            right=p.new_zeros(batch, right),
        )

    def _sum_over_ranks(self, parts: Iterable[tuple[Tensor, frozenset[str]]]) -> None:
        """Makes the sums whole; those that no group shares are whole already."""
        if self.shards is None:
            return
        shared = [(tensor, groups) for tensor, groups in parts if groups]
        if shared:
            self.shards.sum_(shared)

    def _sum_squares(self, update: _Update) -> None:
        """Phase 1: sums of p^2, and of g^2 over each side of a factored parameter."""
        for tile, square in _tiles(update.param):
            p, g = update.param[tile], update.grad[tile]
            update.squared_param[tile[0]].add_(torch.linalg.vector_norm(p, dim=(1, 2)).square_())
            if update.rule.split is not None:
                torch.mul(g, g, out=square)
                torch.sum(square, 2, out=update.left[tile])
                update.right[tile[0]].add_(square.sum(1))
        if update.groups.row:
            row = update.left if update.rule.row_is_left else update.right
            update.row_sums = row.sum(1), update.state["v_row"].view_as(row).sum(1)

    def _update_moments(self, update: _Update, beta2: float) -> None:
        """Phase 2: the new moments, the factors of 1 / sqrt(v), and the sum of u^2."""
        epsilon1, rule = self.config.epsilon1, update.rule
        if rule.split is None:
            moment = rule.view(update.state["v"])
            for tile, u in _tiles(update.param):
                g, v = update.grad[tile], moment[tile]
                torch.mul(g, g, out=u).add_(epsilon1).mul_(1 - beta2)
                torch.add(u, v, alpha=beta2, out=v)
                torch.rsqrt(v, out=u).mul_(g)
                update.squared_update[tile[0]].add_(torch.linalg.vector_norm(u, dim=(1, 2)).square_())
            return
        left_key, right_key = ("v_row", "v_col") if rule.row_is_left else ("v_col", "v_row")
        left_elements = rule.left_elements
        right_elements = rule.matrix_elements // left_elements
        for key, sums, elements_per_sum in (
            (left_key, update.left, right_elements),
            (right_key, update.right, left_elements),
        ):
            moment = update.state[key].view_as(sums)
            # The mean of g^2 + epsilon1; adding epsilon1 to the mean is the same and saves a pass.
            sums.div_(elements_per_sum).add_(epsilon1).mul_(1 - beta2)
            torch.add(sums, moment, alpha=beta2, out=moment)
            sums.copy_(moment)
        row = update.left if rule.row_is_left else update.right
        if update.row_sums is not None:
            # The mean of the new v_row from the sums that were made whole before it.
            rows = left_elements if rule.row_is_left else right_elements
            squared_grad, row_moments = update.row_sums
            mean = squared_grad.div_(rule.matrix_elements).add_(epsilon1).mul_(1 - beta2)
            row.div_(mean.add_(row_moments, alpha=beta2 / rows)[:, None])
        else:
            row.div_(row.mean(1, keepdim=True))
        update.left.rsqrt_()
        update.right.rsqrt_()
        for tile, u in _tiles(update.param):
            torch.mul(update.grad[tile], update.right[tile[0], None, :], out=u)
            row_norms = torch.linalg.vector_norm(u, dim=2).mul_(update.left[tile])
            update.squared_update[tile[0]].add_(row_norms.square_().sum(1))

    def _write(self, update: _Update, learning_rate: float) -> None:
        """Phase 3: p -= lr * max(RMS(p), epsilon2) * u / max(1, RMS(u) / clipping_threshold)."""
        rule, elements = update.rule, update.rule.matrix_elements
        param_scale = update.squared_param.div(elements).sqrt_().clamp_(min=self.config.epsilon2)
        clip = update.squared_update.div(elements).sqrt_().div_(self.config.clipping_threshold).clamp_(min=1)
        scale = param_scale.div_(clip).mul_(-learning_rate)[:, None, None]
        for tile, u in _tiles(update.param):
            if rule.split is None:
                torch.rsqrt(rule.view(update.state["v"])[tile], out=u).mul_(update.grad[tile])
                update.param[tile].addcmul_(u, scale[tile[0]])
            else:
                torch.mul(update.grad[tile], update.right[tile[0], None, :], out=u)
                update.param[tile].addcmul_(u, update.left[tile][..., None] * scale[tile[0]])


def second_moment_decay(step: int, decay_rate: float) -> float:
    """beta2 of the update that follows `step` earlier ones: 1 - (step + 1)^-decay_rate, rounded as float32.

    The original computes it in float32, where it lies on a grid of 6e-8; the new weight 1 - beta2 is off by
    up to 2e-4 of itself at step 25,000. float64 training keeps the rounded value: it is the same training
    with exact sums.
    """
    return float(np.float32(1) - np.float32(step + 1) ** np.float32(-decay_rate))


def _tiles(tensor: Tensor) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
    """Cuts [batch, left, right] into tiles: (slices of batch and left, scratch memory of the tile's shape).

    The scratch memory is one buffer for all tiles of a tensor, a few MiB however large the tensor is. A
    tensor without elements has no tiles.
    """
    if not tensor.numel():
        return
    batch, left, right = tensor.shape
    limit = CPU_TILE_ELEMENTS if tensor.device.type == "cpu" else DEVICE_TILE_ELEMENTS
    rows = min(left, max(1, limit // right))
    matrices = max(1, rows // left * limit // (left * right))
    scratch = tensor.new_empty(min(matrices, batch), rows, right)
    for b in range(0, batch, matrices):
        for row in range(0, left, rows):
            tile = (slice(b, min(b + matrices, batch)), slice(row, min(row + rows, left)))
            yield tile, scratch[: tile[0].stop - b, : tile[1].stop - row]
