"""A row's result is that of the whole row at once, whatever it was cut into and whoever stands beside it."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from openmoe.model.batch import Batch
from openmoe.model.config import ModelConfig
from openmoe.model.decoder import Decoder, GenerationCapacity
from openmoe.model.dispatch import TokenDispatcher
from openmoe.model.groups import expert_capacity
from openmoe.model.init import initialise
from openmoe.model.kv_cache import KVCache
from openmoe.parallel.expert_dispatch import fixed_dispatch, uneven_dispatch

RELEASED = {
    "ffn": "swiglu4",
    "residual": "sequential",
    "mask_padding": True,
    "route_padding": True,
    "group_rows": 2,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "paper": {},
    "released": RELEASED,
    "tied head": {"tied_head": True},
    "prefix attention": {"attention": "prefix"},
    "released, prefix attention": RELEASED | {"attention": "prefix"},
    "dense": {"moe_every": 0},
    "flaxformer groups": {"group_rule": "flaxformer", "group_tokens": 16},
    "one-hot masks": {"dispatch": "einsum"},
}
# Prompt tokens of each row; in the first row nothing but the 0 that rows begin with.
PROMPTS = (0, 9, 3, 5)
NEW = 6


class OwnExchange:
    """An expert group of one rank, to itself."""

    size = 1

    def all_to_all(self, x: Tensor, send: Any = None, receive: Any = None) -> Tensor:
        return x.clone()


DISPATCHERS: dict[str, Any] = {"fixed": fixed_dispatch, "uneven": uneven_dispatch}


def build(
    config: ModelConfig, dtype: torch.dtype = torch.float64, dispatcher: TokenDispatcher | None = None
) -> Decoder:
    model = Decoder(config, dispatcher, compute_dtype=dtype).to(dtype)
    initialise(model, config, seed=1)
    return model.eval()


def texts(lengths: Sequence[int]) -> list[list[int]]:
    """Rows with the 0 in front."""
    generator = torch.Generator().manual_seed(3)
    return [[0, *torch.randint(1, 64, (length,), generator=generator).tolist()] for length in lengths]


@torch.no_grad()
def at_once(model: Decoder, row: list[int], prefix: int) -> Tensor:
    """Logits `[tokens, vocab]` of a row by the forward pass of training."""
    tokens = torch.tensor([row])
    prefix_mask = torch.arange(len(row))[None] < prefix
    return model.logits(
        model(Batch(tokens, torch.ones_like(tokens), tokens, prefix_mask=prefix_mask)).hidden
    )[0]


@torch.no_grad()
def in_steps(
    model: Decoder,
    rows: list[list[int]],
    steps: Sequence[Sequence[int]],
    capacity: GenerationCapacity = "none",
    filler: int = 63,
) -> list[Tensor]:
    """The same through the cache: so many tokens of each row in each step, `filler` behind them."""
    like = model.embedding.weight.new_empty(0, dtype=model.compute_dtype)
    cache = KVCache(model.config, len(rows), sum(map(max, steps)), like)
    for stored in (cache.keys, cache.values):
        stored.fill_(1e4)  # what a cache holds at first must not show
    logits: list[list[Tensor]] = [[] for _ in rows]
    for number, counts in enumerate(steps):
        new = [row[done : done + n] for row, done, n in zip(rows, cache.lengths, counts, strict=True)]
        tokens = torch.tensor([row + [filler] * (max(counts) - len(row)) for row in new])
        hidden = model.extend(cache, tokens, counts, None if number else counts, capacity)
        for own, h, n in zip(logits, hidden, counts, strict=True):
            own.append(model.logits(h[:n]))
    return [torch.cat(own) for own in logits]


def check(model: Decoder, dtype: torch.dtype) -> None:
    rows = texts([prompt + NEW for prompt in PROMPTS])
    prefill = [prompt + 1 for prompt in PROMPTS]
    steps = [prefill, *[[1] * len(rows)] * NEW]
    limit = 1e-5 if dtype == torch.float32 else 1e-11
    together = in_steps(model, rows, steps)
    for row, prefix, found in zip(rows, prefill, together, strict=True):
        whole = at_once(model, row, prefix)
        torch.testing.assert_close(found, whole, rtol=0, atol=limit)
        alone = in_steps(model, [row], [[prefix], *[[1]] * NEW])[0]
        torch.testing.assert_close(found, alone, rtol=0, atol=limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS)
def test_prompt_and_steps_are_the_whole_row(options: str, dtype: torch.dtype, config: ModelConfig) -> None:
    """Catches a key rotated by its column, or a query one off (facts 6.5, points 5 and 6), padding that is
    attended to or takes a slot, drops, prompts that don't see each other, a head without its factor."""
    check(build(config.model_copy(update={"dropless": True} | OPTIONS[options]), dtype), dtype)


