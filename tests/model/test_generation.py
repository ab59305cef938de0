"""Generation and scoring against the plain forward pass, and that rows know nothing of each other."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from openmoe.model.config import ModelConfig
from openmoe.model.decoder import Decoder
from openmoe.model.generation import Generated, generate, prepare_weights, score, stream
from openmoe.model.sampling import SamplingConfig

from .test_kv_cache import RELEASED, at_once, build

GREEDY = SamplingConfig(temperature=0)
LIVELY = SamplingConfig(temperature=1.3, top_k=40, top_p=0.95)
PROMPTS: list[list[int]] = [[5, 9], [], [7, 7, 7, 12, 40, 41, 2], [33], [8, 1, 3, 60]]
NO_END = -1
OPTIONS: dict[str, dict[str, Any]] = {
    "paper": {},
    "released": RELEASED,
    "prefix attention": {"attention": "prefix"},
    "tied head": {"tied_head": True},
}


@pytest.fixture(params=OPTIONS)
def model(request: pytest.FixtureRequest, config: ModelConfig) -> Decoder:
    return build(config.model_copy(update={"dropless": True} | OPTIONS[request.param]))


def by_hand(model: Decoder, prompt: Sequence[int], steps: int) -> tuple[list[int], list[float]]:
    """The likeliest tokens, the whole row again at each step, and their log-probabilities."""
    row, logprobs = [0, *prompt], []
    for _ in range(steps):
        logits = at_once(model, row, 1 + len(prompt))[-1]
        logprobs.append(float(logits.log_softmax(-1).max()))
        row.append(int(logits.argmax()))
    return row[1 + len(prompt) :], logprobs


def same(a: Sequence[Generated], b: Sequence[Generated]) -> None:
    assert [(each.tokens, each.ended) for each in a] == [(each.tokens, each.ended) for each in b]
    for one, other in zip(a, b, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-10)


def test_greedy_is_the_plain_loop(model: Decoder) -> None:
    """Catches a start without the 0, a prompt's last token read from a padded column, tokens one late."""
    found = generate(model, PROMPTS, 7, GREEDY, end_token=NO_END)
    for prompt, own in zip(PROMPTS, found, strict=True):
        tokens, logprobs = by_hand(model, prompt, 7)
        assert own.tokens == tokens
        assert own.logprobs == pytest.approx(logprobs, abs=1e-10)
        assert not own.ended


@pytest.mark.parametrize("sampling", [GREEDY, LIVELY], ids=["greedy", "drawn"])
def test_companions_change_nothing(model: Decoder, sampling: SamplingConfig) -> None:
    """Batches of any size, other prompts, another order: catches draws by step or by place in the batch, rows
    that go on with the wrong keys once others have ended."""
    end = generate(model, PROMPTS, 3, sampling, seed=11, end_token=NO_END)[2].tokens[2]
    whole = generate(model, PROMPTS, 9, sampling, seed=11, end_token=end)
    assert whole[2].ended
    assert 1 <= len(whole[2].tokens) <= 3
    assert any(not own.ended for own in whole)
    for batch_rows in (1, 2):
        same(generate(model, PROMPTS, 9, sampling, seed=11, batch_rows=batch_rows, end_token=end), whole)
    for row, prompt in enumerate(PROMPTS):
        same(generate(model, [prompt], 9, sampling, seed=11 + row, end_token=end), whole[row : row + 1])


def test_a_row_ends_at_its_end_token(config: ModelConfig) -> None:
    """Catches a row that goes on behind its end, or that is cut before it."""
    model = build(config.model_copy(update={"dropless": True}))
    free = generate(model, PROMPTS, 8, LIVELY, end_token=NO_END)
    end = free[0].tokens[1]
    found = generate(model, PROMPTS, 8, LIVELY, end_token=end)
    for own, whole in zip(found, free, strict=True):
        stop = whole.tokens.index(end) + 1 if end in whole.tokens else 8
        assert own.tokens == whole.tokens[:stop]
        assert len(own.logprobs) == stop
        assert own.ended == (end in whole.tokens)


