"""The command that shows rows: what it shows is the run's own, safe to print, and counted right."""

import json
import os
import re
import signal
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from openmoe.data.inspection import count_plans
from openmoe.data.loader import Loader, StepBatch
from openmoe.data.packing import empty_batch
from openmoe.data.prepare import prepare
from openmoe.data.recipe import PlannedExamples
from openmoe.data.tokenizer import Tokenizer
from openmoe.launcher import inspect_data as command
from openmoe.launcher.entry import load_config
from openmoe.launcher.inspect_rows import Part, TokenReader, read_rows, visible
from openmoe.launcher.inspect_tables import Statistics, sources_table, terminal_table
from openmoe.launcher.inspect_terminal import RowPrinter
from openmoe.launcher.train import build_loader, source_names

from .conftest import Small

DATA = Path(os.environ.get("OPENMOE_DATA", Path(__file__).parents[3] / "shared" / "data"))
NASTY = (
    '<script>alert("1")</script> & \x1b[31mred\x1b[0m \u202etxt\u202c\r\n\t  x\u00a0\u4e2d\u6587 '
    '<i title="7 @0">\n'
)
ALWAYS_PADDED = "curriculum=[{mix: {alpha: 1, beta: 3}, objective: ul2}]"

Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """run("key=value", ...) -> what the command printed on stdout."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process is not the command's own
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["openmoe-inspect-data", *arguments])
        command.main()
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def nasty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source whose documents are made to break pages and terminals."""
    folder = tmp_path_factory.mktemp("nasty")
    (folder / "alpha").mkdir()
    lines = [json.dumps({"text": f"{number} {NASTY * 20}"}) for number in range(60)]
    (folder / "alpha" / "part.jsonl").write_text("\n".join(lines))
    return folder


