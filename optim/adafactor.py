"""Adafactor as t5x runs it (Shazeer and Stern 2018; t5x adafactor.py; facts 4.3), in place and tile by tile.

For a parameter p with gradient g at step t (0-based), per tensor, for experts per expert:

    beta2 = 1 - (t + 1)^-0.8
    v_row, v_col = averages over time of the mean of g^2 + epsilon1 over columns and over rows
    u = g / sqrt(v_row / mean(v_row) * v_col)              (not factored: u = g / sqrt(v))
    p -= lr * max(RMS(p), epsilon2) * u / max(1, RMS(u) / clipping_threshold)

One step has three phases, each over all parameters: sums of g^2 and p^2; the new moments and the sum of
u^2; the write. The parts of a tensor are connected by these sums and that of v_row alone, so a layout that
splits tensors adds them up between the phases and does nothing else. No value is read back to the host.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from openmoe.optim.config import AdafactorConfig
from openmoe.optim.factor_rules import FactorRule

# Elements worked on at a time: a CPU keeps a tile and its temporary in cache, a GPU wants few large launches.
CPU_TILE_ELEMENTS = 3 * 2**16
DEVICE_TILE_ELEMENTS = 2**24


@dataclass
class _Update:
    """What one parameter carries from phase to phase."""

    rule: FactorRule
    param: Tensor  # [batch, left, right]
    grad: Tensor  # [batch, left, right]
    state: dict[str, Tensor]
    squared_param: Tensor  # [batch], sum of p^2
    squared_update: Tensor  # [batch], sum of u^2
    left: Tensor  # [batch, left]: sum of g^2 over the right side, then left factor of 1 / sqrt(v)
    right: Tensor  # [batch, right]: the same for the right side; both are empty where v is kept in full


class Adafactor(torch.optim.Optimizer):
    """Adafactor with t5x semantics over named float32 or float64 parameters.

    `group["lr"]` is set from outside before each step, as a Python number. `group["step"]` counts the
    updates made: one count for all parameters, as in t5x, and on the host, where beta2 is worked out, so
    that nothing waits for a device. A parameter without a gradient is left alone, its moments too.

    Raises ValueError for a parameter of another type (its small steps would vanish), KeyError for one
    without a rule.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        rules: dict[str, FactorRule],
        config: AdafactorConfig,
    ) -> None:
        named = list(named_parameters)
        super().__init__(named, {"lr": 0.0, "step": 0})
        self.config = config
        self.rules: dict[Tensor, FactorRule] = {}
        for name, param in named:
            if param.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"{name}: Adafactor needs float32 or float64 parameters, got {param.dtype}")
            self.rules[param] = rules[name]
            self.state[param] = {
                key: torch.zeros(shape, dtype=param.dtype, device=param.device)
                for key, shape in rules[name].state_shapes.items()
            }

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient, with the learning rate of its group."""
        for group in self.param_groups:
            beta2 = second_moment_decay(group["step"], self.config.decay_rate)
            updates = [self._begin(param) for param in group["params"] if param.grad is not None]
            for update in updates:
                self._sum_squares(update)
            for update in updates:
                self._update_moments(update, beta2)
            for update in updates:
                self._write(update, group["lr"])
            group["step"] += 1

    def _begin(self, param: Tensor) -> _Update:
        rule = self.rules[param]
        p = rule.view(param)
        batch, left, right = p.shape if rule.split is not None else (len(p), 0, 0)
        return _Update(
            rule=rule,
            param=p,
            grad=rule.view(param.grad.contiguous()),  # type: ignore[union-attr]
            state=self.state[param],
            squared_param=p.new_zeros(batch),
            squared_update=p.new_zeros(batch),
            left=p.new_zeros(batch, left),
            right=p.new_zeros(batch, right),
        )

    def _sum_squares(self, update: _Update) -> None:
        """Phase 1: sums of p^2, and of g^2 over each side of a factored parameter."""
        for tile, square in _tiles(update.param):
            p, g = update.param[tile], update.grad[tile]
            update.squared_param[tile[0]].add_(torch.linalg.vector_norm(p, dim=(1, 2)).square_())
            if update.rule.split is not None:
                torch.mul(g, g, out=square)
                torch.sum(square, 2, out=update.left[tile])
                update.right[tile[0]].add_(square.sum(1))

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
        for key, sums, shape in (
            (left_key, update.left, rule.left_shape),
            (right_key, update.right, rule.right_shape),
        ):
            moment = update.state[key].view_as(sums)
            elements_per_sum = prod(rule.shape) // prod(shape)
            # The mean of g^2 + epsilon1; adding epsilon1 to the mean is the same and saves a pass.
            sums.div_(elements_per_sum).add_(epsilon1).mul_(1 - beta2)
            torch.add(sums, moment, alpha=beta2, out=moment)
            sums.copy_(moment)
        row = update.left if rule.row_is_left else update.right
        row.div_(row.mean(1, keepdim=True))
        update.left.rsqrt_()
        update.right.rsqrt_()
        for tile, u in _tiles(update.param):
            torch.mul(update.grad[tile], update.right[tile[0], None, :], out=u)
            row_norms = torch.linalg.vector_norm(u, dim=2).mul_(update.left[tile])
            update.squared_update[tile[0]].add_(row_norms.square_().sum(1))

    def _write(self, update: _Update, learning_rate: float) -> None:
        """Phase 3: p -= lr * max(RMS(p), epsilon2) * u / max(1, RMS(u) / clipping_threshold)."""
        rule = update.rule
        elements = prod(rule.shape[rule.batch_dims :])
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

    The scratch memory is one buffer for all tiles of a tensor, a few MiB however large the tensor is.
    """
    batch, left, right = tensor.shape
    limit = CPU_TILE_ELEMENTS if tensor.device.type == "cpu" else DEVICE_TILE_ELEMENTS
    rows = min(left, max(1, limit // right))
    matrices = max(1, rows // left * limit // (left * right))
    scratch = tensor.new_empty(min(matrices, batch), rows, right)
    for b in range(0, batch, matrices):
        for row in range(0, left, rows):
            tile = (slice(b, min(b + matrices, batch)), slice(row, min(row + rows, left)))
            yield tile, scratch[: tile[0].stop - b, : tile[1].stop - row]
