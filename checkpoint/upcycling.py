"""The tensors of a MoE model made from a dense one's (sparse upcycling), a part at a time.

A MoE layer adds experts to what the dense layer has: its norms and attention stay, its FFN F becomes the
residual FFN and every expert. Gates are raw probabilities that do not sum to 1, so plain copies would add
`gate sum * F`, some part of F, to F. `expert_share` s says who does the dense layer's work: the residual FFN
gives (1 - s) F, and the experts' output matrices are scaled by s / (expected gate sum), so that they give
about s F. With s = 0 these are zero and the function is that of the dense model, exactly.

Every value is a function of (seed, name, index) and of the dense model.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from openmoe.checkpoint.errors import CheckpointError
from openmoe.checkpoint.stored_tensors import CheckpointTensors
from openmoe.checkpoint.tensor_files import TensorParts
from openmoe.checkpoint.weights import WEIGHT_KEYS
from openmoe.model.config import ModelConfig
from openmoe.model.init import initial_values, initialiser

GATE_DRAWS = 1 << 14
DIFFERENT = ("moe_every", "num_experts", "residual")  # keys in which the two models may differ


@dataclass(frozen=True)
class Recipe:
    """How experts differ from the dense FFN."""

    method: Literal["copy", "noise", "partial"]
    noise: float  # standard deviation of what is added, over the matrix's own (noise)
    fraction: float  # of each expert's hidden units, drawn anew (partial)
    expert_share: float  # of the dense FFN's work that the experts do, 0 to 1
    seed: int


def require_fitting(dense: ModelConfig, moe: ModelConfig) -> None:
    """Raises CheckpointError naming the first key that makes the two models no pair."""
    if dense.moe_every:
        raise CheckpointError(
            f"model.moe_every={dense.moe_every} in the checkpoint: allowed 0, a dense model"
        )
    if not moe.moe_every:
        raise CheckpointError("model.moe_every=0: allowed 1 to model.n_layers, a model with experts")
    for key in WEIGHT_KEYS:
        ours, theirs = getattr(moe, key), getattr(dense, key)
        if key not in DIFFERENT and ours != theirs:
            raise CheckpointError(f"model.{key}={ours}: allowed {theirs}, as in the dense checkpoint")


def upcycled(
    dense: CheckpointTensors, moe: ModelConfig, shapes: dict[str, tuple[int, ...]], recipe: Recipe
) -> list[TensorParts]:
    """Every tensor of the MoE model under its logical name; `shapes` are those of its parameters, by name."""
    return [_tensor(dense, moe, name, shape, recipe) for name, shape in shapes.items()]


def expected_gate_sum(config: ModelConfig, norm_scale_rms: float) -> float:
    """Mean over tokens of the k chosen probabilities of a fresh router, E experts, with inputs of unit RMS
    times the norm's scale: its logits are normal. From a fixed draw."""
    std = config.router_init_std * math.sqrt(config.d_model) * norm_scale_rms
    draws = np.random.Generator(np.random.Philox(key=0)).normal(size=(GATE_DRAWS, config.num_experts))
    probabilities = torch.from_numpy(draws * std).softmax(-1)
    return float(probabilities.topk(config.top_k).values.sum(-1).mean())


def _tensor(
    dense: CheckpointTensors, moe: ModelConfig, name: str, shape: tuple[int, ...], recipe: Recipe
) -> TensorParts:
    layer = name.split(".")[1] if name.startswith("layers.") else ""
    own, dtype = f"model/{name}", dense.dtype("model/embedding.weight")
    if name.endswith("router.weight"):
        return _made(own, dtype, shape, lambda: iter([_initial(moe, recipe.seed, name, shape)]))
    if ".experts." in name:
        return _made(own, dtype, shape, lambda: _experts(dense, moe, name, shape, recipe))
    if name.endswith("moe_norm.scale"):
        return _renamed(dense, f"model/layers.{layer}.ffn_norm.scale", own)
    if name.endswith("ffn.wo") and moe.is_moe_layer(int(layer)):
        rest = 1.0 - recipe.expert_share
        whole = dense.parts(own)
        return _made(own, dtype, shape, lambda: (part * rest for part in whole.parts()))
    return _renamed(dense, own, own)


def _renamed(dense: CheckpointTensors, source: str, name: str) -> TensorParts:
    parts = dense.parts(source)
    return TensorParts(name, parts.dtype, parts.shape, parts.parts)


def _made(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], parts: Callable[[], Iterator[Tensor]]
) -> TensorParts:
    return TensorParts(name, dtype, shape, lambda: (part.to(dtype) for part in parts()))


def _initial(config: ModelConfig, seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    return initial_values(config, seed, name, 0, math.prod(shape)).view(shape)


def _experts(
    dense: CheckpointTensors, moe: ModelConfig, name: str, shape: tuple[int, ...], recipe: Recipe
) -> Iterator[Tensor]:
    """One expert after the other, `[1, ...]` each, in float64."""
    layer, _, matrix = name.removeprefix("layers.").partition(".")
    source = f"model/layers.{layer}.ffn.{matrix.rpartition('.')[2]}"
    base = dense.rows(source, 0, dense.shape(source)[0]).double()
    scale = 1.0
    if name.endswith("wo"):
        norm = dense.rows(f"model/layers.{layer}.ffn_norm.scale", 0, moe.d_model).double()
        rms = float(norm.square().mean().sqrt())
        scale = recipe.expert_share / expected_gate_sum(moe, rms)
    for expert in range(shape[0]):
        value = base
        if recipe.method == "noise":
            value = base + recipe.noise * base.std(correction=0) * _unit(
                moe, recipe.seed, name, expert, base.shape
            )
        elif recipe.method == "partial":
            value = _partly_new(base, moe, recipe, name, layer, expert)
        yield (scale * value)[None]


def _partly_new(base: Tensor, moe: ModelConfig, recipe: Recipe, name: str, layer: str, expert: int) -> Tensor:
    """The dense matrix with some hidden units drawn anew, with the mean and deviation of what they replace
    (Drop-Upcycling, Nakamura et al. 2025). A unit is a row of wi_0's halves and of wi_1, and a column of wo:
    of one expert the same ones in all three."""
    units = _units(moe, recipe, layer, expert)
    by_unit = base.transpose(-1, -2) if name.endswith("wo") else base  # [..., d_ff, d_model]
    old = by_unit[..., units, :]
    fresh = _unit(moe, recipe.seed, name, expert, base.shape)
    fresh = fresh.transpose(-1, -2) if name.endswith("wo") else fresh
    out = by_unit.clone()
    out[..., units, :] = old.mean() + old.std(correction=0) * fresh[..., units, :]
    return out.transpose(-1, -2) if name.endswith("wo") else out


def _units(moe: ModelConfig, recipe: Recipe, layer: str, expert: int) -> Tensor:
    text = f"{recipe.seed}/upcycle/{layer}/{expert}"
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
    count = max(1, round(recipe.fraction * moe.d_ff))
    chosen = np.random.Generator(np.random.Philox(key=key)).permutation(moe.d_ff)[:count]
    return torch.from_numpy(np.sort(chosen))


def _unit(moe: ModelConfig, seed: int, name: str, expert: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal values of this expert's matrix, other ones than its initial values would be."""
    _, std = initialiser(moe, name)
    count = math.prod(shape)
    values = initial_values(moe, seed, f"upcycle/{name}", expert * count, count)
    return (values / std).view(shape)