class PageReader(HTMLParser):
    """What stands in the page: the text, the tokens of each row, and which of them carry loss."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.rows: list[list[int]] = []
        self.positions: list[list[int]] = []
        self.loss: list[list[bool]] = []
        self.kinds: list[list[str]] = []
        self.text = ""
        self.padding: list[str] = []
        self._in_loss = self._in_padding = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.add(tag)
        self.addresses += [str(values[name]) for name in ("src", "href") if name in values]
        if tag == "details":
            for column in (self.rows, self.positions, self.loss, self.kinds):
                column.append([])
        if tag == "p":
            self._in_loss = values.get("class") == "loss"
        if tag == "i" and "title" in values:
            token, position = str(values["title"]).split(" @")
            self.rows[-1].append(int(token))
            self.positions[-1].append(int(position))
            self.loss[-1].append(self._in_loss)
            self.kinds[-1].append(values.get("class") or "")
        self._in_padding = tag == "div" and values.get("class") == "pad"

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_padding:
            self.padding.append(data)
            self._in_padding = False


def own_batches(arguments: list[str], step: int, steps: int) -> tuple[Loader, Tokenizer, list[StepBatch]]:
    config = load_config(arguments)
    data = prepare(config.data, config.model.vocab_size, source_names(config))
    loader = build_loader(config, data)
    for _ in range(step):
        next(loader)
    return loader, data.tokenizer, [next(loader) for _ in range(steps)]


@pytest.mark.parametrize(
    ("step", "more"),
    [
        (5, ()),  # the phase changes after the second of the three steps
        (0, ("data.packing=dense", "data.example_tokens=64", "train.seq_len=300", "data.mode_strings=false")),
        (3, (ALWAYS_PADDED,)),
    ],
)
def test_page_shows_exactly_the_runs_rows(
    small: Small, run: Run, tmp_path: Path, step: int, more: tuple[str, ...]
) -> None:
    """Catches rows of another step, mix or seed than training would see, and tokens, loss marks, positions
    or padding that are left out or shown elsewhere."""
    arguments = small(tmp_path / "run", *more)
    page = tmp_path / "page.html"
    run(*arguments, f"inspect.step={step}", "inspect.rows=10", f"inspect.page={page}", "inspect.built_rows=5")
    _, tokenizer, batches = own_batches(arguments, step, 3)
    shown = PageReader(page)
    expected = [(batch.arrays, row) for batch in batches for row in range(4)][:10]
    assert len(shown.rows) == 10
    for number, (arrays, row) in enumerate(expected):
        real = arrays["segment_ids"][row] > 0
        ids = arrays["target_tokens"][row][real]
        assert shown.rows[number] == ids.tolist()
        assert shown.loss[number] == (arrays["loss_weights"][row][real] > 0).tolist()
        assert shown.positions[number] == np.flatnonzero(real).tolist()
        kinds = np.array(shown.kinds[number])
        np.testing.assert_array_equal(kinds == "s", (ids > tokenizer.first_sentinel - 300))
        np.testing.assert_array_equal(kinds == "e", ids == 1)
    paddings = [int((arrays["segment_ids"][row] == 0).sum()) for arrays, row in expected]
    assert shown.padding == [f"{padding} padding" for padding in paddings if padding]
    assert not (tmp_path / "run").exists()


def test_late_step_is_reached_without_the_steps_before(small: Small, run: Run, tmp_path: Path) -> None:
    """Catches a look that needs the way there, or lands beside its step."""
    arguments = small(tmp_path / "run", "inspect.rows=1", "inspect.statistics_rows=0", "inspect.whole=true")
    late = run(*arguments, "inspect.step=200000000")
    config = load_config(small(tmp_path / "run"))
    loader = build_loader(config, prepare(config.data, None, source_names(config)))
    loader.seek(200_000_000)
    batch = next(loader)
    assert f"step {batch.step:,} row 0" in late
    first = batch.examples.start[0]
    assert f"from text tokens {first:,} to {first + batch.examples.raw_tokens[0] - 1:,}" in late
    assert "the run ends before this step" in late
    reader = TokenReader(prepare(config.data, None, source_names(config)).tokenizer)
    row = read_rows(batch, 1, loader.source_names, loader.class_names(batch.phase), [[]])[0]
    assert RowPrinter(reader, False, 100, True).text(row) in late


def test_terminal_shows_every_token_of_a_whole_row(small: Small, run: Run, tmp_path: Path) -> None:
    """Catches text lost where lines are broken or rows are shortened, and a shortening that is not said."""
    curriculum = "curriculum=[{mix: {beta: 1}, objective: causal_lm}]"
    arguments = small(tmp_path / "run", "train.seq_len=1024", curriculum)
    _, tokenizer, (batch,) = own_batches(arguments, 0, 1)
    shown = ("inspect.rows=1", "inspect.statistics_rows=0")
    ids = batch.arrays["target_tokens"][0]
    reader = TokenReader(tokenizer)
    tokens = [token.shown for token in reader.read(Part(0, True, ids, 0))]

    def body(printed: str) -> str:
        lines = printed.split("targets 1,024")[1].rstrip("\n").split("\n")
        return "".join([lines[0][3:], *(line[20:] for line in lines[1:])])

    assert body(run(*arguments, *shown, "inspect.whole=true")) == "".join(tokens)
    shortened = body(run(*arguments, *shown))
    assert shortened == "".join([*tokens[:160], " [... 784 tokens ...] ", *tokens[-80:]])


def test_segments_of_a_dense_row(small: Small, run: Run, tmp_path: Path) -> None:
    """Catches a heading with another segment's source, class or text, a row of many segments that fills
    screens, and segments that vanish without a word."""
    dense = ("data.packing=dense", "data.example_tokens=64", "train.seq_len=600", ALWAYS_PADDED)
    arguments = small(tmp_path / "run", *dense)
    loader, _, (batch,) = own_batches(arguments, 0, 1)
    plan = batch.examples
    headings = [
        f"  {plan.segment[i]}. {loader.source_names[plan.source[i]]}, {loader.class_names(0)[plan.kind[i]]}, "
        f"from text tokens {plan.start[i]:,} to {plan.start[i] + plan.raw_tokens[i] - 1:,}"
        for i in np.flatnonzero(plan.row == 0)
    ]
    assert len(headings) > 8
    arguments += ["inspect.rows=1", "inspect.statistics_rows=0"]
    whole, short = run(*arguments, "inspect.whole=true").split("\n"), run(*arguments).split("\n")
    assert [line for line in whole if re.match(r"  \d+\. ", line)] == headings
    assert [line for line in short if re.match(r"  \d+\. ", line)] == [*headings[:3], headings[-1]]
    left_out, counts = re.findall(
        r"\[\.\.\. (\d+) segments: (.*?) \.\.\.\]", " ".join(" ".join(short).split())
    )[0]
    assert int(left_out) == len(headings) - 4 == sum(int(n) for n in re.findall(r"(?:^|, )(\d+) ", counts))


def test_text_cannot_break_page_or_terminal(small: Small, run: Run, nasty: Path, tmp_path: Path) -> None:
    """Catches text that becomes a tag, an attribute or a terminal's command, and anything that a page would
    have to fetch."""
    arguments = small(tmp_path / "run", f"data.root={nasty}", "data.tokenizer.vocab_size=600")
    arguments += ["curriculum=[{mix: {alpha: 1}, objective: causal_lm}]", "train.seq_len=256"]
    page = tmp_path / "folder" / "page.html"
    printed = run(*arguments, "inspect.rows=2", "inspect.whole=true", f"inspect.page={page}")
    shown = PageReader(page)
    assert "script" not in shown.tags
    assert all(address.startswith("data:image/png;base64,") for address in shown.addresses)
    assert [len(row) for row in shown.rows] == [256, 256]
    assert '<script>alert("1")</script> & ' in shown.text
    assert "中文" in shown.text
    for text in (shown.text, printed):
        assert not {sign for sign in text if not sign.isprintable()} - {"\n"}
    assert "\\x1b[31mred" in "".join(line.strip() for line in printed.split("\n"))


def test_visible_text() -> None:
    """Catches white space that can't be seen, and a dot for each plain space between words."""
    assert visible(" word") == " word"
    assert visible("a b") == "a·b"  # a piece with a space inside shows it
    assert visible(" ") == "·"
    assert visible("    if") == "····if"
    assert visible("\tx\n") == "→x↵"
    assert visible("\r\x00\u00a0\u202e") == "\\r\\x00\\xa0\\u202e"