def test_ended_rows_cost_nothing(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches rows that stay in the batch until the last has ended."""
    model = build(config.model_copy(update={"dropless": True}))
    free = generate(model, PROMPTS, 8, LIVELY, end_token=NO_END)
    end = free[0].tokens[1]
    rows, extend = [], model.extend
    monkeypatch.setattr(model, "extend", lambda *args: rows.append(len(args[1])) or extend(*args))
    generate(model, PROMPTS, 8, LIVELY, end_token=end)
    lengths = [own.tokens.index(end) + 1 if end in own.tokens else 8 for own in free]
    assert rows[1:] == [sum(length > step for length in lengths) for step in range(1, max(lengths))]


def test_what_memory_held(config: ModelConfig) -> None:
    """Catches a cache of uninitialised memory: a masked key may be NaN, and so is 0 * NaN."""
    model = build(config)
    torch.use_deterministic_algorithms(True)  # fills what is empty with NaN
    try:
        assert torch.empty(1).isnan()
        found = generate(model, PROMPTS, 4, GREEDY)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(torch.tensor(own.logprobs).isnan().any() for own in found)


def test_tokens_come_one_by_one(config: ModelConfig) -> None:
    """Catches a stream that holds tokens back until a row is done."""
    model = build(config)
    tokens = stream(model, PROMPTS[:2], 3, GREEDY, end_token=NO_END)
    assert [next(tokens).row for _ in range(6)] == [0, 1, 0, 1, 0, 1]
    assert next(tokens, None) is None


def test_the_models_capacity(config: ModelConfig) -> None:
    """Catches `capacity` that is lost on the way."""
    tight = {"capacity_factor_eval": 0.3, "min_capacity": 1}
    model = build(config.model_copy(update=tight))
    prompt = list(range(2, 30))
    runs = [generate(model, [prompt], 5, GREEDY, capacity=c)[0].logprobs for c in ("none", "model")]
    assert runs[0] != pytest.approx(runs[1], abs=1e-3)
    runs = [score(model, [prompt[:20]], [prompt[20:]], capacity=c)[0].logprob for c in ("none", "model")]
    assert runs[0] != pytest.approx(runs[1], abs=1e-3)


def test_score_is_the_plain_forward_pass(model: Decoder) -> None:
    """Catches a target one late, padding or prefix in the sum, scores in the order of the batch, and a row
    that is judged greedy by another one's tokens."""
    continuations = [[4, 4], [9, 30, 2], by_hand(model, PROMPTS[2], 3)[0], [], [1]]
    whole = score(model, PROMPTS, continuations)
    for batch_rows in (1, 2):
        parts = score(model, PROMPTS, continuations, batch_rows=batch_rows)
        assert [part.is_greedy for part in parts] == [one.is_greedy for one in whole]
        assert [p.logprob for p in parts] == pytest.approx([one.logprob for one in whole], abs=1e-10)
    for prompt, rest, found in zip(PROMPTS, continuations, whole, strict=True):
        logits = at_once(model, [0, *prompt, *rest], 1 + len(prompt))[len(prompt) : len(prompt) + len(rest)]
        logprobs = logits.log_softmax(-1)
        expected = sum(float(row[token]) for row, token in zip(logprobs, rest, strict=True))
        assert found.logprob == pytest.approx(expected, abs=1e-10)
        assert found.is_greedy == (logits.argmax(-1).tolist() == rest)
    assert whole[2].is_greedy
    assert whole[3] == (0.0, True)


def test_score_of_what_was_generated(model: Decoder) -> None:
    """Two ways to the same numbers: catches log-probabilities of the truncated distribution."""
    found = generate(model, PROMPTS, 6, LIVELY, seed=2, end_token=NO_END)
    scores = score(model, PROMPTS, [own.tokens for own in found])
    assert [one.logprob for one in scores] == pytest.approx([sum(own.logprobs) for own in found], abs=1e-9)


@pytest.mark.parametrize("tied", [False, True])
def test_stored_weights(tied: bool, config: ModelConfig) -> None:
    """Catches a router or a head in bfloat16: everything else is cast where it is used anyway."""
    model = Decoder(config.model_copy(update={"tied_head": tied}), compute_dtype=torch.bfloat16)
    model.load_state_dict(build(config.model_copy(update={"tied_head": tied})).state_dict())
    before = generate(model, PROMPTS, 5, LIVELY), score(model, PROMPTS, [[3, 8]] * 5)
    prepare_weights(model)
    assert (generate(model, PROMPTS, 5, LIVELY), score(model, PROMPTS, [[3, 8]] * 5)) == before
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes.pop("embedding.weight" if tied else "head.weight") == torch.float32
    assert all((dtype == torch.float32) == name.endswith("router.weight") for name, dtype in dtypes.items())
