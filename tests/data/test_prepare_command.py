"""The command that prepares a folder: the same bytes whatever happens, and what a user did wrong."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openmoe.data import pool
from openmoe.data.build import UNFINISHED
from openmoe.data.config import DataConfig, TokenizerConfig
from openmoe.data.encode import Encoder, EncodeSettings
from openmoe.data.errors import DataError
from openmoe.data.pool import WorkerError
from openmoe.data.prepare import PreparedData, prepare
from openmoe.data.prepare_command import prepare_folder
from openmoe.data.prepare_config import PrepareConfig
from openmoe.data.progress import PrepareProgress
from openmoe.data.raw import dataset_source, file_hashes, folder_sources
from openmoe.data.readers import DatasetName, FileRange
from openmoe.data.shards import SPLITS, ShardWriter, open_shard, shard_files
from openmoe.data.tasks import Piece, Task, cut_tasks
from openmoe.data.tokenizer import load_tokenizer

from .conftest import made_up_documents, write_source

SHARD_BYTES = 4000


@pytest.fixture(scope="module")
def model(prepared: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "t.model"
    path.write_bytes(prepared.tokenizer.model)
    return path


def page(root: Path, output: Path, model: Path | None = None, **changes: Any) -> PrepareConfig:
    data = {"input": str(root), "output": str(output), "shard_bytes": SHARD_BYTES} | changes
    tokenizer = {"path": None if model is None else str(model), "vocab_size": 512}
    return PrepareConfig.model_validate({"data": data, "tokenizer": tokenizer})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def documents_of(output: Path, source: str, split: str) -> list[list[str]]:
    """Documents of each part."""
    data = prepare(DataConfig(root=str(output)))
    return [
        [
            data.tokenizer.decode(shard.map_tokens()[a:b])
            for shard in part
            for a, b in pairwise(shard.map_offsets())
        ]
        for part in data.sources[source].splits[split]  # type: ignore[index]
    ]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source cut into many shards, one of small files, and one that is split already."""
    root = tmp_path_factory.mktemp("raw")
    write_source(root / "big", made_up_documents(1, 400, 60))
    for number, text in enumerate(made_up_documents(2, 30, 40)):
        (root / "small").mkdir(exist_ok=True)
        (root / "small" / f"{number:03}.txt").write_text(text)
    write_source(root / "split" / "train", made_up_documents(3, 40, 40))
    write_source(root / "split" / "valid", made_up_documents(4, 5, 40))
    return root


