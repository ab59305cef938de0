"""Documents out of files: jsonl, txt (either also .gz and .zst), parquet, arrow, and streamed `datasets`.

Large files are read in ranges, so that several processes can share one: bytes of a jsonl file (a line belongs
to the range that its first byte lies in), row groups of a parquet file, record batches of an arrow file.
Whatever can't be read goes to `Reading.corrupt` with its place; the reader then goes on with the next record,
or ends where there is none to be found.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, Literal

import msgspec

from openmoe.data.errors import DataError, one_line

OnCorrupt = Literal["stop", "skip"]

# Kinds of file by the end of their names; those of text may be compressed.
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".txt.zst", ".parquet", ".arrow")
# Rows of a table looked at together.
_BATCH_ROWS = 256
# Decompressed at once: what stands before a damaged place in the same stretch is lost with it.
_BUFFER_BYTES = 1 << 16


@dataclass(frozen=True)
class DatasetName:
    """A dataset that the library `datasets` streams."""

    name: str
    config: str | None
    split: str


@dataclass(frozen=True)
class FileRange:
    """What to read of one file: all of it, or from `start` up to `stop`."""

    path: Path
    # Of the file in its input: for lists and receipts.
    name: str
    # Bytes of .jsonl, row groups of .parquet, record batches of .arrow, shards of a dataset.
    start: int = 0
    stop: int | None = None
    dataset: DatasetName | None = None


class Reading:
    """What one pass over a range has met so far."""

    def __init__(self, on_corrupt: OnCorrupt) -> None:
        self._on_corrupt = on_corrupt
        # Place and reason of each record that was skipped.
        self.skipped: list[str] = []
        # Share of the range that has been read.
        self.share = 0.0

    def corrupt(self, source: FileRange, place: str, reason: str) -> None:
        """Note a record that can't be read. Raises DataError where that is to stop the work."""
        reason = one_line(reason)
        if self._on_corrupt == "stop":
            raise DataError(f"{source.path}{place}: {reason}")
        self.skipped.append(f"{source.name}{place}: {reason}")


@dataclass(frozen=True)
class _NoText:
    reason: str


def file_suffix(path: Path) -> str | None:
    """Which of SUFFIXES the name ends in."""
    return next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), None)


def read_documents(source: FileRange, text_field: str, reading: Reading) -> Iterator[str]:
    """The documents of a range in their order, empty ones too.

    Raises DataError for the first that is corrupt, unless `reading` skips them.
    """
    suffix = file_suffix(source.path)
    if source.dataset is not None:
        return _read_dataset(source, source.dataset, text_field, reading)
    if suffix == ".parquet":
        return _read_table(source, reading, _parquet_columns(source, text_field))
    if suffix == ".arrow":
        return _read_table(source, reading, _arrow_columns(source, text_field))
    if suffix is not None and suffix.startswith(".jsonl"):
        return _read_jsonl(source, text_field, reading)
    return _read_text(source, reading)


def countable_units(path: Path) -> int:
    """Into how many ranges a file can be cut; 1 where it must be read whole, also where it is broken."""
    if path.suffix == ".jsonl":
        return path.stat().st_size
    if path.suffix not in (".parquet", ".arrow"):
        return 1
    import pyarrow as pa
    import pyarrow.parquet

    try:
        if path.suffix == ".parquet":
            return pa.parquet.read_metadata(path).num_row_groups
        with pa.memory_map(str(path)) as file:
            return pa.ipc.open_file(file).num_record_batches
    except (pa.ArrowException, OSError):  # arrow's stream form has no index; damage is found on reading
        return 1


def _read_jsonl(source: FileRange, text_field: str, reading: Reading) -> Iterator[str]:
    decode = _fast_parser(text_field)
    compressed = source.path.suffix != ".jsonl"
    with source.path.open("rb") as raw:
        size_bytes = raw.seek(0, 2)
        stop = size_bytes if source.stop is None else source.stop
        raw.seek(max(0, source.start - 1))
        if source.start:
            raw.readline()  # the first line of this range starts behind it
        first = position = raw.tell()
        file = _decompressed(raw, source.path) if compressed else raw
        number = 0
        try:
            while compressed or position < stop:
                line = file.readline()
                if not line:
                    break
                number += 1
                position += len(line)
                try:
                    text = decode(line).text
                except (ValueError, RecursionError):
                    if line.isspace():
                        continue
                    text = _text_of(line, text_field)
                    if isinstance(text, _NoText):
                        place = f":{_line_number(source.path, first, number)}"
                        reading.corrupt(source, place, text.reason)
                        continue
                if compressed:
                    reading.share = raw.tell() / size_bytes
                else:
                    reading.share = (position - source.start) / (stop - source.start)
                yield text
        except OSError as error:
            if not compressed:
                raise
            reading.corrupt(source, f":{number + 1}", f"damaged from about here on: {error}")


def _fast_parser(text_field: str) -> Callable[[bytes], Any]:
    """Raises ValueError for what is better left to the slow one."""
    try:
        record = msgspec.defstruct("Record", [("text", str)], rename={"text": text_field})
    except ValueError:  # a name that JSON has to escape
        return _refuse
    return msgspec.json.Decoder(record).decode


def _refuse(line: bytes) -> Any:
    raise ValueError


def _text_of(line: bytes, text_field: str) -> "str | _NoText":
    """The text of a line that the fast parser refused, or why there is none."""
    try:
        record = json.loads(line.decode("utf-8"))
        text = record[text_field]
        text.encode("utf-8")  # a lone surrogate, written as \ud800, is no text
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        return _NoText(f"not UTF-8: {error.reason}")
    except ValueError as error:
        return _NoText(f"not JSON: {error}")
    except (KeyError, TypeError, AttributeError, RecursionError):
        return _NoText(f"expected a JSON object with a string {json.dumps(text_field)}")
    return text


