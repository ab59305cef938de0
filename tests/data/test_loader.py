"""The loader: one order of data for every number of ranks and threads, and after every resume."""

import dataclasses
import hashlib
import json
import random
import weakref

import numpy as np
import pytest
import torch

from openmoe.data.config import DataConfig, PhaseConfig
from openmoe.data.errors import DataError
from openmoe.data.loader import Loader, StepBatch
from openmoe.data.packing import BATCH_ARRAYS
from openmoe.data.prepare import PreparedData, prepare
from openmoe.data.shards import Part, PreparedSource, Split
from openmoe.data.stream import Position, TokenStream

from .conftest import made_up_documents, write_source

MIX_ONE = {"short": 0.5, "middle": 0.3, "long": 0.2}
MIX_TWO = {"short": 0.1, "middle": 0.2, "long": 0.7}
PHASES = [
    PhaseConfig(until_steps=4, mix=MIX_ONE, objective="ul2"),
    PhaseConfig(until_tokens=6 * 64 * 6 + 1, mix=MIX_TWO, objective="causal_lm"),
    PhaseConfig(until_steps=9, mix=MIX_TWO, objective="prefix_lm"),
    PhaseConfig(mix=MIX_ONE, objective="span_corruption"),
]
SEQ_LEN, ROWS, STEPS = 64, 6, 12


def loader(prepared: PreparedData, config: DataConfig, **changes: object) -> Loader:
    values = {"seq_len": SEQ_LEN, "global_batch_rows": ROWS, "seed": 7, "phases": PHASES} | changes
    return Loader(prepared, data_config=config, **values)  # type: ignore[arg-type]


def take(batches: Loader, steps: int) -> list[StepBatch]:
    return [next(batches) for _ in range(steps)]


def assert_same(one: StepBatch, other: StepBatch) -> None:
    for name in BATCH_ARRAYS:
        np.testing.assert_array_equal(one.arrays[name], other.arrays[name], err_msg=name)
    for field in (
        "step",
        "phase",
        "objective",
        "nonpad_tokens",
        "loss_tokens",
        "source_tokens",
        "source_epochs",
    ):
        assert getattr(one, field) == getattr(other, field), field


@pytest.fixture(scope="module")
def reference(prepared: PreparedData, config: DataConfig) -> list[StepBatch]:
    return take(loader(prepared, config), STEPS)


def test_phases_switch_at_their_marks(reference: list[StepBatch]) -> None:
    """Catches an objective or mix that changes a step early or late."""
    assert [batch.phase for batch in reference] == [0] * 4 + [1] * 3 + [2] * 2 + [3] * 3
    assert [batch.step for batch in reference] == list(range(STEPS))


def test_batches_are_well_formed(prepared: PreparedData, reference: list[StepBatch]) -> None:
    """Catches plans unlike what is built, loss on padding, and targets that aren't the input after."""
    for batch in reference:
        arrays = batch.arrays
        assert {n: (a.dtype.type, a.shape) for n, a in arrays.items()} == {
            n: (dtype, (ROWS, SEQ_LEN)) for n, (dtype, _) in BATCH_ARRAYS.items()
        }
        real = arrays["segment_ids"] > 0
        assert batch.nonpad_tokens == real.sum() == (arrays["target_tokens"] > 0).sum()
        assert batch.loss_tokens == arrays["loss_weights"].sum() == (arrays["loss_weights"] > 0).sum()
        assert not arrays["loss_weights"][~real].any()
        assert (arrays["source_ids"] >= 0).sum() == real.sum()
        assert set(np.unique(arrays["source_ids"])) <= {-1, 0, 1, 2}
        same = arrays["segment_ids"][:, 1:] == arrays["segment_ids"][:, :-1]
        same &= real[:, 1:]
        shifted = np.where(same, arrays["target_tokens"][:, :-1], 0)
        np.testing.assert_array_equal(arrays["input_tokens"][:, 1:] * real[:, 1:], shifted * real[:, 1:])
        assert arrays["target_tokens"].max() < prepared.tokenizer.size
        counts = [(arrays["source_ids"] == i).sum() for i in range(3)]
        assert batch.source_tokens == dict(zip(sorted(MIX_ONE), counts, strict=True))
        assert batch.positions == ROWS * SEQ_LEN


