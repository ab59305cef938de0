"""From raw text to shards: what is stored, what is held back, the cache, and what a user did wrong."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from openmoe.data.config import DataConfig, TokenizerConfig
from openmoe.data.embedded import NAMES, embedded_sources
from openmoe.data.errors import DataError
from openmoe.data.held_back import split_documents
from openmoe.data.prepare import PreparedData, prepare
from openmoe.data.raw import folder_sources

from .conftest import TOKENIZER, made_up_documents, write_source


def settings(root: Path, cache: Path, **changes: object) -> DataConfig:
    values = {"root": str(root), "cache_dir": str(cache), "tokenizer": TOKENIZER} | changes
    return DataConfig(**values)  # type: ignore[arg-type]


def documents_of(prepared: PreparedData, source: str, split: str) -> list[str]:
    return [
        prepared.tokenizer.decode(shard.map_tokens()[a:b])
        for part in prepared.sources[source].splits[split]  # type: ignore[index]
        for shard in part
        for a, b in pairwise(shard.map_offsets())
    ]


def test_every_document_is_stored_once(prepared: PreparedData, corpus: Path) -> None:
    """Catches lost, doubled, reordered or altered documents, and one that is in both splits."""
    for name in ("short", "middle", "long"):
        lines = (corpus / name / "part.jsonl").read_text().splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        train, valid = (documents_of(prepared, name, split) for split in ("train", "valid"))
        assert sorted(train + valid) == sorted(texts)
        assert [text for text in texts if text in set(train)] == train
        assert valid


def test_the_second_time_nothing_is_done(config: DataConfig, prepared: PreparedData) -> None:
    """Catches a cache that is never hit: the files must be the very same ones, untouched."""
    assert config.cache_dir is not None
    files = {p: p.stat().st_mtime_ns for p in Path(config.cache_dir).rglob("*") if p.is_file()}
    again = prepare(config)
    assert {p: p.stat().st_mtime_ns for p in Path(config.cache_dir).rglob("*") if p.is_file()} == files
    assert again.fingerprint == prepared.fingerprint


def test_changed_content_is_prepared_again(tmp_path: Path) -> None:
    """Catches a cache keyed by names, sizes and times: here only one letter changes."""
    import os

    root = tmp_path / "root"
    write_source(root / "a", [f"some text here {i}" for i in range(40)])
    first = prepare(settings(root, tmp_path / "cache"))
    path = root / "a" / "part.jsonl"
    times = path.stat()
    path.write_text(path.read_text().replace("some text here 7", "some tent here 7"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    second = prepare(settings(root, tmp_path / "cache"))
    assert first.fingerprint["source a"] != second.fingerprint["source a"]


def test_the_fingerprint_knows_the_data_not_the_place(tmp_path: Path) -> None:
    """Catches paths or times in the fingerprint: a checkpoint could not move to another machine."""
    prints = []
    for place in ("one", "two"):
        write_source(tmp_path / place / "a", made_up_documents(5, 30, 30))
        prints.append(prepare(settings(tmp_path / place, tmp_path / f"cache-{place}")).fingerprint)
    assert prints[0] == prints[1]


def test_a_given_split_is_kept(tmp_path: Path) -> None:
    """Catches training on the valid/ folder, or holding back from train/ where valid/ exists."""
    write_source(tmp_path / "a" / "train", [f"train {i}" for i in range(50)])
    write_source(tmp_path / "a" / "valid", [f"valid {i}" for i in range(5)])
    (raw,) = folder_sources(str(tmp_path), None)
    assert list(split_documents(raw.documents(), 0.5)) == [("train", f"train {i}") for i in range(50)] + [
        ("valid", f"valid {i}") for i in range(5)
    ]


def test_held_back_documents_stay_when_others_are_added(tmp_path: Path) -> None:
    """Catches a split by position: adding a file would move held-back text into training."""
    texts = made_up_documents(6, 300, 12)
    splits = []
    for place, part in (("few", texts[:270]), ("more", texts)):
        write_source(tmp_path / place / "a", part)
        (raw,) = folder_sources(str(tmp_path / place), None)
        splits.append({text for split, text in split_documents(raw.documents(), 0.2) if split == "valid"})
    assert splits[0] <= splits[1]
    assert 0.1 < len(splits[1]) / 300 < 0.3


def test_the_tokenizer_sees_a_sample_of_the_training_text(tmp_path: Path) -> None:
    """Catches one hash for both choices: a sample smaller than the held-back share would be empty."""
    write_source(tmp_path / "root" / "a", made_up_documents(8, 200, 60))
    size = (tmp_path / "root" / "a" / "part.jsonl").stat().st_size
    sample = TokenizerConfig(vocab_size=512, sample_bytes_per_source=size // 4)
    prepared = prepare(
        settings(tmp_path / "root", tmp_path / "cache", tokenizer=sample, validation_fraction=0.5)
    )
    assert prepared.tokenizer.size > 556


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_documents_leave_text_on_both_sides(tmp_path: Path, count: int) -> None:
    """Catches a source without held-back or without training text where the hashes happen to agree."""
    for trial in range(10):
        root = tmp_path / str(trial)
        write_source(root / "a", [f"doc {trial} {i}\nsecond line\nthird line" for i in range(count)])
        (raw,) = folder_sources(str(root), None)
        assert {split for split, _ in split_documents(raw.documents(), 0.5)} == {"train", "valid"}


SINGLE = {
    "title": "Title\n" + "word " * 3000,
    "lines": "a line\n" * 3000,
    "far": "x" * 90 + "\n" + "y" * 909,
    "short": "ab",
}


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("fraction", [0.05, 0.5])
def test_a_single_document_is_cut_near_its_end(name: str, fraction: float) -> None:
    """Catches a line end far from the cut sending almost all of a document to the held-back side."""
    text = SINGLE[name]
    (_, train), (split, valid) = split_documents(iter([(None, text)]), fraction)
    assert train + valid == text
    assert split == "valid"
    assert 0 < len(valid) <= max(1, 2 * fraction * len(text))
    assert len(train) >= len(text) / 4
    assert name != "lines" or train.endswith("\n")


@pytest.mark.parametrize(("twins", "others"), [(2, 0), (256, 40), (300, 0), (255, 1), (3, 1)])
def test_copies_do_not_vanish_into_validation(twins: int, others: int) -> None:
    """Catches all copies held back where a source begins with copies of one document."""
    fraction, trials = 0.01, 30
    for trial in range(trials):
        texts = [f"twin {trial}\n" * 20] * twins + [f"{trial} other {i}\n" * 20 for i in range(others)]
        found = list(split_documents(iter([(None, text) for text in texts]), fraction))
        assert sorted("".join(text for _, text in found)) == sorted("".join(texts))
        held_back = sum(split == "valid" for split, _ in found)
        assert 1 <= held_back <= max(others, 1)


def test_all_of_few_documents_below_the_fraction() -> None:
    """Catches copies held back rather than trained on where every document's hash is low."""
    texts = ["twin"] * 5 + ["other"]
    for fraction in (1e-9, 1 - 1e-9):
        found = split_documents(iter([(None, text) for text in texts]), fraction)
        assert [split for split, _ in found] == ["train"] * 5 + ["valid"]


