"""Continue rows and score continuations, many rows at a time; each row comes out as if it were alone.

Tokens in, tokens out. A row is begun by token 0 here, as every example is in training, and not by the caller.
Rows that end leave the batch.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from openmoe.model.decoder import Decoder, GenerationCapacity
from openmoe.model.kv_cache import KVCache, OnePass
from openmoe.model.losses import linear_cross_entropy
from openmoe.model.router import TopKRouter
from openmoe.model.sampling import SamplingConfig, choose, row_draws

START, END = 0, 1
BATCH_ROWS = 16


class NewToken(NamedTuple):
    row: int  # index of its prompt
    token: int
    logprob: float  # nats, under the model itself


class Generated(NamedTuple):
    tokens: list[int]  # with the end token, where it came
    logprobs: list[float]  # of each
    ended: bool  # by the end token; False: max_new_tokens were made


class Score(NamedTuple):
    logprob: float  # nats, sum over the continuation's tokens
    is_greedy: bool  # is each of its tokens the likeliest


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 (frozen)
    seed: int = 0,
    capacity: GenerationCapacity = "none",
    batch_rows: int = BATCH_ROWS,
    end_token: int = END,
) -> list[Generated]:
    """What `stream` yields, by prompt."""
    tokens: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    for new in stream(model, prompts, max_new_tokens, sampling, seed, capacity, batch_rows, end_token):
        tokens[new.row].append(new.token)
        logprobs[new.row].append(new.logprob)
    ended = [own[-1] == end_token for own in tokens]
    return [Generated(*each) for each in zip(tokens, logprobs, ended, strict=True)]


@torch.no_grad()
def stream(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 (frozen)
    seed: int = 0,
    capacity: GenerationCapacity = "none",
    batch_rows: int = BATCH_ROWS,
    end_token: int = END,
) -> Iterator[NewToken]:
    """Tokens as they are made, up to `max_new_tokens` (at least 1) a row or to its `end_token`.

    Prompt i draws with seed + i, so it can be repeated alone; `batch_rows` prompts of about one length go
    together. `capacity` says how tokens are routed (see GenerationCapacity).
    """
    longest_first = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    for start in range(0, len(prompts), batch_rows):
        rows = longest_first[start : start + batch_rows]
        draws = np.stack([row_draws(seed + row, max_new_tokens) for row in rows])
        begun = [[START, *prompts[row]] for row in rows]
        for step in _stream_batch(model, begun, draws, sampling, capacity, end_token):
            yield from (NewToken(rows[row], token, logprob) for row, token, logprob in step)


def _stream_batch(
    model: Decoder,
    begun: list[list[int]],
    draws: np.ndarray,
    sampling: SamplingConfig,
    capacity: GenerationCapacity,
    end_token: int,
) -> Iterator[list[tuple[int, int, float]]]:
    """(row, token, log-probability) of all rows that go on, step by step; draws `[rows, steps]`."""
    device = model.head_weight.device
    counts, steps = [len(row) for row in begun], draws.shape[1]
    cache = KVCache(model.config, len(begun), max(counts) + steps - 1, _activations(model))
    hidden = model.extend(cache, _padded(begun, device), counts, counts, capacity)
    last = hidden[torch.arange(len(begun)), [count - 1 for count in counts]]
    uniform = torch.from_numpy(draws).to(device)
    rows = list(range(len(begun)))
    for step in range(steps):
        tokens, logprobs = choose(model.logits(last), sampling, uniform[:, step])
        made = tokens.tolist()
        yield list(zip(rows, made, logprobs.tolist(), strict=True))
        going_on = [i for i, token in enumerate(made) if token != end_token]
        if not going_on or step == steps - 1:
            return
        if len(going_on) < len(rows):
            cache.keep(going_on)
            tokens, uniform, rows = tokens[going_on], uniform[going_on], [rows[i] for i in going_on]
        last = model.extend(cache, tokens[:, None], [1] * len(rows), None, capacity)[:, 0]


@torch.no_grad()
def score(
    model: Decoder,
    prefixes: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    capacity: GenerationCapacity = "none",
    batch_rows: int = BATCH_ROWS,
) -> list[Score]:
    """How likely each continuation is after its prefix; both may be empty.

    With `capacity=model` prefix and continuation are one routing group.
    """
    rows = [[START, *prefix, *rest] for prefix, rest in zip(prefixes, continuations, strict=True)]
    scores = [Score(0.0, True)] * len(rows)
    longest_first = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    for start in range(0, len(rows), batch_rows):
        batch = [row for row in longest_first[start : start + batch_rows] if continuations[row]]
        if batch:
            read = [rows[row][:-1] for row in batch]
            starts = [1 + len(prefixes[row]) for row in batch]
            targets = [list(continuations[row]) for row in batch]
            found = _score_batch(model, read, starts, targets, capacity)
            for row, one in zip(batch, found, strict=True):
                scores[row] = one
    return scores


def _score_batch(
    model: Decoder,
    read: list[list[int]],
    starts: list[int],
    targets: list[list[int]],
    capacity: GenerationCapacity,
) -> list[Score]:
    device = model.head_weight.device
    counts = [len(row) for row in read]
    cache = OnePass(model.config, len(read), max(counts), _activations(model))
    hidden = model.extend(cache, _padded(read, device), counts, starts, capacity)
    predicting = [h[start - 1 : count] for h, start, count in zip(hidden, starts, counts, strict=True)]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    flat = torch.tensor([token for each in targets for token in each], device=device)
    losses, _, correct = linear_cross_entropy(torch.cat(predicting).to(wide), model.head_weight, flat)
    sizes = [len(each) for each in targets]
    return [
        Score(-float(loss.sum()), bool(right.all()))
        for loss, right in zip(losses.split(sizes), correct.split(sizes), strict=True)
    ]


def prepare_weights(model: Decoder) -> None:
    """Stores each weight in the type it is used in: no cast in each step, and in bfloat16 half the memory.
    Changes no result. Routers and head compute in float32 or wider and stay so. Not for training."""
    model.requires_grad_(False)
    wide = {module.weight for module in model.modules() if isinstance(module, TopKRouter)}
    wide.add(model.head_weight)  # type: ignore[arg-type]
    widest = torch.promote_types(model.compute_dtype, torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(widest if parameter in wide else model.compute_dtype)


def _activations(model: Decoder) -> Tensor:
    return torch.empty(0, dtype=model.compute_dtype, device=model.head_weight.device)


def _padded(rows: list[list[int]], device: torch.device) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [START] * (longest - len(row)) for row in rows], device=device)