def _line_number(path: Path, first_byte: int, number: int) -> int:
    """The number in the file of the `number`-th line from `first_byte` on."""
    with path.open("rb") as file:
        while first_byte > 0:
            block = file.read(min(first_byte, 1 << 20))
            if not block:
                break
            number += block.count(b"\n")
            first_byte -= len(block)
    return number


def _decompressed(raw: BinaryIO, path: Path) -> BinaryIO:
    """The content of a .gz or .zst file. Reading it raises OSError where it is damaged."""
    import pyarrow as pa

    form = {".gz": "gzip", ".zst": "zstd"}[path.suffix]
    return BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), form), _BUFFER_BYTES)


def _read_text(source: FileRange, reading: Reading) -> Iterator[str]:
    compressed = source.path.suffix != ".txt"
    content = b""
    try:
        with source.path.open("rb") as raw:
            content = (_decompressed(raw, source.path) if compressed else raw).read()
        yield content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        reading.corrupt(source, f":{line}", f"not UTF-8: {error.reason}")
    except OSError as error:
        if not compressed:
            raise
        reading.corrupt(source, "", f"damaged: {error}")


class _WrongTable(Exception):
    """A table that is whole but holds no texts."""


# Rows before the range and in it (0: unknown), then the columns of texts.
_Columns = Iterator[tuple[int, int] | Any]


def _read_table(source: FileRange, reading: Reading, columns: _Columns) -> Iterator[str]:
    import pyarrow as pa

    done = before = 0
    try:
        before, rows = next(columns)
        for column in columns:
            for number, text in enumerate(_texts(column), before + done + 1):
                if isinstance(text, str):
                    yield text
                else:
                    reading.corrupt(source, f": row {number}", text.reason)
            done += len(column)
            reading.share = done / rows if rows else 0.0
    except _WrongTable as error:
        reading.corrupt(source, "", str(error))
    except (pa.ArrowException, OSError) as error:
        place = f": row {before + done + 1}" if done else ""
        reading.corrupt(source, place, f"not a whole {source.path.suffix} file: {error}")


def _parquet_columns(source: FileRange, text_field: str) -> _Columns:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(source.path) as file:
        _require_column(file.schema_arrow, text_field)
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        yield sum(sizes[: source.start]), sum(sizes[source.start : source.stop])
        groups = list(range(len(sizes)))[source.start : source.stop]
        for batch in file.iter_batches(_BATCH_ROWS, groups, [text_field], use_threads=False):
            yield batch.column(0)


def _arrow_columns(source: FileRange, text_field: str) -> _Columns:
    import pyarrow as pa

    with pa.memory_map(str(source.path)) as file:
        if file.read(6) == b"ARROW1":
            table = pa.ipc.open_file(file)
            _require_column(table.schema, text_field)
            numbers = range(table.num_record_batches)[source.start : source.stop]
            sizes = [table.get_batch(number).num_rows for number in range(numbers.stop)]
            yield sum(sizes[: source.start]), sum(sizes[source.start :])
            for number in numbers:
                yield table.get_batch(number).column(text_field)
        else:  # the stream form
            file.seek(0)
            with pa.ipc.open_stream(file) as stream:
                _require_column(stream.schema, text_field)
                yield 0, 0
                for batch in stream:
                    yield batch.column(text_field)


def _require_column(schema: Any, text_field: str) -> None:
    if schema.get_field_index(text_field) < 0:
        raise _WrongTable(f"it has no column {text_field!r}, only {', '.join(schema.names)}")


def _texts(column: Any) -> Iterable[str | _NoText]:
    """The values of a column of strings, checked: a damaged file must not crash the process."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise _WrongTable(f"its column of text holds {kind}, not strings")
    try:
        column.validate(full=True)
        texts: Iterable[str | _NoText | None] = column.to_pylist()
    except pa.ArrowInvalid:
        column = column.cast(pa.large_binary())
        column.validate(full=True)
        texts = map(_decoded, column.to_pylist())
    return (_NoText("it is null, not a string") if text is None else text for text in texts)


def _decoded(content: bytes | None) -> str | _NoText | None:
    try:
        return None if content is None else content.decode("utf-8")
    except UnicodeDecodeError as error:
        return _NoText(f"not UTF-8: {error.reason}")


def open_dataset(dataset: DatasetName) -> Any:
    """The `datasets` stream. Raises DataError where there is none of that name."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs the errors that it raises
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(dataset.name, dataset.config, split=dataset.split, streaming=True)
    except Exception as error:  # its own errors, its file systems' and the network's share no base class
        raise DataError(f"data.input={dataset.name} is no folder and no dataset: {one_line(error)}") from None


def _read_dataset(
    source: FileRange, dataset: DatasetName, text_field: str, reading: Reading
) -> Iterator[str]:
    stream = open_dataset(dataset)
    splits = stream.info.splits or {}
    # Of the shards on the average, where the hub knows it.
    rows = splits[dataset.split].num_examples / stream.num_shards if dataset.split in splits else 0
    number = 0
    try:
        for number, record in enumerate(stream.shard(stream.num_shards, source.start), start=1):
            reading.share = min(1.0, number / rows) if rows else 0.0
            text = record.get(text_field)
            if isinstance(text, str):
                yield text
            else:
                reading.corrupt(source, f": row {number}", f"expected a string {json.dumps(text_field)}")
    except DataError:
        raise
    except Exception as error:  # as above
        reading.corrupt(source, f": row {number + 1}", str(error))
