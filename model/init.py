"""Initial values by (seed, parameter name, element index) (facts 1.7, ST-MoE's scale 0.1).

Element i of a parameter is a pure function of those three, so a shard holds exactly the slice of the whole,
whatever the layout, without anyone generating the rest.
"""

import hashlib
import itertools
import math

import numpy as np
import torch
from torch import Tensor, nn

from openmoe.model.config import ModelConfig

# JAX's truncated normal is cut at two standard deviations and stretched back to the asked deviation.
TRUNCATED_STD = 0.87962566103423978
BLOCK_ELEMENTS = 1 << 22  # generated at a time, in float64


def initialiser(config: ModelConfig, name: str) -> tuple[str, float]:
    """(distribution, standard deviation) of parameter `name`: `normal`, `truncated` or `ones`."""
    fan_in = math.sqrt(config.init_scale / config.d_model)
    fan_in_heads = math.sqrt(config.init_scale / (config.n_heads * config.head_dim))
    fan_in_ff = math.sqrt(config.init_scale / config.d_ff)
    table = {
        "embedding.weight": ("normal", 1.0),
        # The attention scale 1/sqrt(head_dim) lives here and nowhere else.
        "attention.q.weight": ("normal", fan_in / math.sqrt(config.head_dim)),
        "attention.k.weight": ("normal", fan_in),
        "attention.v.weight": ("normal", fan_in),
        "attention.o.weight": ("normal", fan_in_heads),
        "router.weight": ("normal", config.router_init_std),
        "experts.wi_0": ("normal", fan_in),
        "experts.wi_1": ("normal", fan_in),
        "experts.wo": ("normal", fan_in_ff),
        "ffn.wi_0": ("truncated", fan_in),
        "ffn.wi_1": ("truncated", fan_in),
        "ffn.wo": ("truncated", fan_in_ff),
        "head.weight": ("truncated", fan_in),
        "norm.scale": ("ones", 0.0),
    }
    return next(rule for suffix, rule in table.items() if name.endswith(suffix))


def initial_values(config: ModelConfig, seed: int, name: str, start: int, count: int) -> Tensor:
    """Elements start .. start + count of the flattened parameter `name`, float64."""
    distribution, std = initialiser(config, name)
    if distribution == "ones":
        return torch.ones(count, dtype=torch.float64)
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest(), "little")
    # Philox makes blocks of four 64-bit words per counter value, so any element is reached directly.
    bits = np.random.Philox(key=key).advance(start // 4).random_raw(start % 4 + count)[start % 4 :]
    uniform = torch.from_numpy(((bits >> 11) + 0.5) * 2.0**-53)  # (0, 1), 53 bits
    limit = 1.0 if distribution == "normal" else math.erf(math.sqrt(2.0))
    if distribution == "truncated":
        std /= TRUNCATED_STD
    return torch.special.erfinv((2 * uniform - 1) * limit) * (math.sqrt(2.0) * std)


@torch.no_grad()
def initialise(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter of `model` in place."""
    for name, parameter in model.named_parameters():
        whole = tuple(slice(0, size) for size in parameter.shape)
        fill(parameter.detach(), config, seed, name, tuple(parameter.shape), whole)


def fill(
    part: Tensor,
    config: ModelConfig,
    seed: int,
    name: str,
    shape: tuple[int, ...],
    slices: tuple[slice, ...],
) -> None:
    """Initial values of a part of parameter `name` of global `shape`, in place and block by block: no second
    copy of a large tensor. `part` is contiguous and has the shape of `slices`, one for each dimension."""
    cut = [dim for dim, (size, piece) in enumerate(zip(shape, slices, strict=True)) if _length(piece) < size]
    inner = max(cut, default=0)  # behind it all is whole, so its pieces are contiguous runs of the parameter
    below = math.prod(shape[inner + 1 :])
    run = _length(slices[inner]) * below
    strides = [math.prod(shape[dim + 1 :]) for dim in range(inner)]
    outer = itertools.product(*(range(piece.start, piece.stop) for piece in slices[:inner]))
    if not part.numel():
        return
    for values, index in zip(part.view(-1, run), outer, strict=True):
        first = sum(i * stride for i, stride in zip(index, strides, strict=True))
        first += slices[inner].start * below
        for start in range(0, run, BLOCK_ELEMENTS):
            count = min(BLOCK_ELEMENTS, run - start)
            block = initial_values(config, seed, name, first + start, count)
            values[start : start + count] = block.to(values.dtype)


def _length(piece: slice) -> int:
    return int(piece.stop - piece.start)
