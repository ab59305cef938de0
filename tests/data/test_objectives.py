"""Every class of examples, against an oracle for one example and against what must hold of any."""

import hashlib
import itertools
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest

from openmoe.data import objectives, ul2
from openmoe.data.config import DataConfig, DenoiserConfig
from openmoe.data.errors import DataError
from openmoe.data.objectives import Objective, make_objective
from openmoe.data.rng import mix_bits, random_words
from openmoe.data.tokenizer import EOS
from tests.parity.t5 import corrupted, mask_of

FIRST_SENTINEL = 50_299
SENTINELS = range(50_000, 50_300)
FIRST_TOKEN = 1000  # raw tokens count up from here, so every place is told from every other

# A short span, a long one, more noise than text, all noise but the rest, and two alike.
OTHER_DENOISERS = [
    DenoiserConfig(mode="[A] ", mean_span=1.0, density=0.25, rate=3.0),
    DenoiserConfig(mode="", mean_span=1e6, density=0.4, rate=1.0),
    DenoiserConfig(mode="[longer mode] ", mean_span=4.0, density=0.7, rate=0.5),
    DenoiserConfig(mode="[B] ", mean_span=20.0, density=0.99, rate=0.5),
    DenoiserConfig(mode="[B] ", mean_span=None, density=0.0, rate=2.0),
    DenoiserConfig(mode="[B] ", mean_span=None, density=0.0, rate=1.0),
]
CASES = {
    "ul2": ("ul2", DataConfig()),
    "ul2 without modes": ("ul2", DataConfig(mode_strings=False)),
    "other denoisers": ("ul2", DataConfig(denoisers=OTHER_DENOISERS)),
    "prefix_lm": ("prefix_lm", DataConfig()),
    "span_corruption": ("span_corruption", DataConfig()),
    "causal_lm": ("causal_lm", DataConfig()),
    "causal_lm with EOS": ("causal_lm", DataConfig(row_end_eos=True)),
}


class Letters:
    """A tokenizer that gives every letter its code."""

    first_sentinel = FIRST_SENTINEL

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def objective_of(name: str, example_tokens: int, config: DataConfig) -> Objective:
    return make_objective(name, example_tokens, Letters(), config)  # type: ignore[arg-type]


def draws(count: int, seed: int = 0) -> np.ndarray:
    return mix_bits(np.arange(seed * count, (seed + 1) * count, dtype=np.uint64))


def numbered(examples: int, raw_tokens: int) -> np.ndarray:
    return (FIRST_TOKEN + np.arange(examples * raw_tokens, dtype=np.int32)).reshape(examples, raw_tokens)