def test_bytes_become_characters_where_they_are_complete(small: Small, tmp_path: Path) -> None:
    """Catches letters that were cut into bytes and come out as gibberish, or swallow their neighbours."""
    config = load_config(small(tmp_path / "run"))
    tokenizer = prepare(config.data, None, source_names(config)).tokenizer
    reader = TokenReader(tokenizer)
    ids = np.array(tokenizer.encode("a中\n😀b"), np.int32)
    tokens = reader.read(Part(0, False, ids, 0))
    assert [token.id for token in tokens] == ids.tolist()
    assert "".join(token.shown for token in tokens) == "a中↵😀b"
    # The first and the last byte are missing.
    tokens = reader.read(Part(0, False, ids[2:-2], 0))
    assert "".join(token.shown for token in tokens) == "\\xb8\\xad↵\\xf0\\x9f\\x98"


def test_colours_only_where_wanted(
    small: Small, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches escape codes in a file or a pipe, against NO_COLOR, or none where they were asked for."""
    arguments = small(tmp_path / "run", "inspect.rows=1", "inspect.statistics_rows=10")
    plain = run(*arguments)
    assert "\x1b" not in plain
    coloured = run(*arguments, "inspect.colour=always")
    assert "\x1b[4;33m" in coloured  # targets, underlined
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain
    monkeypatch.setattr(command.sys.stdout.__class__, "isatty", lambda self: True, raising=False)
    assert "\x1b[4;33m" in run(*arguments)
    assert "\x1b" not in run(*arguments, "inspect.colour=never")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in run(*arguments)


def test_statistics_of_the_phase_of_the_step(small: Small, run: Run, tmp_path: Path) -> None:
    """Catches rows of two phases thrown together, and shares held against the wrong phase's mix."""
    arguments = small(tmp_path / "run", "inspect.rows=0")
    first, second = (run(*arguments, f"inspect.step={step}") for step in (1, 6))
    lines = {
        name: re.search(rf"^  {name} +(.*)$", first, re.MULTILINE).group(1).split()  # type: ignore[union-attr]
        for name in ("alpha", "beta", "rows", "20")
    }
    assert lines["20"][0] == f"{20 * 64:,}"  # five steps of four rows to the end of the phase
    assert (lines["alpha"][0], lines["beta"][0]) == ("25.00", "75.00")
    assert "[S2S] prefix" in first
    assert "Denoisers" not in second
    assert "Spans" not in second
    assert re.search(r"^  alpha +75\.00 ", second, re.MULTILINE)
    assert re.search(r"^  24 +1,536 +100\.00 +100\.00 ", second, re.MULTILINE)


def test_a_share_far_off_its_rate_is_marked() -> None:
    """Catches a table that shows a wrong mix without a word."""
    sizes = np.full(100, 5)
    examples = PlannedExamples(
        np.repeat([0, 1], [75, 25]),
        np.zeros(100, int),
        np.zeros(100, np.uint64),
        np.arange(100),
        *[sizes] * 6,
    )
    batch = StepBatch(
        0, 0, "causal_lm", empty_batch(0, 10), 1000, 500, 500, {}, {}, {"a": 0, "b": 0}, examples
    )
    counts = count_plans([batch], 100, 10, 2, 1)
    marks = []
    for mix in ([0.5, 0.5], [0.7, 0.3]):
        statistics = Statistics(0, "causal_lm", "ab", np.array(mix), ["x"], [None], counts, None)  # type: ignore[arg-type]
        marks.append(terminal_table(sources_table(statistics)).split("\n")[2].count("!"))
    assert marks == [3, 0]


@pytest.mark.parametrize(
    ("argument", "part"),
    [
        ("inspect.step=-1", "inspect.step=-1"),
        ("inspect.colour=red", "inspect.colour='red'"),
        ("inspect.rows=x", "inspect.rows='x'"),
        ("inspect.nothing=1", "inspect.nothing"),
        ("inspect.page=/dev/null/page.html", "inspect.page"),
        ("inspect.page=/tmp", "inspect.page=/tmp: a folder"),
        ("curriculum=[{mix: {gamma: 1}, objective: ul2}]", "gamma"),
        ("data.example_tokens=32", "data.example_tokens=32 with data.packing=released"),
    ],
)
def test_bad_input_is_one_line(
    small: Small, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], argument: str, part: str
) -> None:
    """Catches a traceback, another exit code than 2, or a message that doesn't say which key."""
    with pytest.raises(SystemExit) as stop:
        run(*small(tmp_path / "run", argument))
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert part in captured.err


@pytest.mark.skipif(not (DATA / "c4").is_dir(), reason=f"OPENMOE_DATA={DATA} is not there")
def test_real_text(small: Small, run: Run, tmp_path: Path) -> None:
    """Catches a look that only works on made-up text; shares must lie within their standard errors."""
    mix = "{c4: 2, stack_python: 1, wikipedia_en: 1}"
    arguments = small(tmp_path / "run", f"data.root={DATA}", f"curriculum=[{{mix: {mix}, objective: ul2}}]")
    page = tmp_path / "page.html"
    shape = ["model.vocab_size=1408", "train.seq_len=512"]
    shape += ["data.tokenizer.vocab_size=1024", "data.tokenizer.sample_bytes_per_source=50000"]
    printed = run(*arguments, *shape, f"inspect.page={page}", "inspect.built_rows=200")
    shares = [
        line for line in printed.split("\n") if re.match(r"  (c4|stack_|wiki|\[...\]).* [+-]0\.\d{3}", line)
    ]
    assert len(shares) == 3 + 6
    assert not any("!" in line for line in shares)
    assert len(PageReader(page).rows) == 8