@pytest.mark.parametrize("exchange", DISPATCHERS)
def test_dispatchers_of_expert_groups(exchange: str, config: ModelConfig) -> None:
    """Catches a buffer too small for what generation keeps, which only the one-process dispatchers hide."""
    config = config.model_copy(
        update={"capacity_factor_eval": 4.0}
    )  # as much as dropless, which `fixed` lacks
    check(build(config, dispatcher=DISPATCHERS[exchange](OwnExchange())), torch.float64)


@pytest.mark.parametrize("options", ["paper", "released"])
def test_capacity_of_the_model_drops_nothing_without_being_asked(options: str, config: ModelConfig) -> None:
    """Catches generation by the training's capacity: there steps and prompt drop differently (facts 6.5,
    point 10)."""
    tight = {"capacity_factor_eval": 0.5, "min_capacity": 1}
    rows, steps = texts([20, 7]), [[21, 8]]
    model = build(config.model_copy(update=OPTIONS[options] | tight))
    roomy = build(config.model_copy(update=OPTIONS[options] | {"dropless": True}))
    for row, found in zip(rows, in_steps(model, rows, steps), strict=True):
        torch.testing.assert_close(found, at_once(roomy, row, 0), rtol=0, atol=1e-11)


@pytest.mark.parametrize("options", ["paper", "released", "one-hot masks"])
def test_a_prompt_is_a_group(options: str, config: ModelConfig) -> None:
    """`capacity=model` on prompts of several lengths: catches a capacity from padding or from another row,
    and groups of several rows."""
    tight = {"capacity_factor_eval": 0.5, "min_capacity": 1}
    config = config.model_copy(update=OPTIONS[options] | tight | {"group_rows": 1})
    model, rows = build(config), texts([20, 7, 0, 12])
    counts = [len(row) for row in rows]
    assert len({expert_capacity(config, count, training=False) for count in counts}) > 2
    found = in_steps(model, rows, [counts], "model")
    free = in_steps(model, rows, [counts], "none")
    for row, logits in zip(rows, found, strict=True):
        torch.testing.assert_close(logits, at_once(model, row, 0), rtol=0, atol=1e-11)
    assert (found[0] - free[0]).abs().max() > 1e-3  # something was dropped


def test_a_token_alone_is_never_dropped(config: ModelConfig) -> None:
    """`capacity=model` after the prompt: a step of many rows is not one group."""
    config = config.model_copy(update={"capacity_factor_eval": 0.1, "min_capacity": 1})
    model, rows = build(config), texts([5] * 12)
    ones = [[1] * 12] * 6
    for a, b in zip(in_steps(model, rows, ones, "model"), in_steps(model, rows, ones, "none"), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_pieces_of_any_size(config: ModelConfig) -> None:
    """Rows may take in a different number of tokens each time, also none. Catches tokens written behind the
    padding of an earlier piece."""
    model, rows = build(config.model_copy(update={"dropless": True})), texts([9, 9, 4])
    pieces = [[3, 1, 5], [1, 6, 0], [6, 3, 0]]
    for row, found in zip(rows, in_steps(model, rows, pieces), strict=True):
        torch.testing.assert_close(found, at_once(model, row, 0), rtol=0, atol=1e-11)


@torch.no_grad()
def test_rows_that_leave(config: ModelConfig) -> None:
    """Catches rows that go on with the keys of another one after some have ended."""
    model, rows = build(config), texts([5, 11, 8, 3])
    like = torch.empty(0, dtype=torch.float64)
    cache = KVCache(config, 4, 12, like)
    counts = [len(row) - 1 for row in rows]
    padded = torch.tensor([row[:-1] + [9] * (11 - n) for row, n in zip(rows, counts, strict=True)])
    model.extend(cache, padded, counts)
    cache.keep([3, 1])
    assert cache.lengths == [3, 11]
    found = model.logits(model.extend(cache, torch.tensor([[rows[3][-1]], [rows[1][-1]]]), [1, 1]))
    for row, logits in zip((rows[3], rows[1]), found, strict=True):
        whole = in_steps(model, [row], [[len(row)]])[0]
        torch.testing.assert_close(logits[0], whole[-1], rtol=0, atol=1e-11)


def test_refused(config: ModelConfig) -> None:
    """Catches tokens that are dropped behind the end of the cache, and half a prefix."""
    model = build(config.model_copy(update={"attention": "prefix"}))
    cache = KVCache(config, 1, 4, torch.empty(0, dtype=torch.float64))
    tokens = torch.ones(1, 3, dtype=torch.int64)
    with torch.no_grad():
        model.extend(cache, tokens, [3])
        with pytest.raises(ValueError, match="3 tokens behind 3: the cache has room for 4"):
            model.extend(cache, tokens, [3])
        with pytest.raises(ValueError, match="in one piece"):
            model.extend(cache, tokens[:, :1], [1], prefix=[2])


def test_no_graph(config: ModelConfig) -> None:
    """Bug: the activations of all steps kept for a backward pass that never comes."""
    model = build(config)
    cache = KVCache(config, 1, 2, torch.empty(0, dtype=torch.float64))
    assert not model.extend(cache, torch.tensor([[0]]), [1]).requires_grad