@pytest.fixture(scope="module")
def undisturbed(raw: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    prepare_folder(page(raw, output, model))
    return output


def test_training_reads_what_was_prepared(raw: Path, undisturbed: Path) -> None:
    """Catches documents lost, doubled, reordered or put on the wrong side on the way through shards."""
    for name, files in (("big", ["part.jsonl"]), ("split", ["train/part.jsonl", "valid/part.jsonl"])):
        lines = [line for file in files for line in (raw / name / file).read_text().splitlines()]
        texts = [json.loads(line)["text"] for line in lines]
        (train,), (valid,) = (documents_of(undisturbed, name, split) for split in SPLITS)
        assert sorted(train + valid) == sorted(texts)
        assert [text for text in texts if text in set(train)] == train
        assert 0 < len(valid) < len(train)
    assert documents_of(undisturbed, "split", "valid") == [made_up_documents(4, 5, 40)]
    data = prepare(DataConfig(root=str(undisturbed)), sources=["big"])
    assert list(data.sources) == ["big"]
    shard = data.sources["big"].splits["train"][0][0]
    assert len(data.sources["big"].splits["train"][0]) > 10
    assert type(shard.map_tokens()) is np.ndarray
    assert shard.map_tokens().dtype == np.int32
    assert shard.map_offsets().dtype == np.int64
    assert not shard.map_tokens().flags.writeable


@pytest.mark.parametrize("documents", [1, 1023, 1024, 1025, 5000])
def test_blocks_count_the_documents(tmp_path: Path, documents: int) -> None:
    """Catches a block that begins a document early or late, or that leaves out the last documents."""
    lengths = np.random.default_rng(0).integers(1, 9, documents)
    lengths = np.insert(lengths, documents // 2, 0)  # an empty one is left out
    files = shard_files(tmp_path, 0, "train")
    writer = ShardWriter(files)
    for batch in np.array_split(lengths, 3):
        writer.add([np.ones(length, np.int32) for length in batch])
    shard = open_shard(files, writer.close())
    kept = lengths[lengths > 0]
    parts = [kept[start : start + 1024] for start in range(0, len(kept), 1024)]
    assert shard.map_blocks().tolist() == [[part.sum(), part.max()] for part in parts]
    assert shard.map_blocks().dtype == np.int64
    assert not shard.map_blocks().flags.writeable
    assert shard.documents == len(kept)


def test_the_manifest_counts_what_is_there(undisturbed: Path) -> None:
    """Catches sums that leave out a part, a shard or a split, and inputs that are not listed."""
    manifest = json.loads((undisturbed / "manifest.json").read_text())
    data = prepare(DataConfig(root=str(undisturbed)))
    assert manifest["tokenizer"] == {"sha256": data.tokenizer.sha256, "size": data.tokenizer.size}
    for name, source in data.sources.items():
        for split in SPLITS:
            shards = [shard for part in source.splits[split] for shard in part]
            assert manifest["sources"][name][split] == {
                "documents": sum(shard.documents for shard in shards),
                "tokens": sum(shard.tokens for shard in shards),
            }
    (part,) = manifest["sources"]["small"]["parts"]
    assert [file["name"] for file in part["inputs"]] == [f"small/{number:03}.txt" for number in range(30)]
    assert [each[0] for shard in part["shards"] for each in shard["raw"]] == [
        f"small/{number:03}.txt" for number in range(30)
    ]


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_workers_changes_no_byte(
    raw: Path, model: Path, undisturbed: Path, tmp_path: Path, workers: int
) -> None:
    """Catches shards in the order they were finished, and anything else of a run in the files."""
    prepare_folder(page(raw, tmp_path / "out", model, workers=workers))
    assert contents(tmp_path / "out") == contents(undisturbed)


COMMAND = """
import sys
from openmoe.data.prepare_command import prepare_folder
from openmoe.data.prepare_config import PrepareConfig
prepare_folder(PrepareConfig.model_validate_json(sys.argv[1]))
"""


def start(config: PrepareConfig, command: str = COMMAND) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", command, config.model_dump_json()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def receipts(output: Path) -> set[Path]:
    return {path for path in output.glob(f"{UNFINISHED}/*/*/*.json") if not path.name.startswith(".")}


@pytest.mark.slow
def test_a_killed_run_is_gone_on_with(raw: Path, model: Path, tmp_path: Path) -> None:
    """Catches work lost or doubled after kill -9, stale files, and workers that outlive their run."""
    small = {"shard_bytes": 500}  # so many that no kill comes too late
    prepare_folder(page(raw, tmp_path / "whole", model, **small))
    total = len(list((tmp_path / "whole").rglob("*_train_tokens.bin")))
    output = tmp_path / "out"
    draw = random.Random(0)
    done: dict[Path, int] = {}
    for workers, wanted in ((1, 0), (2, 1), (3, total // 3), (1, total // 2)):
        process = start(page(raw, output, model, workers=workers, **small))
        while process.poll() is None and len(receipts(output)) < wanted:
            time.sleep(0.002)
        time.sleep(draw.random() * (0.02 if wanted else 0.3))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=100)
        assert process.returncode == -signal.SIGKILL
        assert not (output / "manifest.json").exists()
        now = {path: path.stat().st_mtime_ns for path in receipts(output)}
        assert now.items() >= done.items()
        done = now
    prepare_folder(page(raw, output, model, workers=2, **small))
    assert contents(output) == contents(tmp_path / "whole")


def test_a_kill_around_the_end_loses_nothing(
    raw: Path, model: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an order of steps that can't be interrupted just before or after a file is put in place."""
    import openmoe.data.shards as shards

    class Killed(BaseException):
        pass

    replace, calls = os.replace, 0
    output = tmp_path / "out"

    def replace_until(last: int, before: bool) -> Any:
        def run(source: Path, target: Path) -> None:
            nonlocal calls
            calls += 1
            if calls == last and before:
                raise Killed
            replace(source, target)
            if calls == last:
                raise Killed

        return run

    for last, before in ((1, True), (2, True), (3, False), (5, True), (4, False), (50, True)):
        calls = 0
        with monkeypatch.context() as patch:
            patch.setattr(shards.os, "replace", replace_until(last, before))
            with pytest.raises(Killed):
                prepare_folder(page(raw, output, model))
    for before in (True, False):  # the manifest is put in place last
        with monkeypatch.context() as patch:
            patch.setattr(
                "openmoe.data.build.write_manifest", _raise(Killed) if before else _write_and_raise(Killed)
            )
            with pytest.raises(Killed):
                prepare_folder(page(raw, output, model))
        assert (output / "manifest.json").exists() != before
    prepare_folder(page(raw, output, model))
    assert contents(output) == contents(undisturbed)


def _raise(error: type[BaseException]) -> Any:
    def run(*_: object) -> None:
        raise error

    return run


def _write_and_raise(error: type[BaseException]) -> Any:
    from openmoe.data.shards import write_manifest

    def run(folder: Path, values: dict[str, Any]) -> None:
        write_manifest(folder, values)
        raise error

    return run


def test_the_trained_tokenizer_survives_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a second training, whose tokenizer need not be the one that the finished shards have."""
    root = tmp_path / "root"
    write_source(root / "a", made_up_documents(1, 100, 40))
    prepare_folder(page(root, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr("openmoe.data.build.write_manifest", _raise(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare_folder(page(root, tmp_path / "out"))
    monkeypatch.setattr("openmoe.data.prepare_command.train_on", _raise(AssertionError))
    prepare_folder(page(root, tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_new_files_become_a_part(raw: Path, model: Path, tmp_path: Path) -> None:
    """Catches old shards written anew or reordered, held-back text that moves, and new text that is lost."""
    root, output = tmp_path / "root", tmp_path / "out"
    old, new = made_up_documents(1, 100, 40), made_up_documents(9, 50, 40)
    write_source(root / "a", old, "b.jsonl")
    write_source(root / "other", made_up_documents(8, 50, 40))
    prepare_folder(page(root, output, model))
    before = contents(output)
    first = prepare(DataConfig(root=str(output)))
    held_back = documents_of(output, "a", "valid")

    prepare_folder(page(root, output, model, workers=3))  # nothing to do
    assert contents(output) == before

    write_source(root / "a", new, "a.jsonl")
    write_source(root / "other", ["one more\nof two lines"], "x.jsonl")
    write_source(root / "third", made_up_documents(7, 50, 40))
    prepare_folder(page(root, output))  # the tokenizer is the folder's own
    after = contents(output)
    assert {name: after[name] for name in before if name != "manifest.json"} == {
        name: content for name, content in before.items() if name != "manifest.json"
    }
    second = prepare(DataConfig(root=str(output)))
    assert set(second.sources) == {"a", "other", "third"}
    assert second.sources["a"].sha256[0] == first.sources["a"].sha256[0]
    assert len(second.sources["a"].sha256) == len(second.sources["a"].splits["valid"]) == 2
    assert second.sources["other"].sha256[:1] == first.sources["other"].sha256
    added = [documents_of(output, "other", split)[1] for split in SPLITS]
    assert sorted(added) == [[], ["one more\nof two lines"]]  # by its hash alone, and not cut
    parts = [documents_of(output, "a", split) for split in SPLITS]
    assert parts[1][0] == held_back[0]
    assert sorted(parts[0][1] + parts[1][1]) == sorted(new)


def test_text_of_another_run_is_not_taken_twice(model: Path, tmp_path: Path) -> None:
    """Catches an overlap of sources that come into one output one after the other."""
    root, output = tmp_path / "root", tmp_path / "out"
    for name in ("a", "c"):
        write_source(root / name, made_up_documents(1, 50, 40), f"{name}.jsonl")
        (root / name / "empty.txt").write_text("")
    write_source(root / "c", made_up_documents(2, 50, 40), "other.jsonl")
    prepare_folder(page(root, output, model, sources=["a"]))
    with pytest.raises(DataError, match=r"c/c\.jsonl has the same content as a/a\.jsonl in data\.output"):
        prepare_folder(page(root, output, model, sources=["c"]))
    (root / "c" / "c.jsonl").unlink()
    prepare_folder(page(root, output, model, sources=["c"]))
    (root / "a" / "copy.jsonl").write_bytes((root / "a" / "a.jsonl").read_bytes())  # its own, as in one run
    prepare_folder(page(root, output, model))


def test_changed_input_is_refused(model: Path, tmp_path: Path) -> None:
    """Catches old text changed or taken away under a folder that still holds its tokens."""
    root, output = tmp_path / "root", tmp_path / "out"
    for name in ("a", "b"):
        write_source(root / name, made_up_documents(ord(name), 50, 40), "x.jsonl")
    write_source(root / "a", made_up_documents(3, 50, 40), "y.jsonl")
    prepare_folder(page(root, output, model))
    before = contents(output)

    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(DataError, match=message) as error:
            prepare_folder(page(root, output, changes.pop("model", model), **changes))
        assert "\n" not in str(error.value)
        assert contents(output) == before

    path = root / "a" / "x.jsonl"
    content, times = path.read_bytes(), path.stat()
    path.write_bytes(content[:-3] + b"X" + content[-2:])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    refused("a/x.jsonl has changed since it was prepared")
    path.rename(root / "a" / "z.jsonl")
    refused("a/x.jsonl is gone since it was prepared")
    (root / "a" / "z.jsonl").unlink()
    path.write_bytes(content)
    (root / "b").rename(tmp_path / "elsewhere")
    refused("source 'b' of data.output=.* is gone from data.input")
    prepare_folder(page(root, output, model, sources=["a"]))  # said so: it may be away
    (tmp_path / "elsewhere").rename(root / "b")
    refused("data.validation_fraction=0.1, .* was made with 0.05", validation_fraction=0.1)
    other = tmp_path / "other.model"
    config = TokenizerConfig(vocab_size=600, sample_bytes_per_source=10_000)
    prepare(DataConfig(root=str(root), cache_dir=str(tmp_path / "cache"), tokenizer=config))
    (trained,) = (tmp_path / "cache").glob("tokenizer-*/tokenizer.model")
    trained.rename(other)
    refused("tokenizer.path=.*other.model is another tokenizer than the one data.output", model=other)
    with pytest.raises(
        DataError, match=r"data\.tokenizer\.path=.* is another tokenizer than the one data\.root"
    ):
        prepare(DataConfig(root=str(output), tokenizer=TokenizerConfig(path=str(other))))
    prepare(DataConfig(root=str(output), tokenizer=TokenizerConfig(path=str(model))))


def test_a_corrupt_record_stops_and_its_cure_goes_on(model: Path, tmp_path: Path) -> None:
    """Catches finished shards thrown away at a corrupt record, or kept for a file that was mended."""
    root, output = tmp_path / "root", tmp_path / "out"
    texts = made_up_documents(1, 100, 40)
    write_source(root / "a", texts, "a.jsonl")
    write_source(root / "b", made_up_documents(2, 100, 40))
    good = (root / "b" / "part.jsonl").read_bytes()
    lines = good.splitlines(keepends=True)
    (root / "b" / "part.jsonl").write_bytes(b"".join([*lines[:70], b'{"text": "\xff"}\n', *lines[70:]]))
    for workers in (1, 2):
        with pytest.raises(DataError, match=r"b/part\.jsonl:71: not UTF-8"):
            prepare_folder(page(root, output, model, workers=workers))
    assert not (output / "manifest.json").exists()
    done = {path: path.stat().st_mtime_ns for path in receipts(output) if path.parts[-3] == "a"}
    assert len(done) > 3
    (root / "b" / "part.jsonl").write_bytes(good)
    shards = {path: path.stat().st_mtime_ns for path in (output / "a").rglob("*.bin")}
    prepare_folder(page(root, output, model))
    assert shards.items() <= {path: path.stat().st_mtime_ns for path in (output / "a").rglob("*.bin")}.items()
    prepare_folder(page(root, tmp_path / "fresh", model))
    assert contents(output) == contents(tmp_path / "fresh")


def test_an_edit_between_two_runs_is_noticed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches finished shards known by name, size and range: here one letter changes in between."""
    root = tmp_path / "root"
    write_source(root / "a", made_up_documents(1, 100, 40))
    with monkeypatch.context() as patch:
        patch.setattr("openmoe.data.build.write_manifest", _raise(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare_folder(page(root, tmp_path / "out", model))
    path = root / "a" / "part.jsonl"
    content, times = path.read_bytes(), path.stat()
    path.write_bytes(content[:20] + b"X" + content[21:])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    for output in ("out", "fresh"):
        prepare_folder(page(root, tmp_path / output, model))
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_corrupt_records_can_be_skipped(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches skipped records that nobody hears of, and good ones lost with them."""
    root = tmp_path / "root"
    texts = made_up_documents(1, 100, 40)
    records = [json.dumps({"text": text}).encode() for text in texts]
    records[3:3] = [b'{"text": ""}', b"{", b""]
    records[60:60] = [b'{"text": 1}']
    (root / "a").mkdir(parents=True)
    (root / "a" / "x.jsonl").write_bytes(b"\n".join(records) + b"\n")
    (root / "a" / "y.json.gz").write_bytes(b"")
    for workers in (1, 2):
        prepare_folder(page(root, tmp_path / f"out{workers}", model, workers=workers, on_corrupt="skip"))
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")
    assert "a: 1 files are not of a kind that is read, e.g." in capsys.readouterr().err
    prepare_folder(page(root, tmp_path / "out1", model, on_corrupt="skip"))
    listed = (tmp_path / "out1" / "a" / "part_0000" / "skipped.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in listed] == ["a/x.jsonl:5", "a/x.jsonl:61"]
    (train,), (valid,) = (documents_of(tmp_path / "out1", "a", split) for split in SPLITS)
    assert sorted(train + valid) == sorted(texts)
    printed = capsys.readouterr().out
    assert "a: 2 corrupt records skipped, listed in" in printed
    assert "1 empty documents left out" in printed
    # What was skipped before is not passed over where it is to stop the work.
    with monkeypatch.context() as patch:
        patch.setattr("openmoe.data.build.write_manifest", _raise(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare_folder(page(root, tmp_path / "out3", model, on_corrupt="skip"))
    with pytest.raises(DataError, match=r"x\.jsonl:5: not JSON"):
        prepare_folder(page(root, tmp_path / "out3", model))


def test_damage_is_noticed(raw: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Catches files that don't belong together being opened, and a flipped bit that verifying passes over."""
    tokens = "big/part_0000/00001_train_tokens.bin"
    offsets = "big/part_0000/00001_train_offsets.bin"
    whole = contents(undisturbed)
    blocks = "big/part_0000/00001_train_blocks.bin"
    another = whole["big/part_0000/00002_train_offsets.bin"]
    longer = np.frombuffer(whole[offsets], "<i8").copy()
    longer[-1] += 1
    flipped = bytearray(whole[tokens])
    flipped[9] ^= 1
    manifest = json.loads(whole["manifest.json"])
    damage = {
        "is cut short": (tokens, whole[tokens][:-4]),
        "is too long": (tokens, whole[tokens] + bytes(4)),
        "is missing": (tokens, None),
        "00001_train_offsets.bin is (cut short|too long|not the index of its shard)": (offsets, another),
        "is not the index of its shard": (offsets, longer.tobytes()),
        "is not the tokenizer that this folder|can't be read|not a": ("tokenizer.model", b"x"),
        "manifest.json can't be read": ("manifest.json", b"{"),
        "00001_train_blocks.bin has changed: sha256": (blocks, whole[blocks][:-1] + b"\1"),
        "00001_train_blocks.bin is cut short": (blocks, b""),
        "is not of openmoe tokens, version 2": (
            "manifest.json",
            json.dumps(manifest | {"version": 1}).encode(),
        ),
        "is damaged": ("manifest.json", json.dumps(manifest | {"sources": {"a": {"parts": [{}]}}}).encode()),
        "tokens.bin has changed: sha256": (tokens, bytes(flipped)),
    }
    shutil.copytree(undisturbed, tmp_path / "out")
    verify = PrepareConfig.model_validate({"data": {"output": str(tmp_path / "out"), "verify": True}})
    prepare_folder(verify)
    for message, (name, content) in damage.items():
        path = tmp_path / "out" / name
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        # Opening looks at sizes and ends; what a bit flipped within does is left to verifying.
        opens = partial(prepare, DataConfig(root=str(tmp_path / "out")))
        with pytest.raises(DataError, match=message) as error:
            (partial(prepare_folder, verify) if message.startswith("tokens.bin") else opens)()
        assert "\n" not in str(error.value)
        path.write_bytes(whole[name])
    prepare_folder(verify)


WAIT_IN_THE_MIDDLE = """
import openmoe.data.prepare_command as command
build = command.build
def wait_and_build(*arguments):
    print("in the middle", flush=True)
    sys.stdin.readline()
    return build(*arguments)
command.build = wait_and_build
"""


def test_a_second_process_is_sent_away(raw: Path, model: Path, tmp_path: Path) -> None:
    """Catches two processes writing one folder."""
    config = page(raw, tmp_path / "out", model)
    first = start(config, COMMAND.replace("prepare_folder(", WAIT_IN_THE_MIDDLE + "prepare_folder("))
    assert first.stdout is not None
    assert first.stdout.readline() == "in the middle\n"
    with pytest.raises(DataError, match=r"data\.output=.*: another process is preparing data there"):
        prepare_folder(config)
    first.communicate("\n", timeout=100)
    assert first.returncode == 0
    prepare_folder(config)


def test_a_lost_worker_is_one_line(raw: Path, model: Path, tmp_path: Path) -> None:
    """Catches a run that waits for ever for a worker that the system killed, and children left behind."""
    import multiprocessing

    from openmoe.data.pool import run_tasks

    tokenizer = load_tokenizer(str(model))
    settings = EncodeSettings("text", 0.05, "stop")
    (source, *_) = folder_sources(str(raw), ["big"])
    tasks = cut_tasks("big", 0, source.files, file_hashes([source]), SHARD_BYTES)
    finished = run_tasks(tasks, tokenizer, settings, tmp_path, 2, lambda task, share, tokens: None)
    next(finished)
    for child in multiprocessing.active_children():
        child.kill()
    with pytest.raises(WorkerError, match="a worker ended with exit code -9 at big/0/"):
        list(finished)
    assert not multiprocessing.active_children()


def test_mistakes_are_one_clear_line(raw: Path, model: Path, tmp_path: Path) -> None:
    """Catches tracebacks for what a user mistyped or mixed up."""
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").write_text("")
    write_source(tmp_path / "empty" / "a", ["", ""])
    write_source(tmp_path / "odd" / "my source", ["x"])
    write_source(tmp_path / "inside" / "a", ["x"])
    (tmp_path / "file").write_text("")
    cases: list[tuple[str, PrepareConfig]] = [
        ("data.output=.* holds other files", page(raw, tmp_path / "used", model)),
        ("data.output=.* can't be written", page(raw, tmp_path / "file" / "out", model)),
        ("source 'a' is empty: it has no training text", page(tmp_path / "empty", tmp_path / "o1", model)),
        ("source 'my source' can't be named so", page(tmp_path / "odd", tmp_path / "o2", model)),
        ("lies in data.input", page(tmp_path / "inside", tmp_path / "inside" / "out", model)),
        ("data.input=.*missing is not a folder", page(tmp_path / "missing", tmp_path / "o3", model)),
        ("'x' is not in data.input", page(raw, tmp_path / "o4", model, sources=["x"])),
        ("data.input=.*no sub-folder", page(tmp_path / "used", tmp_path / "o5", model)),
        ("tokenizer.path=.*no.model", page(raw, tmp_path / "o6", tmp_path / "no.model")),
    ]
    for message, config in cases:
        with pytest.raises(DataError, match=message) as error:
            prepare_folder(config)
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"manifest\.json can't be read"):
        prepare_folder(PrepareConfig.model_validate({"data": {"output": str(tmp_path), "verify": True}}))


def test_a_dataset_can_be_the_input(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches datasets that only work in one process, or that are read again when they are there."""
    texts = made_up_documents(5, 90, 40)
    for part in range(3):
        write_source(tmp_path / "hub", texts[part::3], f"train-{part}.jsonl")
    source = dataset_source(DatasetName(str(tmp_path / "hub"), None, "train"))
    # Without a network only a folder can stand for a name.
    monkeypatch.setattr("openmoe.data.prepare_command.dataset_source", lambda name: source)
    hand_out = pool._hand_out
    given: list[tuple[int | None, str]] = []

    def watched(worker: Any, waiting: Any) -> None:
        hand_out(worker, waiting)
        if worker.task is not None:
            given.append((worker.process.pid, worker.task.name))

    monkeypatch.setattr(pool, "_hand_out", watched)
    for workers in (1, 2):
        prepare_folder(page(Path("some/hub"), tmp_path / f"out{workers}", model, workers=workers))
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")
    assert sorted(task for _, task in given) == ["hub/0/0", "hub/0/1", "hub/0/2"]
    assert len({process for process, _ in given}) == 2
    (train,), (valid,) = (documents_of(tmp_path / "out1", "hub", split) for split in SPLITS)
    assert sorted(train + valid) == sorted(texts)
    before = contents(tmp_path / "out1")
    prepare_folder(page(Path("some/hub"), tmp_path / "out1", model))
    assert contents(tmp_path / "out1") == before


def test_progress_adds_up_all_workers(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a time left worked out from one worker's task, or from what an earlier run had done."""
    now = 0.0
    progress = PrepareProgress(3, 400.0, clock=lambda: now)
    tasks = [
        Task("a", 0, number, (Piece(FileRange(Path("x"), "x"), None, "", 100.0),)) for number in range(3)
    ]
    progress.finish(tasks[0], 1_000_000)
    progress.update(tasks[1], 0.5, 300_000)
    now = 100.0
    progress.update(tasks[2], 0.5, 700_000)
    assert progress.line() == " 50.0%, 1 of 3 shards, 2.0M tokens, 0.02M tokens/s, about 1 min 40 s left"
    assert capsys.readouterr().err == progress.line() + "\n"


def test_the_share_of_a_task_is_of_what_was_read(tmp_path: Path, prepared: PreparedData) -> None:
    """Catches a share that lags behind by a document: one long document would stand at nothing."""
    write_source(tmp_path / "raw" / "a", made_up_documents(1, 2, 2000))
    (source,) = folder_sources(str(tmp_path / "raw"), None)
    (task,) = cut_tasks("a", 0, source.files, file_hashes([source]), 10**9)
    shares: list[tuple[float, int]] = []
    encoder = Encoder(prepared.tokenizer, EncodeSettings("text", 0.1, "stop"), tmp_path / "out")
    receipt = encoder.run(task, lambda share, tokens: shares.append((share, tokens)))
    assert shares == [(1.0, sum(int(entry["tokens"]) for entry in receipt.shard.values()))]