def test_embedded_sources_are_what_they_say(tmp_path: Path) -> None:
    """Catches docstrings left in the code, tests and packages of others, or an order that changes."""
    raw = {source.name: source for source in embedded_sources(None, tmp_path)}
    assert tuple(raw) == NAMES
    manual, docstrings, code = (
        [text for _, text in raw[name].documents()] for name in ("manual", "docstrings", "code")
    )
    assert sum(map(len, manual)) > 300_000
    assert sum(map(len, docstrings)) > 1_000_000
    assert sum(map(len, code)) > 4_000_000
    heap = "Heap queue algorithm (a.k.a. priority queue)."
    assert any(heap in text for text in docstrings)
    assert not any(heap in text for text in code)
    assert any("def heappush(heap, item):" in text for text in code)


PREPARE_AND_REPORT = """
import sys
from openmoe.data.config import DataConfig, TokenizerConfig
from openmoe.data.prepare import prepare

tokenizer = TokenizerConfig(vocab_size=512, sample_bytes_per_source=50_000)
print(prepare(DataConfig(root=sys.argv[1], cache_dir=sys.argv[2], tokenizer=tokenizer)).fingerprint)
"""


def test_processes_may_prepare_at_once(tmp_path: Path, corpus: Path) -> None:
    """Catches half-written files being read, and a rename that fails for the second process."""
    command = [sys.executable, "-c", PREPARE_AND_REPORT, str(corpus), str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    prints = {process.communicate(timeout=100)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(prints) == 1
    assert not list(tmp_path.glob(".building-*"))


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    """Catches a partial result under the final name, which the next run would trust."""
    root = tmp_path / "root"
    write_source(root / "a", [f"fine text number {i}" for i in range(300)])
    with (root / "a" / "part.jsonl").open("ab") as file:
        file.write(b'{"text": "\xff"}\n')
    with pytest.raises(DataError):
        prepare(settings(root, tmp_path / "cache"))
    assert not list((tmp_path / "cache").iterdir())


def test_damaged_shards_are_noticed(tmp_path: Path) -> None:
    """Catches a shard cut short being read as if it were whole."""
    root, cache = tmp_path / "root", tmp_path / "cache"
    write_source(root / "a", made_up_documents(9, 30, 30))
    prepare(settings(root, cache))
    (tokens,) = cache.glob("tokens-*/a/part_0000/00000_train_tokens.bin")
    tokens.write_bytes(tokens.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"is cut short: .* delete .*tokens-\w+ and prepare the data again"):
        prepare(settings(root, cache))


def test_an_empty_source_is_named_with_a_given_tokenizer(prepared: PreparedData, tmp_path: Path) -> None:
    """Catches an empty source that only the tokenizer's training would have noticed."""
    (tmp_path / "t.model").write_bytes(prepared.tokenizer.model)
    write_source(tmp_path / "root" / "a", [""])
    config = settings(
        tmp_path / "root", tmp_path / "cache", tokenizer=TokenizerConfig(path=str(tmp_path / "t.model"))
    )
    with pytest.raises(DataError, match="source 'a' is empty"):
        prepare(config)


def test_only_the_named_sources_are_prepared(corpus: Path, tmp_path: Path) -> None:
    """Catches a neighbouring folder that is no source (tokenizers/, eval/) stopping the run."""
    write_source(tmp_path / "root" / "a", made_up_documents(5, 30, 30))
    (tmp_path / "root" / "notes").mkdir()
    prepared = prepare(settings(tmp_path / "root", tmp_path / "cache"), sources=["a"])
    assert list(prepared.sources) == ["a"]
    with pytest.raises(DataError, match=r"'b' is not in .*there are a, notes"):
        prepare(settings(tmp_path / "root", tmp_path / "cache"), sources=["a", "b"])
    with pytest.raises(DataError, match="'b' is not embedded; there are code, docstrings, manual"):
        prepare(DataConfig(cache_dir=str(tmp_path / "cache")), sources=["b"])


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(
    config: DataConfig, prepared: PreparedData
) -> None:
    """Catches ids beyond the embedding: an index error, or garbage, in the middle of training."""
    prepare(config, vocab_limit=prepared.tokenizer.size)
    with pytest.raises(DataError, match=f"{prepared.tokenizer.size} ids.*only 600 rows"):
        prepare(config, vocab_limit=600)


def test_unusable_paths_are_configuration_errors(tmp_path: Path) -> None:
    """Catches OSErrors for paths a user mistyped."""
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cache_dir"):
        prepare(DataConfig(cache_dir=str(tmp_path / "file" / "x")))
    with pytest.raises(DataError, match=r"data\.root"):
        prepare(DataConfig(root="x" * 5000))