def raw_lengths(full: int) -> list[int]:
    """The class's own and those of tails."""
    return sorted({1, 2, 3, 4, 7, full // 3, full - 1, full} & set(range(1, full + 1)))


@dataclass(frozen=True)
class Case:
    """One class of one objective."""

    objective: Objective
    index: int
    config: DataConfig
    # Tokens an example may take.
    room: int

    @property
    def mode(self) -> list[int]:
        """The mode string that the examples begin with."""
        if len(self.objective.classes) == 1 or not self.config.mode_strings:
            return []
        return Letters().encode(self.config.denoisers[self.index].mode)

    @property
    def name(self) -> str:
        return self.objective.classes[self.index].name

    @property
    def raw_tokens(self) -> int:
        return self.objective.classes[self.index].raw_tokens


def every_class(*rooms: int) -> pytest.MarkDecorator:
    cases = []
    for (label, (name, config)), room in itertools.product(CASES.items(), rooms):
        objective = objective_of(name, room, config)
        cases += [
            pytest.param(Case(objective, index, config, room), id=f"{label} {room}, class {index}")
            for index in range(len(objective.classes))
        ]
    return pytest.mark.parametrize("case", cases)


def parts(case: Case, tokens: np.ndarray, words: np.ndarray) -> list[tuple[list[int], list[int]]]:
    """Inputs and targets of each example built."""
    built = case.objective.build(case.index, tokens, words)
    sizes = zip(built.input_tokens.tolist(), built.target_tokens.tolist(), strict=True)
    return [
        (sequence[:inputs].tolist(), sequence[inputs : inputs + targets].tolist())
        for sequence, (inputs, targets) in zip(built.sequences, sizes, strict=True)
    ]


def oracle(case: Case, tokens: np.ndarray, word: np.ndarray) -> tuple[list[int], list[int]]:
    """One example the slow way."""
    length = len(tokens)
    if case.objective.joins_with_eos:
        if case.config.row_end_eos:
            return [], [*tokens[: case.room - 1].tolist(), EOS]
        return [], tokens.tolist()
    single = len(case.objective.classes) == 1
    side = case.room if single else case.room // 2
    if "prefix" in case.name:
        prefix = 1 + int(word[0]) % (length - 1) if length > 1 else 0
        given, learned = tokens[:prefix].tolist(), tokens[prefix:].tolist()
    else:
        denoiser = case.config.denoisers[0 if single else case.index]  # the first is T5's own
        assert denoiser.mean_span is not None
        counts = ul2.noise_counts(length, denoiser.mean_span, denoiser.density)
        mask = mask_of(ul2.span_ends(length, *counts, word)[0], length)
        assert mask.sum() == counts[0]
        given, learned = corrupted(tokens, mask, FIRST_SENTINEL)
    return [*(case.mode + given)[: side - 1], EOS], [*learned[: side - 1], EOS]


@every_class(64, 250)
def test_examples_equal_the_oracle(case: Case) -> None:
    """Catches any token, EOS, trim or sentinel that differs from T5's definition, at any length of text."""
    for raw_tokens in raw_lengths(case.raw_tokens):
        tokens, words = numbered(9, raw_tokens), draws(9, raw_tokens)
        for number, pair in enumerate(parts(case, tokens, words)):
            wanted = oracle(case, tokens[number], words[number : number + 1])
            assert pair == wanted, (raw_tokens, number)


@every_class(64, 250, 2048)
def test_sizes_are_those_of_what_is_built(case: Case) -> None:
    """Catches plans made of other sizes than what fills the rows, and a row too small for its example."""
    row_tokens = case.objective.classes[case.index].row_tokens
    for raw_tokens in raw_lengths(case.raw_tokens):
        words = draws(50, raw_tokens)
        words[0] = 0  # the shortest prefix
        inputs, targets = case.objective.sizes(case.index, raw_tokens, words)
        built = case.objective.build(case.index, numbered(50, raw_tokens), words)
        np.testing.assert_array_equal(built.input_tokens, inputs)
        np.testing.assert_array_equal(built.target_tokens, targets)
        assert {part.dtype for part in (inputs, targets)} == {np.dtype(np.int64)}
        assert built.sequences.dtype == np.int32
        assert (targets >= 1).all()
        beyond = np.arange(built.sequences.shape[1]) >= (inputs + targets)[:, np.newaxis]
        np.testing.assert_array_equal(built.sequences == 0, beyond)
        longest = (inputs + targets).max()
        assert longest == row_tokens if raw_tokens == case.raw_tokens else longest <= row_tokens
    assert row_tokens <= case.room


@every_class(250)
def test_nothing_is_lost_but_the_trim(case: Case) -> None:
    """Catches tokens dropped, doubled or moved between inputs and targets, and a trim beyond the mode."""
    mode = case.mode
    for raw_tokens in raw_lengths(case.raw_tokens):
        tokens, words = numbered(5, raw_tokens), draws(5)
        for (given, learned), text in zip(parts(case, tokens, words), tokens, strict=True):
            assert given[: len(mode)] == mode
            kept = [t for t in given[len(mode) :] if t >= FIRST_TOKEN and t not in SENTINELS]
            noise = [t for t in learned if t >= FIRST_TOKEN and t not in SENTINELS]
            assert (kept, noise) == (sorted(kept), sorted(noise))
            lost = sorted(set(text.tolist()) - set(kept + noise))
            assert len(kept) + len(noise) + len(lost) == raw_tokens
            if case.objective.joins_with_eos:
                assert len(lost) == (case.config.row_end_eos and raw_tokens == case.room)
            elif lost:
                assert len(lost) <= len(mode)
                assert min(lost) > max(kept)  # the end of the inputs
            if "prefix" in case.name:
                assert kept[-1:] < noise[:1]


@every_class(64, 250)
def test_eos_and_sentinels(case: Case) -> None:
    """Catches a part without its EOS or with two, and sentinels out of order or of another number."""
    for raw_tokens in raw_lengths(case.raw_tokens):
        for given, learned in parts(case, numbered(4, raw_tokens), draws(4)):
            if case.objective.joins_with_eos:
                assert given == []
                assert learned.count(EOS) == case.config.row_end_eos
            else:
                assert (given.count(EOS), learned.count(EOS)) == (1, 1)
                assert given[-1] == EOS
            assert learned[-1] == EOS or case.config == DataConfig()
            in_inputs, in_targets = ([t for t in part if t in SENTINELS] for part in (given, learned))
            for found in (in_inputs, in_targets):
                assert found == [FIRST_SENTINEL - i for i in range(len(found))]
            if case.name == "span_corruption" and raw_tokens > 1:
                spans = ul2.noise_counts(raw_tokens, 3.0, 0.15)[1]
                assert len(in_inputs) == len(in_targets) == spans


@every_class(250)
def test_an_example_does_not_depend_on_the_others(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches bytes that change with what else is built at once, or where a group ends."""
    tokens, words = numbered(23, case.raw_tokens), draws(23)
    whole = parts(case, tokens, words)
    assert len({str(pair) for pair in whole}) == 23
    for number in (0, 11, 22):
        assert parts(case, tokens[[number]], words[[number]]) == [whole[number]]
    assert parts(case, tokens[::-1], words[::-1]) == whole[::-1]
    monkeypatch.setattr(objectives, "_GROUP_TOKENS", 5 * case.raw_tokens)
    assert parts(case, tokens, words) == whole


def ul2_cases(room: int, config: DataConfig) -> list[Case]:
    objective = objective_of("ul2", room, config)
    return [Case(objective, index, config, room) for index in range(len(objective.classes))]


def test_the_words_decide() -> None:
    """Catches one mask for all examples, or one that depends on the tokens."""
    for case in ul2_cases(2048, DataConfig()):
        same = np.tile(numbered(1, case.raw_tokens), (40, 1))
        assert len({str(pair) for pair in parts(case, same, draws(40))}) > 35
        assert len({str(pair) for pair in parts(case, same[:3], np.repeat(draws(1), 3))}) == 1


def test_the_same_bytes_everywhere() -> None:
    """Catches examples that change with the machine or the version of numpy, which no run would survive."""
    # splitmix64 from seed 0 begins with 0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4.
    assert random_words(np.zeros(1, np.uint64), 3).tolist() == [[0x7B1DCDAF, 0xE220A839, 0xA1B965F4]]
    digest = hashlib.sha256()
    for case in ul2_cases(2048, DataConfig()):
        for pair in parts(case, numbered(3, case.raw_tokens), draws(3)):
            digest.update(str(pair).encode())
    assert digest.hexdigest() == "cca62f276883f7b9c974c2c00b0f7aede93dc266ded1d67e49f77844add9d3a8"


def assert_all_alike(found: list, ways: int) -> None:
    """Chi-square: every one of the `ways` outcomes turns up equally often (1 in 100,000 fails by chance)."""
    counts = Counter(found)
    assert len(counts) == ways
    expected = len(found) / ways
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    degrees = ways - 1
    # Wilson and Hilferty's normal approximation at 4.3 standard deviations.
    assert chi_square < degrees * (1 - 2 / (9 * degrees) + 4.3 * (2 / (9 * degrees)) ** 0.5) ** 3


def ways_to_cut(length: int, noise: int, spans: int) -> set[tuple[int, ...]]:
    def cuts(total: int, offset: int) -> list[tuple[int, ...]]:
        places = itertools.combinations(range(1, total), spans - 1)
        return [tuple(offset + end for end in (*inner, total)) for inner in places]

    kept = length - noise
    return {(*a, *b) for a in cuts(kept, 0) for b in cuts(noise, kept)}


@pytest.mark.parametrize("word_values", [2**32, 4, 2])
@pytest.mark.parametrize("counts", [(8, 4, 2), (10, 5, 3), (9, 3, 3), (7, 6, 1), (12, 3, 2), (5, 2, 2)])
def test_all_masks_are_equally_likely(
    counts: tuple[int, int, int], word_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a bias for early or late cuts, kept runs that follow the noise runs, and one from equal words.

    With few different words nearly every draw has equal ones, and must be drawn anew.
    """
    monkeypatch.setattr(ul2, "random_words", lambda *seeds: random_words(*seeds) & np.uint32(word_values - 1))
    ways = ways_to_cut(*counts)
    ends = ul2.span_ends(*counts, draws(max(4000, 200 * len(ways))))
    found = [tuple(row) for row in ends.tolist()]
    assert set(found) == ways
    if len(ways) > 1:
        assert_all_alike(found, len(ways))


def test_prefixes_are_equally_likely() -> None:
    """Catches a prefix of no tokens or of all, and one that favours some lengths."""
    assert_all_alike(ul2.prefix_lengths(20, draws(20_000)).tolist(), 19)
    assert set(ul2.prefix_lengths(20, draws(20_000)).tolist()) == set(range(1, 20))
    assert ul2.prefix_lengths(1, draws(3)).tolist() == [0, 0, 0]


def test_mode_strings_cost_the_end_of_the_inputs_only() -> None:
    """Catches mode strings that change the text an example reads, or that stay when switched off."""
    configs = DataConfig(mode_strings=False), DataConfig()
    for plain, named in zip(*(ul2_cases(250, config) for config in configs), strict=True):
        assert (plain.name, plain.raw_tokens) == (named.name, named.raw_tokens)
        assert len(named.mode) == 6
        tokens, words = numbered(6, plain.raw_tokens), draws(6)
        pairs = zip(parts(plain, tokens, words), parts(named, tokens, words), strict=True)
        for (given, learned), (named_given, named_learned) in pairs:
            assert named_learned == learned
            assert named_given == [*(named.mode + given[:-1])[: 250 // 2 - 1], EOS]


def test_denoisers_of_the_configuration() -> None:
    """Catches Table 2 used whatever was asked for, rates that don't sum to one, two classes of one name."""
    unused = DenoiserConfig(mode="[Z] ", mean_span=2.0, density=0.3, rate=0)
    config = DataConfig(denoisers=[*OTHER_DENOISERS, unused])
    objective = objective_of("ul2", 250, config)
    assert [c.name for c in objective.classes] == [
        "[A] 1.0 x 0.25", "1000000.0 x 0.4", "[longer mode] 4.0 x 0.7", "[B] 20.0 x 0.99", "[B] prefix",
        "[B] prefix #2",
    ]  # fmt: skip
    assert [c.rate for c in objective.classes] == pytest.approx([r / 8 for r in (3, 1, 0.5, 0.5, 2, 1)])
    for name in ("causal_lm", "prefix_lm", "span_corruption"):
        (only,) = objective_of(name, 250, config).classes
        assert (only.name, only.rate) == (name, 1.0)
        assert 249 <= only.row_tokens <= 250
    with pytest.raises(DataError, match=r"data\.denoisers sum to 0"):
        objective_of("ul2", 250, DataConfig(denoisers=[unused]))


@pytest.mark.parametrize("density", [0.6, 0.9, 0.999999])
def test_more_noise_than_text_still_fits(density: float) -> None:
    """Catches targets longer than their half, which would lose the text's end, and sizing without end."""
    denoiser = DenoiserConfig(mode="", mean_span=10.0, density=density, rate=1.0)
    (case,) = ul2_cases(2048, DataConfig(denoisers=[denoiser]))
    noise, spans = ul2.noise_counts(case.raw_tokens, 10.0, density)
    assert 900 < noise + spans + 1 <= 1024
    inputs, targets = case.objective.sizes(0, case.raw_tokens, draws(1))
    assert (inputs.item(), targets.item()) == (case.raw_tokens - noise + spans + 1, noise + spans + 1)


@pytest.mark.parametrize(
    ("name", "example_tokens", "message"),
    [
        ("ul2", 4096, "=4096 needs 512 sentinels for one example; the tokenizer has 300"),
        ("ul2", 26, "=26 is too short for UL2: its mode strings take 6 tokens; at least 28 is allowed"),
        ("span_corruption", 16384, "sentinels for one example; the tokenizer has 300"),
        ("causal_lm", 4, "=4 is too short; at least 8 is allowed"),
        ("prefix_lm", 7, "=7 is too short; at least 8 is allowed"),
    ],
)
def test_lengths_the_objective_cannot_use_are_refused(name: str, example_tokens: int, message: str) -> None:
    """Catches sentinels running into ordinary pieces, examples of mode strings alone, and the wrong key."""
    for key, config in (
        ("train.seq_len", DataConfig()),
        ("data.example_tokens", DataConfig(example_tokens=example_tokens)),
    ):
        with pytest.raises(DataError, match=re.escape(message)) as raised:
            objective_of(name, example_tokens, config)
        assert str(raised.value).startswith(f"{key}={example_tokens} ")
        assert "\n" not in str(raised.value)


def test_the_shortest_lengths_work() -> None:
    """Catches an objective that is refused or breaks at the shortest length its own message allows."""
    for name, shortest in (("ul2", 28), ("prefix_lm", 8), ("span_corruption", 8), ("causal_lm", 8)):
        objective = objective_of(name, shortest, DataConfig())
        for index, own in enumerate(objective.classes):
            every_prefix = np.arange(own.raw_tokens, dtype=np.uint64)
            assert (
                np.add(*objective.sizes(index, own.raw_tokens, every_prefix)).max()
                == own.row_tokens
                <= shortest
            )
            for raw_tokens in range(1, own.raw_tokens + 1):
                case = Case(objective, index, DataConfig(), shortest)
                assert len(parts(case, numbered(3, raw_tokens), draws(3))) == 3
