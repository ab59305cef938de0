"""The loader: one order of data for every number of ranks and threads, and after every resume."""

import json

import numpy as np
import pytest

from openmoe.data.config import DataConfig, PhaseConfig
from openmoe.data.errors import DataError
from openmoe.data.loader import Loader, StepBatch
from openmoe.data.packing import BATCH_ARRAYS
from openmoe.data.prepare import PreparedData, prepare
from openmoe.data.sources import START, TokenSource

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


def test_rows_follow_one_another_in_the_source(prepared: PreparedData, config: DataConfig) -> None:
    """Catches text skipped or read twice between two rows or steps."""
    phases = [PhaseConfig(mix={"middle": 1.0}, objective="causal_lm")]
    batches = take(loader(prepared, config, phases=phases), 20)
    rows = np.concatenate([b.arrays["target_tokens"] for b in batches])
    source = TokenSource(
        "middle", prepared.sources["middle"].splits["train"], 7, config.document_chunk_tokens
    )
    np.testing.assert_array_equal(rows.ravel(), source.read(START, rows.size, True))


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


def examples_of(batch: StepBatch, source: str) -> int:
    """Segments of the batch's rows that come from `source`; the sources are numbered by name."""
    index = sorted(MIX_ONE.keys() | MIX_TWO.keys()).index(source)
    segments, sources = batch.arrays["segment_ids"], batch.arrays["source_ids"]
    begins = np.diff(segments, prepend=0) > 0
    return int((begins & (sources == index)).sum())


@pytest.mark.parametrize("mix_rates", ["per_token", "per_example"])
@pytest.mark.parametrize("objective", ["ul2", "causal_lm"])
def test_the_realised_mix_keeps_to_its_rates(
    prepared: PreparedData, config: DataConfig, mix_rates: str, objective: str
) -> None:
    """Catches rates of the wrong unit, sources swapped, and the old mix being made up for after a switch."""
    phases = [
        PhaseConfig(until_steps=100, mix=MIX_ONE, objective=objective),  # type: ignore[arg-type]
        PhaseConfig(mix={k: 10 * v for k, v in MIX_TWO.items()}, objective=objective),  # type: ignore[arg-type]
    ]
    batches = take(loader(prepared, config.model_copy(update={"mix_rates": mix_rates}), phases=phases), 200)
    largest = SEQ_LEN if mix_rates == "per_token" else 1
    for mix, part in ((MIX_ONE, batches[:100]), (MIX_TWO, batches[100:])):
        given = dict.fromkeys(mix, 0)
        for batch in part:
            for name in given:
                given[name] += (
                    batch.source_text_tokens[name] if mix_rates == "per_token" else examples_of(batch, name)
                )
            total = sum(given.values())
            for name, rate in mix.items():
                assert abs(given[name] - rate * total) <= 2 * largest


def test_ul2_draws_its_denoisers_at_their_rates(prepared: PreparedData, config: DataConfig) -> None:
    """Catches a denoiser that is never used, or rates that don't hold: shares by mode string."""
    modes = {mode: prepared.tokenizer.encode(mode)[:-1] for mode in ("[NLU] ", "[NLG] ", "[S2S] ")}
    phases = [PhaseConfig(mix={"short": 1.0}, objective="ul2")]
    batches = take(loader(prepared, config, phases=phases, global_batch_rows=100), 20)
    rows = np.concatenate([b.arrays["target_tokens"] for b in batches])
    shares = {
        mode: np.mean((rows[:, : len(ids)] == ids).all(axis=1)) for mode, ids in modes.items()
    }  # one example a row
    step = batches[0].arrays["target_tokens"]
    for ids in modes.values():  # one draw for a whole step would give the right shares in the long run
        assert 5 < (step[:, : len(ids)] == ids).all(axis=1).sum() < 80
    assert shares["[NLU] "] == pytest.approx(0.2, abs=0.03)
    assert shares["[NLG] "] == pytest.approx(0.3, abs=0.03)
    assert shares["[S2S] "] == pytest.approx(0.5, abs=0.035)


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
    shard = prepared.sources["short"].splits["train"]
    assert batches[-1].source_epochs["short"] == pytest.approx(
        read / (len(shard.tokens) + shard.documents), rel=0.1
    )
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
        shard = prepared.sources["short"].splits["valid"]
        targets = rows[0]["target_tokens"]
        assert sorted(targets[targets > 1].tolist()) == sorted(shard.tokens.tolist())
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
    with pytest.raises(DataError, match=f"seq_len={seq_len}"):
        loader(prepared, config, phases=phases, seq_len=seq_len)
