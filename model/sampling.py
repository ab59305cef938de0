"""From logits to the next token of each row: greedy, temperature, top-k, top-p.

In this order, as everywhere: the temperature first, then the k likeliest, then, of what these make together,
the likeliest that make up a share p.
"""

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field
from torch import Tensor


class SamplingConfig(BaseModel, strict=True, extra="forbid", frozen=True, allow_inf_nan=False):
    """How the next token is chosen. As it stands here: from the model's own distribution."""

    temperature: float = Field(1.0, ge=0, le=1e6)  # logits are divided by it; 0 takes the likeliest token
    top_k: int | None = Field(None, ge=1)  # of the k likeliest tokens; of equals those with the lowest ids
    top_p: float = Field(1.0, gt=0, le=1)  # of the fewest likeliest tokens that together have at least p


def choose(logits: Tensor, sampling: SamplingConfig, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The next token of each row, and its log-probability under the model itself, whatever was left out.

    Args:
        logits: `[rows, vocab_size]`.
        uniform: float64 `[rows]` in [0, 1), one draw of each row; not used at temperature 0.

    Returns:
        int64 `[rows]`; float32 or wider `[rows]`.
    """
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)  # the first of equals
    else:
        # By id, not by rank: logits that differ by a rounding have almost the same bounds.
        bounds = distribution(logits, sampling).cumsum(-1)
        total = bounds[:, -1:]
        # A product that rounds up to the total would fall behind the last token.
        drawn = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
        tokens = torch.searchsorted(bounds, drawn, right=True)[:, 0]
    return tokens, logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


def distribution(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """What is drawn from at a temperature above 0: float64 `[rows, vocab_size]`, 0 for what is left out."""
    wide = logits.double()
    # The maximum is taken off first: a small temperature makes no infinity but of what has no chance.
    probs = ((wide - wide.amax(-1, keepdim=True)) / sampling.temperature).softmax(-1)
    k = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    if k == logits.shape[-1] and sampling.top_p == 1:
        return probs
    ranked, token = probs.sort(stable=True, dim=-1, descending=True)
    ranked[:, k:] = 0
    before = F.pad(ranked.cumsum(-1)[:, :-1], (1, 0))
    # The token that crosses p stays, so one is always left.
    ranked = ranked.masked_fill(before >= sampling.top_p * ranked.sum(-1, keepdim=True), 0)
    probs = torch.zeros_like(probs).scatter(-1, token, ranked)
    return probs / probs.sum(-1, keepdim=True)


def row_draws(seed: int, count: int) -> np.ndarray:
    """The first `count` draws in [0, 1) of a row with its own seed, float64; more of them begin alike."""
    bits = np.random.Philox(key=seed).random_raw(count)
    return (bits >> np.uint64(11)) * 2.0**-53
