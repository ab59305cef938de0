"""Documents out of files: every format, every way to cut one, every way to be broken."""

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from openmoe.data.errors import DataError
from openmoe.data.raw import RawSource, dataset_source, file_hashes, folder_files, folder_sources
from openmoe.data.readers import DatasetName, FileRange, Reading, countable_units, read_documents
from openmoe.data.tasks import cut_tasks

TEXTS = [f"  text {i}\n\n\twith lines\r\n" + "é▁😀" * (i % 7) for i in range(60)] + [""]
JSONL = "".join(json.dumps({"n": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)).encode()


def write_ipc(path: Path, stream: bool, rows: int = 7) -> None:
    table = pa.table({"n": range(len(TEXTS)), "text": TEXTS})
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as file, make(file, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=rows):
            writer.write_batch(batch)


def zstd(content: bytes) -> bytes:
    return pa.Codec("zstd").compress(content, asbytes=True)


def write_all_formats(root: Path) -> None:
    """One source for each format, all with the same documents."""
    for name in ("jsonl", "gz", "zst", "members", "txt", "txtgz", "parquet", "file", "stream"):
        (root / name).mkdir(parents=True)
    (root / "jsonl" / "x.jsonl").write_bytes(JSONL)
    (root / "gz" / "x.jsonl.gz").write_bytes(gzip.compress(JSONL))
    (root / "zst" / "x.jsonl.zst").write_bytes(zstd(JSONL))
    half = JSONL.index(b"\n", len(JSONL) // 2) + 1
    (root / "members" / "a.jsonl.gz").write_bytes(gzip.compress(JSONL[:90]) + gzip.compress(JSONL[90:half]))
    (root / "members" / "b.jsonl.zst").write_bytes(zstd(JSONL[half:-30]) + zstd(JSONL[-30:]))
    for i, text in enumerate(TEXTS):
        (root / "txt" / f"{i:02}.txt").write_bytes(text.encode())
        (root / "txtgz" / f"{i:02}.txt.gz").write_bytes(gzip.compress(text.encode()))
    pyarrow.parquet.write_table(pa.table({"text": TEXTS}), root / "parquet" / "x.parquet", row_group_size=9)
    write_ipc(root / "file" / "x.arrow", stream=False)
    write_ipc(root / "stream" / "x.arrow", stream=True)


def read_in_tasks(source: RawSource, shard_bytes: int) -> tuple[list[str], int]:
    """All documents by way of tasks, and the number of tasks."""
    tasks = cut_tasks(source.name, 0, source.files, file_hashes([source]), shard_bytes)
    ranges = [piece.source for task in tasks for piece in task.pieces]
    return [text for each in ranges for text in read_documents(each, "text", Reading("stop"))], len(tasks)


def test_all_formats_give_the_same_documents(tmp_path: Path) -> None:
    """Catches a reader that strips, splits, joins or loses text, or leaves a second member unread."""
    write_all_formats(tmp_path)
    found = {
        source.name: [text for _, text in source.documents()]
        for source in folder_sources(str(tmp_path), None)
    }
    assert set(found) == {"jsonl", "gz", "zst", "members", "txt", "txtgz", "parquet", "file", "stream"}
    for name, texts in found.items():
        assert texts == TEXTS, name


@pytest.mark.parametrize("shard_bytes", [1, 37, 400, 1000, 10**9])
def test_any_cut_gives_every_document_once(tmp_path: Path, shard_bytes: int) -> None:
    """Catches a line lost or doubled where a range ends within it or beside it, and row groups left out."""
    write_all_formats(tmp_path)
    for source in folder_sources(str(tmp_path), None):
        texts, tasks = read_in_tasks(source, shard_bytes)
        assert texts == TEXTS, source.name
        assert tasks == 1 or shard_bytes < 10**9, source.name
    many = {
        name: read_in_tasks(source, 400)[1]
        for source in folder_sources(str(tmp_path), None)
        for name in [source.name]
    }
    assert many["jsonl"] > 5
    assert many["parquet"] > 2
    assert many["file"] > 2
    assert many["txt"] < len(TEXTS)  # small files together


def broken_lines() -> dict[bytes, str]:
    """Line -> what is said of it."""
    return {
        b'{"text": "\xff\xfe"}': "not UTF-8",
        b'{"text": ': "not JSON",
        b'{"text": "a"} {"text": "b"}': "not JSON",
        b'\xef\xbb\xbf{"text": "a"}': "not JSON",
        b'{"body": "x"}': 'expected a JSON object with a string "text"',
        b'{"text": 3}': "expected",
        b'{"text": null}': "expected",
        b"[1, 2]": "expected",
        b'{"text": "\\ud800"}': "not UTF-8: surrogates not allowed",
        b"[" * 200_000: "(expected|not JSON)",
    }


def test_broken_lines_are_named_wherever_a_range_starts(tmp_path: Path) -> None:
    """Catches line numbers counted from the start of a range, and broken lines that pass."""
    path = tmp_path / "x.jsonl"
    good = b'{"text": "good"}\n\n'
    for line, message in broken_lines().items():
        path.write_bytes(good * 50 + line + b"\n" + good)
        for start in (0, 500):
            with pytest.raises(DataError, match=rf"x\.jsonl:101: {message}") as error:
                list(read_documents(FileRange(path, "a/x.jsonl", start), "text", Reading("stop")))
            assert "\n" not in str(error.value)
            reading = Reading("skip")
            texts = list(read_documents(FileRange(path, "a/x.jsonl", start), "text", reading))
            assert set(texts) == {"good"}
            assert len(texts) == 51 - -(-start // len(good))
            (skipped,) = reading.skipped
            assert skipped.startswith("a/x.jsonl:101: ")


def test_what_json_allows_is_read(tmp_path: Path) -> None:
    """Catches the fast parser refusing what Python writes: NaN, surrogate pairs, carriage returns."""
    lines = [
        b'{"text": "a", "x": NaN}\r\n',
        b'{"text": "\\ud83d\\ude00"}\n',
        b'{"x": {"text": 1}, "text": "c"}',
    ]
    (tmp_path / "x.jsonl").write_bytes(b"".join(lines))
    found = read_documents(FileRange(tmp_path / "x.jsonl", "x"), "text", Reading("stop"))
    assert list(found) == ["a", "😀", "c"]


def broken_files(folder: Path) -> dict[str, str]:
    """File -> what is said of it."""
    write_all_formats(folder)
    big = JSONL * 40
    flipped = bytearray(gzip.compress(big))
    flipped[len(flipped) // 2] ^= 255
    parquet = (folder / "parquet" / "x.parquet").read_bytes()
    arrow = (folder / "file" / "x.arrow").read_bytes()
    stream = (folder / "stream" / "x.arrow").read_bytes()
    contents = {
        "short.jsonl.gz": gzip.compress(big)[:-9],
        "flipped.jsonl.gz": bytes(flipped),
        "none.jsonl.gz": b"no gzip at all",
        "short.jsonl.zst": zstd(big)[:-9],
        "none.txt.zst": b"no zstd at all",
        "bytes.txt": b"one\ntwo\nthr\x80ee\n",
        "none.parquet": b"no parquet at all",
        "short.parquet": parquet[: len(parquet) // 2],
        "middle.parquet": parquet[:20] + bytes(200) + parquet[220:],
        "none.arrow": b"no arrow at all, though longer than its mark",
        "short.arrow": arrow[: len(arrow) // 2],
        "stream.arrow": stream[: len(stream) // 2],
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    pyarrow.parquet.write_table(pa.table({"body": TEXTS}), folder / "column.parquet")
    pyarrow.parquet.write_table(pa.table({"text": [1, 2]}), folder / "numbers.parquet")
    pyarrow.parquet.write_table(pa.table({"text": ["a", None]}), folder / "null.parquet")
    raw = pa.array([b"good", b"\xff\xfe"], pa.binary())
    wrong = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    pyarrow.parquet.write_table(pa.table({"text": wrong}), folder / "utf8.parquet")
    return {
        "short.jsonl.gz": r":\d+: damaged from about here on",
        "flipped.jsonl.gz": r":\d+: damaged from about here on",
        "none.jsonl.gz": ":1: damaged",
        "short.jsonl.zst": r":\d+: damaged",
        "none.txt.zst": ": damaged",
        "bytes.txt": ":3: not UTF-8",
        "none.parquet": ": not a whole .parquet file",
        "short.parquet": ": not a whole .parquet file",
        "middle.parquet": ": .*not a whole .parquet file",
        "none.arrow": ": not a whole .arrow file",
        "short.arrow": ": .*not a whole .arrow file",
        "stream.arrow": ": row .*not a whole .arrow file",
        "column.parquet": ": it has no column 'text', only body",
        "numbers.parquet": ": its column of text holds int64, not strings",
        "null.parquet": ": row 2: it is null",
        "utf8.parquet": ": row 2: not UTF-8",
    }


def test_broken_files_are_one_clear_line(tmp_path: Path) -> None:
    """Catches tracebacks and crashes of pyarrow, and a damaged file that passes as a short one."""
    for name, message in broken_files(tmp_path).items():
        whole = FileRange(tmp_path / name, f"a/{name}", 0, countable_units(tmp_path / name))
        with pytest.raises(DataError, match=f"{name}{message}") as error:
            list(read_documents(whole, "text", Reading("stop")))
        assert "\n" not in str(error.value)
        reading = Reading("skip")
        list(read_documents(whole, "text", reading))
        (skipped,) = reading.skipped
        assert skipped.startswith(f"a/{name}:")


def test_another_field_can_hold_the_text(tmp_path: Path) -> None:
    """Catches the name of the field being fixed somewhere."""
    (tmp_path / "x.jsonl").write_text('{"my text": "a", "text": 3}\n')
    pyarrow.parquet.write_table(pa.table({"text": [3], "my text": ["a"]}), tmp_path / "x.parquet")
    for name in ("x.jsonl", "x.parquet"):
        assert list(read_documents(FileRange(tmp_path / name, name), "my text", Reading("stop"))) == ["a"]


@pytest.mark.parametrize("field", ['a"b', "a\\b", "a\nb", "\ud800", "é", "a.b"])
def test_any_name_can_be_the_field(tmp_path: Path, field: str) -> None:
    """Catches a traceback for a name that JSON escapes."""
    (tmp_path / "x.jsonl").write_text(json.dumps({field: "a", "text": 3}) + "\n\n{}\n")
    reading = Reading("skip")
    assert list(read_documents(FileRange(tmp_path / "x.jsonl", "x"), field, reading)) == ["a"]
    assert reading.skipped == [f"x:3: expected a JSON object with a string {json.dumps(field)}"]


def test_a_dataset_is_streamed_by_shards(tmp_path: Path) -> None:
    """Catches shards lost or read twice, and a broken record without its place."""
    for part in range(3):
        rows = [{"body": text} for text in TEXTS[part::3]]
        (tmp_path / f"train-{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = dataset_source(DatasetName(str(tmp_path), None, "train"))
    assert len(source.files) == 3
    assert sorted(text for _, text in source.documents("body")) == sorted(TEXTS)
    with pytest.raises(DataError, match=r'row 1: expected a string "text"'):
        list(source.documents("text"))
    with pytest.raises(DataError, match="Bad split: test"):
        dataset_source(DatasetName(str(tmp_path), None, "test"))
    assert datasets.utils.logging.get_verbosity() == datasets.logging.CRITICAL


def test_a_dataset_knows_how_far_it_is(tmp_path: Path) -> None:
    """Catches a share of a dataset's shard that stays at nothing where the hub says how many rows it has."""
    for part in range(2):
        (tmp_path / f"train-{part}.jsonl").write_text('{"text": "x"}\n' * 50)
    name = DatasetName(str(tmp_path), None, "train")
    for known in (False, True):
        if known:
            splits = "dataset_info:\n  splits:\n  - name: train\n    num_bytes: 1\n    num_examples: 100\n"
            (tmp_path / "README.md").write_text(f"---\n{splits}---\n")
        reading = Reading("stop")
        whole = dataset_source(name).files[1].whole()
        shares = [reading.share for _ in read_documents(whole, "text", reading)]
        assert shares == [i / 50 * known for i in range(1, 51)]


def test_linked_folders_are_read(tmp_path: Path) -> None:
    """Catches linked folders left out without a word, and a link to a folder above read without end."""
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "disk" / "deep" / "y.jsonl").write_bytes(JSONL)
    (tmp_path / "disk" / "deep" / "z.doc").write_bytes(b"")
    folder = tmp_path / "raw" / "a"
    folder.mkdir(parents=True)
    (folder / "x.txt").write_text("text")
    (folder / "linked").symlink_to(tmp_path / "disk")
    (folder / "twice").symlink_to(tmp_path / "disk" / "deep")
    (tmp_path / "disk" / "up").symlink_to(folder)
    (folder / "gone").symlink_to(tmp_path / "gone")
    (source,) = folder_sources(str(tmp_path / "raw"), None)
    assert [file.name for file in source.files] == ["a/linked/deep/y.jsonl", "a/x.txt"]
    names = [path.relative_to(folder).as_posix() for path in folder_files(folder)]
    assert names == ["linked/deep/y.jsonl", "linked/deep/z.doc", "x.txt"]


def test_text_beside_the_folder_train_is_named(tmp_path: Path) -> None:
    """Catches text that is passed over because its source has a folder train."""
    for name in ("train/x.txt", "valid/y.txt", "more/z.txt"):
        path = tmp_path / "a" / name
        path.parent.mkdir(parents=True)
        path.write_text(name)
    (tmp_path / "a" / "README.md").write_text("not read anyway")
    message = r"a/more/z\.txt lies beside .*a/train; where a source has a folder train, its text must be in"
    with pytest.raises(DataError, match=message):
        folder_sources(str(tmp_path), None)
    (tmp_path / "a" / "more" / "z.txt").unlink()
    (source,) = folder_sources(str(tmp_path), None)
    assert [(file.name, file.split) for file in source.files] == [
        ("a/train/x.txt", "train"),
        ("a/valid/y.txt", "valid"),
    ]


def test_overlapping_sources_are_named(tmp_path: Path) -> None:
    """Catches text counted in two sources, by a link or as a copy, and held-back text trained on."""

    def overlap(make: Any) -> str:
        root = tmp_path / make.__name__
        (root / "a" / "train").mkdir(parents=True)
        (root / "b").mkdir()
        (root / "a" / "train" / "x.jsonl").write_bytes(JSONL)
        (root / "a" / "train" / "empty.txt").write_bytes(b"")
        (root / "b" / "empty.txt").write_bytes(b"")
        make(root)
        with pytest.raises(DataError, match="have the same content") as error:
            file_hashes(folder_sources(str(root), None))
        return str(error.value)

    def symlink(root: Path) -> None:
        (root / "b" / "y.jsonl").symlink_to(root / "a" / "train" / "x.jsonl")

    def hard_link(root: Path) -> None:
        (root / "b" / "y.jsonl").hardlink_to(root / "a" / "train" / "x.jsonl")

    def copy(root: Path) -> None:
        (root / "b" / "y.jsonl").write_bytes(JSONL)

    def both_splits(root: Path) -> None:
        (root / "a" / "valid").mkdir()
        (root / "a" / "valid" / "y.jsonl").write_bytes(JSONL)

    for make in (symlink, hard_link, copy):
        message = overlap(make)
        assert "b/y.jsonl" in message
        assert "a/train/x.jsonl" in message
        assert "in b and in a" in message
    assert "valid/y.jsonl" in overlap(both_splits)
