"""The tokenizer command: train, check, compare, and what it refuses."""

import csv
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece

from openmoe.data.tokenizer import load_tokenizer, parse_model
from openmoe.launcher import tokenizer as command

from .conftest import made_up_documents, write_source

Run = Callable[..., str]
Refused = Callable[..., str]
SOURCES = {
    "alpha": [text for seed in range(15) for text in made_up_documents(seed, 4, 80)],
    "beta": made_up_documents(99, 20, 300),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for name, documents in SOURCES.items():
        write_source(folder / name, documents)
    return folder


@pytest.fixture(scope="module")
def llama_type(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """unk 0, <s> 1, </s> 2, no pad, no bytes; a space before each text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SOURCES["beta"]), model_writer=model, vocab_size=90, minloglevel=2
    )
    path = tmp_path_factory.mktemp("models") / "llama_type.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """run("key=value", ...) -> what the command printed on stdout."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["openmoe-tokenizer", *arguments])
        command.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(run: Run, capsys: pytest.CaptureFixture[str]) -> Refused:
    """refused("key=value", ...) -> the one line of an exit with code 2."""

    def refused(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            run(*arguments)
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if not line.startswith("training ")]
        assert ended.value.code == 2, captured.err
        assert len(lines) == 1, captured.err
        assert lines[0].startswith("error: ")
        assert not captured.out
        return lines[0]

    return refused


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_train(model_type: str, run: Run, root: Path, tmp_path: Path) -> None:
    """Bug: a file that can't be loaded, options that are not passed on, a check of something else."""
    path = tmp_path / "new" / "words.model"
    printed = run(
        "command=train",
        f"data.root={root}",
        f"tokenizer.path={path}",
        "tokenizer.vocab_size=512",
        f"tokenizer.model_type={model_type}",
        "tokenizer.normalization=nmt_nfkc",
    )
    assert [file.name for file in path.parent.iterdir()] == ["words.model"]
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.size == 512 + 300
    assert parse_model(path.read_bytes(), "").normalizer_spec.name == "nmt_nfkc"
    assert f"{model_type}, 512 pieces and 300 sentinels" in printed
    assert "<extra_id_0> 811 down to <extra_id_299> 512" in printed
    assert printed.count("100.00%") == len(SOURCES)


def test_held_back_text_is_not_trained_on(run: Run, tmp_path: Path) -> None:
    """Bug: a tokenizer that has seen the validation documents."""
    write_source(tmp_path / "text" / "alpha" / "train", SOURCES["alpha"])
    write_source(tmp_path / "text" / "alpha" / "valid", ["qqqq zzzz qqqq zzzz " * 200])
    path = tmp_path / "words.model"
    run("command=train", f"data.root={tmp_path}/text", f"tokenizer.path={path}", "tokenizer.vocab_size=512")
    assert not any("qq" in piece.piece for piece in parse_model(path.read_bytes(), "").pieces)


def test_check_of_another_model(run: Run, root: Path, llama_type: Path) -> None:
    """Bug: ids of the file given as ours, or a text that does not come back counted as if it did."""
    path = llama_type
    printed = run("command=check", f"tokenizer.path={path}", f"data.root={root}", "data.sources=[alpha]")
    assert "pad 0 <pad> (added), eos 1 </s> (2 in the file), unk 2 <unk> (0 in the file)" in printed
    assert "<extra_id_0> 390 down to <extra_id_299> 91" in printed
    assert "ids          391; model.vocab_size=512 or more" in printed
    assert "alpha" in printed
    assert "beta" not in printed
    assert "million tokens/s" in printed


def test_check_shows_the_first_difference(run: Run, tmp_path: Path, llama_type: Path) -> None:
    """Bug: a normaliser that changes text goes unseen."""
    write_source(tmp_path / "alpha", ["abc", "one  two", "three"])
    printed = run("command=check", f"tokenizer.path={llama_type}", f"data.root={tmp_path}")
    assert "document 1: 'one  two' came back as" in printed
    assert "1 of          3" in printed


def test_check_without_text(run: Run, llama_type: Path) -> None:
    """Bug: the ids can't be had without a folder of text."""
    assert "not tried: data.root is null" in run("command=check", f"tokenizer.path={llama_type}")


def test_compare(run: Run, root: Path, llama_type: Path, tmp_path: Path) -> None:
    """Bug: a ratio to the wrong tokenizer, a table that says another thing than the file, no total."""
    other = tmp_path / "words.model"
    run("command=train", f"data.root={root}", f"tokenizer.path={other}", "tokenizer.vocab_size=512")
    paths = f"compare.paths=[{llama_type},{other}]"
    printed = run("command=compare", f"data.root={root}", paths, f"compare.output={tmp_path}/out")
    with (tmp_path / "out" / "comparison.csv").open() as file:
        rows = {(row["subset"], row["tokenizer"]): row for row in csv.DictReader(file)}
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert record["vocabulary"] == {"llama_type": 90, "words": 812}
    assert {key: str(row["tokens"]) for key, row in zip(rows, record["rows"], strict=True)} == {
        key: row["tokens"] for key, row in rows.items()
    }
    processors = {
        "llama_type": sentencepiece.SentencePieceProcessor(model_file=str(llama_type)),
        "words": sentencepiece.SentencePieceProcessor(model_file=str(other)),
    }
    for (subset, name), row in rows.items():
        texts = SOURCES.get(subset, [*SOURCES["alpha"], *SOURCES["beta"]])
        ids = [i for text in texts for i in processors[name].encode(text)]
        base = sum(len(processors["llama_type"].encode(text)) for text in texts)
        assert (int(row["tokens"]), int(row["vocabulary_used"])) == (len(ids), len(set(ids)))
        assert float(row["ratio"]) == len(ids) / base
        assert f"{len(ids):,}" in printed
    assert list(rows)[-2:] == [("all", "llama_type"), ("all", "words")]
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_any_model_can_be_compared(run: Run, root: Path, llama_type: Path, tmp_path: Path) -> None:
    """Bug: a comparison that refuses a tokenizer for the names of its pieces."""
    proto = parse_model(llama_type.read_bytes(), "")
    proto.pieces.add(piece="<extra_id_7>", score=-3.0)
    odd = tmp_path / "odd.model"
    odd.write_bytes(proto.SerializeToString())
    printed = run(
        "command=compare", f"data.root={root}", f"compare.paths=[{odd}]", f"compare.output={tmp_path}/out"
    )
    assert "odd 91" in printed


REFUSED = [
    (["command=erase"], ["command='erase'", "'train', 'check' or 'compare'"]),
    ([], ["command"]),
    (["command=check"], ["tokenizer.path=null"]),
    (["command=check", "tokenizer.path=/nowhere.model"], ["tokenizer.path=/nowhere.model", "No such file"]),
    (["command=check", "tokenizer.path=/etc/hostname"], ["tokenizer.path=/etc/hostname", "not a"]),
    (["command=check", "tokenizer.path=MODEL", "data.root=/nowhere"], ["data.root=/nowhere"]),
    (
        ["command=check", "tokenizer.path=MODEL", "data.root=ROOT", "data.sources=[gamma]"],
        ["'gamma'", "alpha"],
    ),
    (["command=train", "data.root=ROOT"], ["tokenizer.path=null"]),
    (["command=train", "tokenizer.path=OUT/m"], ["data.root=null"]),
    (["command=train", "data.root=ROOT", "tokenizer.path=MODEL"], ["MODEL", "exists already"]),
    (["command=train", "data.root=ROOT", "tokenizer.path=MODEL/m"], ["tokenizer.path", "can't be made"]),
    (["command=train", "data.root=ROOT", "tokenizer.path=OUT/m"], ["tokenizer.vocab_size=32000", "at most "]),
    (
        ["command=train", "data.root=ROOT", "tokenizer.path=OUT/m", "tokenizer.normalization=magic"],
        ["tokenizer.normalization='magic'"],
    ),
    (
        ["command=train", "data.root=ROOT", "tokenizer.path=OUT/m", "tokenizer.normalization=no.tsv"],
        ["no.tsv", "No such file"],
    ),
    (["command=compare", "data.root=ROOT", "compare.paths=[MODEL]"], ["compare.output=null"]),
    (["command=compare", "data.root=ROOT", "compare.output=OUT"], ["compare.paths=[]"]),
    (
        ["command=compare", "data.root=ROOT", "compare.output=MODEL", "compare.paths=[MODEL]"],
        ["can't be made"],
    ),
    (
        ["command=compare", "data.root=ROOT", "compare.output=OUT", "compare.paths=[MODEL,/etc/hostname]"],
        ["compare.paths=/etc/hostname", "not a"],
    ),
    (
        ["command=compare", "data.root=ROOT", "compare.output=OUT", "compare.paths=[MODEL,MODEL]"],
        ["compare.paths", "twice"],
    ),
    (["command=compare", "compare.output=OUT", "compare.paths=[MODEL]"], ["data.root=null"]),
    (["command=check", "tokenizer.vocab_size=5"], ["tokenizer.vocab_size=5"]),
    (["command=check", "data.rot=x"], ["rot"]),
]


@pytest.mark.parametrize(("arguments", "fragments"), REFUSED)
def test_refused(
    arguments: list[str], fragments: list[str], refused: Refused, root: Path, llama_type: Path, tmp_path: Path
) -> None:
    """Bug: a traceback, several lines, another exit code, or a half-written file for a user's mistake."""
    places = {"ROOT": str(root), "MODEL": str(llama_type), "OUT": str(tmp_path / "out")}
    for name, place in places.items():
        arguments = [argument.replace(name, place) for argument in arguments]
    line = refused(*arguments)
    for fragment in fragments:
        assert places.get(fragment, fragment) in line
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