def test_ranks_see_their_rows_of_the_same_batch(
    prepared: PreparedData, config: DataConfig, reference: list[StepBatch]
) -> None:
    """Catches data that depends on the number of ranks."""
    for ranks in (2, 3, 6):
        per_rank = ROWS // ranks
        for rank in range(ranks):
            rows = slice(rank * per_rank, (rank + 1) * per_rank)
            for whole, own in zip(reference, take(loader(prepared, config, rows=rows), STEPS), strict=True):
                assert own.loss_tokens == whole.loss_tokens
                for name in BATCH_ARRAYS:
                    np.testing.assert_array_equal(own.arrays[name], whole.arrays[name][rows])


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_workers_change_nothing(
    prepared: PreparedData, config: DataConfig, reference: list[StepBatch], workers: int
) -> None:
    """Catches batches out of order, or draws that depend on which thread made them."""
    batches = loader(prepared, config.model_copy(update={"workers": workers}))
    for one, other in zip(reference, take(batches, STEPS), strict=True):
        assert_same(one, other)
    batches.close()


@pytest.mark.parametrize("workers", [0, 3])
def test_resume_after_every_step_is_exact(
    prepared: PreparedData, config: DataConfig, reference: list[StepBatch], workers: int
) -> None:
    """Catches a state that runs ahead with the prefetch, or forgets something, on either side of a mark."""
    ahead = config.model_copy(update={"workers": workers})
    first = loader(prepared, ahead)
    states = [json.loads(json.dumps(first.state_dict()))]
    for _ in range(STEPS):
        next(first)
        states.append(json.loads(json.dumps(first.state_dict())))
    first.close()
    used = loader(prepared, ahead)  # resumed again and again, with batches already built ahead
    for step, state in enumerate(states[:-1]):
        used.load_state_dict(state)
        assert used.state_dict() == state
        for expected in reference[step : step + 3]:
            assert_same(expected, next(used))
    used.close()


def digest(batch: StepBatch) -> list[str]:
    """sha256 of each row."""
    return [
        hashlib.sha256(b"".join(batch.arrays[name][row].tobytes() for name in BATCH_ARRAYS)).hexdigest()
        for row in range(len(batch.arrays["target_tokens"]))
    ]


@pytest.mark.parametrize("packing", ["released", "dense"])
def test_rows_are_the_same_for_any_ranks_workers_and_resumes(
    prepared: PreparedData, config: DataConfig, packing: str
) -> None:
    """Catches any dependence on the layout, marks included: 1 to 8 ranks x 0 or 2 workers, 50 resumes."""
    dense = {"packing": "dense", "example_tokens": 64, "document_chunk_tokens": 50}
    settings = config.model_copy(update=dense if packing == "dense" else {})
    seq_len = 300 if packing == "dense" else 64
    phases = [
        PhaseConfig(until_steps=20, mix=MIX_ONE, objective="ul2"),
        PhaseConfig(until_tokens=45 * 8 * seq_len - 1, mix=MIX_TWO, objective="causal_lm", ramp_steps=9),
        PhaseConfig(mix=MIX_ONE, objective="span_corruption"),
    ]
    shape = {"phases": phases, "seq_len": seq_len, "global_batch_rows": 8}
    steps = 60
    whole = loader(prepared, settings, **shape)
    states, expected = [], []
    for _ in range(steps):
        states.append(json.dumps(whole.state_dict()))
        expected.append(digest(next(whole)))
    assert len(json.dumps(whole.state_dict()["plan"])) < 200
    assert len(states[-1]) < 1500
    for ranks in (1, 2, 4, 8):
        for workers in (0, 2):
            at = settings.model_copy(update={"workers": workers})
            loaders = [
                loader(prepared, at, **shape, rows=slice(r * 8 // ranks, (r + 1) * 8 // ranks))
                for r in range(ranks)
            ]
            for step in range(steps):
                assert [row for one in loaders for row in digest(next(one))] == expected[step]
            for one in loaders:
                one.close()
    draw = random.Random(0)
    for step in [19, 20, 44, 45] + [draw.randrange(steps) for _ in range(46)]:
        ranks = draw.choice([1, 2, 4, 8])
        rank = draw.randrange(ranks)
        rows = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
        resumed = loader(prepared, settings, **shape, rows=rows)
        resumed.load_state_dict(json.loads(states[step]))
        sought = loader(prepared, settings, **shape, rows=rows)
        sought.seek(step)
        for after in range(step, min(step + 2, steps)):
            assert digest(next(resumed)) == expected[after][rows]
            assert digest(next(sought)) == expected[after][rows]


@pytest.mark.parametrize("workers", [0, 2])
def test_memory_is_used_again_once_nobody_holds_it(
    prepared: PreparedData, config: DataConfig, reference: list[StepBatch], workers: int
) -> None:
    """Catches a batch that is overwritten while in use, memory that grows, batches outside what was given."""
    blocks: list[weakref.ref[np.ndarray]] = []  # holding them would keep them from being used again

    def allocate(size_bytes: int) -> np.ndarray:
        block = np.full(size_bytes, 255, np.uint8)
        blocks.append(weakref.ref(block))
        return block

    ahead = config.model_copy(update={"workers": workers})
    batches = loader(prepared, ahead, allocate=allocate)
    held = next(batches)
    inside = torch.from_numpy(next(batches).arrays["loss_weights"])[1:]
    expected = inside.clone()
    for later in reference[2:]:
        batch = next(batches)
        assert_same(batch, later)
        assert all(any(array.base is block() for block in blocks) for array in batch.arrays.values())
    assert_same(held, reference[0])
    assert torch.equal(inside, expected)
    assert len(blocks) <= 2 + 2 + 2 * workers
    batches.close()


def test_a_change_of_mix_on_resume_goes_on_with_the_next_text(
    prepared: PreparedData, config: DataConfig
) -> None:
    """Catches text skipped or read again where a phase is changed between two runs, then resumed again."""
    one = [PhaseConfig(mix={"middle": 0.5, "long": 0.5}, objective="causal_lm")]
    two = [PhaseConfig(mix={"middle": 1.0}, objective="causal_lm")]
    first = loader(prepared, config, phases=one)
    read = [b.source_text_tokens["middle"] for b in take(first, 7)]
    second = loader(prepared, config, phases=two)
    second.load_state_dict(first.state_dict())
    batches = take(second, 3)
    third = loader(prepared, config, phases=two)
    third.load_state_dict(json.loads(json.dumps(second.state_dict())))
    rows = np.concatenate([b.arrays["target_tokens"] for b in batches + take(third, 3)])
    source = TokenStream(
        "middle", prepared.sources["middle"].splits["train"], 7, config.document_chunk_tokens
    )
    np.testing.assert_array_equal(rows.ravel(), source.read(sum(read), rows.size, True))


def test_sources_come_and_go_between_runs(prepared: PreparedData, config: DataConfig) -> None:
    """Catches a resume that refuses a new mix, or starts a source again that comes back."""
    some = dataclasses.replace(prepared, sources={n: prepared.sources[n] for n in ("middle", "long")})
    mix = {"middle": 0.5, "long": 0.5}
    both = [PhaseConfig(until_steps=5, mix=mix, objective="ul2"), PhaseConfig(mix=MIX_ONE, objective="ul2")]
    alone = loader(
        some, config, phases=[PhaseConfig(until_steps=5, mix=mix | {"short": 0.0}, objective="ul2")]
    )
    straight = loader(prepared, config, phases=both)
    for _ in range(3):  # a source that isn't read yet changes nothing
        one, other = next(alone), next(straight)
        np.testing.assert_array_equal(one.arrays["target_tokens"], other.arrays["target_tokens"])
    grown = loader(prepared, config, phases=both)
    grown.load_state_dict(json.loads(json.dumps(alone.state_dict())))
    for _ in range(6):
        assert_same(next(grown), next(straight))
    # Without `long` for a while, then with it again: it goes on where it was.
    less = dataclasses.replace(prepared, sources={n: prepared.sources[n] for n in ("middle", "short")})
    without = loader(less, config, phases=[PhaseConfig(mix={"short": 0.5, "middle": 0.5}, objective="ul2")])
    without.load_state_dict(json.loads(json.dumps(grown.state_dict())))
    next(without)
    again = loader(prepared, config, phases=[PhaseConfig(mix={"long": 1.0}, objective="causal_lm")])
    again.load_state_dict(json.loads(json.dumps(without.state_dict())))
    place = grown.state_dict()["plan"]["sources"]["long"]
    stream = TokenStream("long", prepared.sources["long"].splits["train"], 7, config.document_chunk_tokens)
    text = next(again).arrays["target_tokens"].ravel()
    expected = stream.read(stream.number(Position(*place), True), len(text), True)
    np.testing.assert_array_equal(text, expected)


def test_added_text_changes_nothing_that_was_read(prepared: PreparedData, config: DataConfig) -> None:
    """Catches a source that is read from its start again, or skips, when text was added between runs."""
    phases = [PhaseConfig(mix={"short": 0.8, "middle": 0.2}, objective="causal_lm")]
    grown = dataclasses.replace(
        prepared, sources=prepared.sources | {"short": _with_part(prepared, "short", "long")}
    )
    size = TokenStream("short", prepared.sources["short"].splits["train"], 7, 400).epoch_tokens(True)
    for steps in (3, 60):  # in the first epoch, and in a later one
        first = loader(prepared, config, phases=phases)
        used = sum(b.source_text_tokens["short"] for b in take(first, steps))
        assert (used > size) == (steps == 60)
        resumed = loader(grown, config, phases=phases)
        resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
        left = size - used % size
        before = TokenStream("short", prepared.sources["short"].splits["train"], 7, 400)
        rows = [next(resumed).arrays for _ in range(4)]
        index = sorted(MIX_ONE).index("short")
        text = np.concatenate([a["target_tokens"][a["source_ids"] == index] for a in rows])
        expected = before.read(used, min(left, len(text)), True)
        np.testing.assert_array_equal(text[: len(expected)], expected)
    with pytest.raises(DataError, match="agree in source short"):
        loader(prepared, config, phases=phases).load_state_dict(resumed.state_dict())


def _with_part(prepared: PreparedData, name: str, added: str) -> PreparedSource:
    """The source `name` with the text of another as its second part."""
    old, new = prepared.sources[name], prepared.sources[added]
    splits: dict[Split, tuple[Part, ...]] = {s: old.splits[s] + new.splits[s] for s in old.splits}
    return PreparedSource(name, splits, old.sha256 + new.sha256)


def test_repetition_is_foreseen(prepared: PreparedData, config: DataConfig) -> None:
    """Catches repetition that goes unannounced, is a step late or wrongly named, or isn't forbidden."""
    phases = [
        PhaseConfig(until_steps=30, mix={"short": 0.5, "middle": 0.5}, objective="ul2"),
        PhaseConfig(until_steps=60, mix={"short": 1.0}, objective="causal_lm"),
    ]
    made = loader(prepared, config, phases=phases)
    foreseen = {r.source: r for r in made.repetitions(60)}
    first = {}
    for batch in take(made, 60):
        for name, epochs in batch.source_epochs.items():
            if epochs > 1 and name not in first:
                first[name] = batch.step
    assert "long" not in foreseen
    assert {name: r.step for name, r in foreseen.items()} == first
    assert foreseen["short"].epochs == pytest.approx(batch.source_epochs["short"])
    early = min(first.values())
    assert loader(prepared, config, phases=phases).repetitions(early) == []
    forbidden = config.model_copy(update={"repetition": "forbid"})
    name = min(first, key=lambda name: first[name])
    with pytest.raises(DataError, match=f"source '{name}' is used up at step {early}.*repetition=forbid"):
        loader(prepared, forbidden, phases=phases).repetitions(early + 1)
    assert loader(prepared, forbidden, phases=phases).repetitions(early) == []


def test_repetition_is_foreseen_behind_the_last_mark(prepared: PreparedData, config: DataConfig) -> None:
    """Catches a run of more steps than its curriculum has that looks for them for ever."""
    marked = [PhaseConfig(until_steps=30, mix={"short": 1.0}, objective="ul2")]
    endless = [PhaseConfig(mix={"short": 1.0}, objective="ul2")]
    expected = loader(prepared, config, phases=endless).repetitions(60)
    assert expected
    made = loader(prepared, config, phases=marked)
    assert made.repetitions(60) == expected
    take(made, 40)
    assert made.repetitions(60)[0].epochs == expected[0].epochs


def test_dense_rows_hold_the_released_examples(prepared: PreparedData, config: DataConfig) -> None:
    """Catches packing that changes, drops or doubles examples, or mixes up their segments."""
    phases = [PhaseConfig(mix={"long": 1.0}, objective="ul2")]
    rows = loader(prepared, config, phases=phases, global_batch_rows=1)._planner._recipes[0].block_rows
    released = next(loader(prepared, config, phases=phases, global_batch_rows=rows))
    dense_config = config.model_copy(update={"packing": "dense", "example_tokens": SEQ_LEN})
    made = loader(prepared, dense_config, phases=phases, seq_len=32 * SEQ_LEN, global_batch_rows=1)
    block = made._planner._recipes[0].block_rows
    dense = next(loader(prepared, dense_config, phases=phases, seq_len=32 * SEQ_LEN, global_batch_rows=block))
    assert dense.nonpad_tokens / dense.positions > 0.95
    count = len(dense.examples.kind)
    assert count % rows == 0
    # The same sizes and kinds, `count / rows` blocks of the released rows in one.
    np.testing.assert_array_equal(
        np.bincount(dense.examples.kind), np.bincount(released.examples.kind) * (count // rows)
    )
    arrays = dense.arrays
    for row in range(block):
        segments = arrays["segment_ids"][row]
        assert (np.diff(segments[segments > 0]) >= 0).all()
        for segment in range(1, segments.max() + 1):
            mine = np.flatnonzero(segments == segment)
            targets, inputs = arrays["target_tokens"][row, mine], arrays["input_tokens"][row, mine]
            np.testing.assert_array_equal(inputs, [0, *targets[:-1]])
            learned = arrays["loss_weights"][row, mine] > 0
            assert targets[-1] == targets[np.argmax(learned) - 1] == 1
            assert learned[np.argmax(learned) :].all()
            assert len(mine) <= SEQ_LEN


def test_rows_follow_one_another_in_the_source(prepared: PreparedData, config: DataConfig) -> None:
    """Catches text skipped or read twice between two rows or steps."""
    phases = [PhaseConfig(mix={"middle": 1.0}, objective="causal_lm")]
    batches = take(loader(prepared, config, phases=phases), 20)
    rows = np.concatenate([b.arrays["target_tokens"] for b in batches])
    source = TokenStream(
        "middle", prepared.sources["middle"].splits["train"], 7, config.document_chunk_tokens
    )
    np.testing.assert_array_equal(rows.ravel(), source.read(0, rows.size, True))


def test_seeds_differ_and_runs_agree(
    prepared: PreparedData, config: DataConfig, reference: list[StepBatch]
) -> None:
    """Catches a seed that is ignored."""
    assert_same(reference[0], next(loader(prepared, config)))
    other = next(loader(prepared, config, seed=8))
    assert (other.arrays["target_tokens"] != reference[0].arrays["target_tokens"]).any()


def test_text_goes_on_across_the_switch(prepared: PreparedData, config: DataConfig) -> None:
    """Catches a new phase starting each source again: the text would be seen twice and other text never."""
    mix = {"middle": 1.0}
    both = [
        PhaseConfig(until_steps=2, mix=mix, objective="causal_lm"),
        PhaseConfig(mix=mix, objective="causal_lm"),
    ]
    switched = take(loader(prepared, config, phases=both), 4)
    straight = take(loader(prepared, config, phases=both[1:]), 4)
    for one, other in zip(switched, straight, strict=True):
        np.testing.assert_array_equal(one.arrays["target_tokens"], other.arrays["target_tokens"])


@pytest.mark.parametrize("objective", ["ul2", "causal_lm"])
def test_the_realised_mix_keeps_to_its_rates(
    prepared: PreparedData, config: DataConfig, objective: str
) -> None:
    """Catches rates that hold for examples or for tokens only, and the old mix being made up for."""
    phases = [
        PhaseConfig(until_steps=100, mix=MIX_ONE, objective=objective),  # type: ignore[arg-type]
        PhaseConfig(mix={k: 10 * v for k, v in MIX_TWO.items()}, objective=objective),  # type: ignore[arg-type]
    ]
    batches = take(loader(prepared, config, phases=phases), 200)
    names = sorted(MIX_ONE)
    for mix, part in ((MIX_ONE, batches[:100]), (MIX_TWO, batches[100:])):
        rates = np.array([mix[name] for name in names])
        tokens, examples = np.zeros(3), np.zeros(3)
        for batch in part:
            tokens += [batch.source_text_tokens[name] for name in names]
            examples += np.bincount(batch.examples.source, minlength=3)
            assert np.abs(tokens - rates * tokens.sum()).max() <= 6 * 64
            assert np.abs(examples - rates * examples.sum()).max() <= 6


def test_a_ramp_leads_from_one_mix_to_the_next(prepared: PreparedData, config: DataConfig) -> None:
    """Catches a ramp in the wrong unit, one that starts at the first mark, and one before any mix."""
    phases = [
        PhaseConfig(until_steps=10, mix={"short": 1.0}, objective="causal_lm"),
        PhaseConfig(mix={"middle": 1.0}, objective="causal_lm", ramp_steps=50),
    ]
    batches = take(loader(prepared, config, phases=phases, global_batch_rows=80), 80)
    shares = [batch.source_text_tokens["middle"] / batch.positions for batch in batches]
    assert set(shares[:10]) == {0.0}
    assert set(shares[60:]) == {1.0}
    for first in (10, 20, 30, 40, 50):
        assert np.mean(shares[first : first + 10]) == pytest.approx((first - 5) / 50, abs=0.05)
    with pytest.raises(DataError, match=r"curriculum\[0\]\.ramp_steps=50: no mix comes before"):
        loader(prepared, config, phases=phases[1:])
    short = [phases[0], phases[1].model_copy(update={"until_steps": 59})]
    with pytest.raises(DataError, match=r"curriculum\[1\]\.ramp_steps=50: the phase has 49 steps"):
        loader(prepared, config, phases=short)


def test_ul2_draws_its_denoisers_at_their_rates(prepared: PreparedData, config: DataConfig) -> None:
    """Catches a denoiser that is never used, rates that don't hold, or a plan unlike the rows."""
    modes = [prepared.tokenizer.encode(d.mode) for d in config.denoisers]
    phases = [PhaseConfig(mix={"short": 1.0}, objective="ul2")]
    batches = take(loader(prepared, config, phases=phases, global_batch_rows=100), 20)
    for batch in batches:
        rows = batch.arrays["target_tokens"]  # one example a row
        assert all(rows[i, : len(modes[k])].tolist() == modes[k] for i, k in enumerate(batch.examples.kind))
    kinds = np.concatenate([batch.examples.kind for batch in batches])
    np.testing.assert_allclose(np.bincount(kinds) / 2000, [0.1, 0.1, 0.1, 0.1, 0.1, 0.5])


def test_ul2_fills_rows_as_the_released_runs_did(config: DataConfig, prepared: PreparedData) -> None:
    """Catches loss on inputs, missing EOS, other packing: 67.3% fill, 29.6% loss at 2048 (facts 5.4)."""
    phases = [PhaseConfig(mix=MIX_ONE, objective="ul2")]
    batches = take(loader(prepared, config, phases=phases, seq_len=2048, global_batch_rows=400), 3)
    positions = sum(b.positions for b in batches)
    assert sum(b.nonpad_tokens for b in batches) / positions == pytest.approx(0.673, abs=0.015)
    assert sum(b.loss_tokens for b in batches) / positions == pytest.approx(0.296, abs=0.015)


def test_epochs_are_counted(prepared: PreparedData, config: DataConfig) -> None:
    """Catches a source that ends, or one whose repetition goes unnoticed."""
    phases = [PhaseConfig(mix={"short": 1.0}, objective="causal_lm")]
    batches = take(loader(prepared, config, phases=phases), 60)
    read = sum(b.source_text_tokens["short"] for b in batches)
    (shard,) = prepared.sources["short"].splits["train"][0]
    assert batches[-1].source_epochs["short"] == read / (shard.tokens + shard.documents)
    assert batches[-1].source_epochs["short"] > 2
    assert batches[-1].source_epochs["long"] == 0


def test_row_end_eos_is_the_released_causal_row(prepared: PreparedData, config: DataConfig) -> None:
    """Catches the released variant's EOS at every row's end missing there, or present in the paper's."""
    phases = [PhaseConfig(mix=MIX_ONE, objective="causal_lm")]
    released = next(loader(prepared, config.model_copy(update={"row_end_eos": True}), phases=phases))
    plain = next(loader(prepared, config, phases=phases))
    assert (released.arrays["target_tokens"][:, -1] == 1).all()
    assert (plain.arrays["target_tokens"][:, -1] != 1).any()
    np.testing.assert_array_equal(
        released.arrays["target_tokens"][:, :-1], plain.arrays["target_tokens"][:, :-1]
    )


@pytest.mark.parametrize("objective", ["causal_lm", "ul2", "prefix_lm", "span_corruption"])
def test_validation_rows_are_fixed_and_use_each_text_once(
    prepared: PreparedData, config: DataConfig, objective: str
) -> None:
    """Catches evaluation on training text, on other text per seed, or on the same text twice."""
    rows = [
        loader(prepared, config, seed=seed).validation_rows(objective, "short", 200)  # type: ignore[arg-type]
        for seed in (1, 2)
    ]
    for name in BATCH_ARRAYS:
        np.testing.assert_array_equal(rows[0][name], rows[1][name])
    assert rows[0]["target_tokens"].shape == (200, SEQ_LEN)
    assert not rows[0]["target_tokens"][-1].any()  # there is less text than that
    assert set(np.unique(rows[0]["source_ids"])) == {-1, sorted(MIX_ONE).index("short")}
    if objective == "causal_lm":
        (shard,) = prepared.sources["short"].splits["valid"][0]
        targets = rows[0]["target_tokens"]
        assert sorted(targets[targets > 1].tolist()) == sorted(shard.map_tokens().tolist())
        assert (targets == 1).sum() == shard.documents


def test_a_state_of_other_data_is_refused(
    prepared: PreparedData, config: DataConfig, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Catches a resume that goes on, at the same positions, in other text."""
    root = tmp_path_factory.mktemp("other")
    for seed, name in enumerate(sorted(MIX_ONE)):
        write_source(root / name, made_up_documents(20 + seed, 30, 60))
    other = prepare(config.model_copy(update={"root": str(root)}))
    state = loader(prepared, config).state_dict()
    with pytest.raises(DataError, match=r"agree in (source|tokenizer)"):
        loader(other, config).load_state_dict(state)
    with pytest.raises(DataError, match=r"agree in train\.global_batch_rows: saved with 6, now 5"):
        loader(prepared, config, global_batch_rows=5).load_state_dict(state)
    changed = config.model_copy(update={"row_end_eos": not config.row_end_eos})
    with pytest.raises(DataError, match=r"agree in data\.row_end_eos: saved with False, now True"):
        loader(prepared, changed).load_state_dict(state)
    with pytest.raises(DataError, match="not one of this program"):
        loader(prepared, config).load_state_dict(state | {"plan": {}})


def test_a_source_that_is_not_there_is_named(prepared: PreparedData, config: DataConfig) -> None:
    """Catches a misspelt source that would silently get nothing."""
    phases = [PhaseConfig(mix={"short": 1.0, "shrt": 1.0}, objective="ul2")]
    with pytest.raises(DataError, match=r"curriculum\[0\]\.mix.*'shrt'; there are long, middle, short"):
        loader(prepared, config, phases=phases)


@pytest.mark.parametrize(("objective", "seq_len"), [("ul2", 4096), ("ul2", 16), ("causal_lm", 4)])
def test_rows_the_objective_cannot_use_are_refused(
    prepared: PreparedData, config: DataConfig, objective: str, seq_len: int
) -> None:
    """Catches sentinels running into ordinary pieces (4096 needs 512), and examples of mode strings alone."""
    phases = [PhaseConfig(mix=MIX_ONE, objective=objective)]  # type: ignore[arg-type]
    with pytest.raises(DataError, match=f"={seq_len}"):
        loader(prepared, config, phases=phases, seq_len=seq_len)
