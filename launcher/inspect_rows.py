"""The rows of a batch taken apart for people: segments, their parts, the text of each token."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

from openmoe.data.loader import StepBatch
from openmoe.data.tokenizer import EOS, SENTINELS, Tokenizer, load_processor

# What a token is: text, or one of the marks around it.
TokenKind = Literal["text", "mode", "sentinel", "eos"]


class Token(NamedTuple):
    id: int
    kind: TokenKind
    # What is shown; empty for a byte of a character that a later token completes.
    shown: str


@dataclass(frozen=True)
class Part:
    """Neighbouring positions of a segment that all carry loss, or all don't."""

    # Position in the row.
    first: int
    has_loss: bool
    # int32 [tokens]
    tokens: np.ndarray
    # The first so many are the mode string.
    mode_tokens: int


@dataclass(frozen=True)
class Segment:
    """One example in its row."""

    number: int
    source: str
    class_name: str
    # Where its text begins in the source's endless stream, and how much it read.
    text_start: int
    text_tokens: int
    parts: Sequence[Part]

    def count(self, has_loss: bool) -> int:
        return sum(len(part.tokens) for part in self.parts if part.has_loss == has_loss)


@dataclass(frozen=True)
class Row:
    step: int
    # In the global batch of its step.
    number: int
    objective: str
    positions: int
    segments: Sequence[Segment]

    def count(self, has_loss: bool) -> int:
        return sum(segment.count(has_loss) for segment in self.segments)

    @property
    def padding(self) -> int:
        return self.positions - self.count(True) - self.count(False)


def read_rows(
    batch: StepBatch,
    rows: int,
    sources: Sequence[str],
    classes: Sequence[str],
    modes: Sequence[Sequence[int]],
) -> list[Row]:
    """The first `rows` rows of a batch that begins with the first row of its step.

    What is where comes from the arrays that the model gets; class and place in the source come from the plan.
    `classes` and `modes` are the names and mode strings of the phase's classes.
    """
    planned = batch.examples
    result = []
    for number in range(min(rows, len(batch.arrays["target_tokens"]))):
        ids, weights, marks, source_ids = (
            batch.arrays[name][number]
            for name in ("target_tokens", "loss_weights", "segment_ids", "source_ids")
        )
        first_example = int(np.searchsorted(planned.row, number))
        segments = []
        changes = np.flatnonzero(np.diff(marks)) + 1
        for begin, end in zip([0, *changes.tolist()], [*changes.tolist(), len(marks)], strict=True):
            if marks[begin] == 0:
                continue
            example = first_example + int(marks[begin]) - 1
            mode = modes[int(planned.kind[example])]
            segments.append(
                Segment(
                    number=int(marks[begin]),
                    source=sources[int(source_ids[begin])],
                    class_name=classes[int(planned.kind[example])],
                    text_start=int(planned.start[example]),
                    text_tokens=int(planned.raw_tokens[example]),
                    parts=_parts(ids, weights > 0, begin, end, mode),
                )
            )
        result.append(Row(batch.step, number, batch.objective, len(marks), segments))
    return result


def _parts(ids: np.ndarray, loss: np.ndarray, begin: int, end: int, mode: Sequence[int]) -> list[Part]:
    cuts = (np.flatnonzero(np.diff(loss[begin:end])) + begin + 1).tolist()
    parts = []
    for first, past in zip([begin, *cuts], [*cuts, end], strict=True):
        has_mode = first == begin and ids[first : first + len(mode)].tolist() == list(mode)
        parts.append(Part(first, bool(loss[first]), ids[first:past], len(mode) if has_mode else 0))
    return parts


class TokenReader:
    """The text of single tokens, fit to be printed."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._first_sentinel = tokenizer.first_sentinel
        self._processor = load_processor(tokenizer.model, "tokenizer")
        self._piece = lru_cache(maxsize=65_536)(self._read_piece)

    def _read_piece(self, token: int) -> str | int:
        """The piece's text as it is shown, or the byte that it stands for."""
        piece: str = self._processor.id_to_piece(token)
        if self._processor.is_byte(token):
            return int(piece[1:-1], 16)
        return visible(piece.replace("\u2581", " "))

    def read(self, part: Part) -> list[Token]:
        """Every token of the part, in order."""
        first_sentinel = self._first_sentinel
        tokens: list[Token] = []
        ids = part.tokens.tolist()
        at = 0
        while at < len(ids):
            token = ids[at]
            kind: TokenKind = "mode" if at < part.mode_tokens else "text"
            if token == EOS:
                tokens.append(Token(token, "eos", "⟨eos⟩"))
            elif first_sentinel - SENTINELS < token <= first_sentinel:
                tokens.append(Token(token, "sentinel", f"⟨{first_sentinel - token}⟩"))
            elif isinstance(piece := self._piece(token), int):
                run = self._character(ids[at : at + 4])
                tokens += [Token(ids[at + i], kind, shown) for i, shown in enumerate(run)]
                at += len(run) - 1
            else:
                tokens.append(Token(token, kind, piece))
            at += 1
        return tokens

    def _character(self, ids: Sequence[int]) -> list[str]:
        """What to show for the byte pieces that `ids` begin with: those of one character, or a single one."""
        values: list[int] = []
        for token in ids:
            value = self._piece(token)
            if not isinstance(value, int):
                break
            values.append(value)
            try:
                return [""] * (len(values) - 1) + [visible(bytes(values).decode())]
            except UnicodeDecodeError:
                continue
        return [f"\\x{values[0]:02x}"]


def visible(text: str) -> str:
    """Text on one line with everything in it to be seen, and nothing that a terminal would obey.

    A space that only parts two words stays; others become a dot. Control characters, other kinds of space
    and marks that turn the direction of writing become escapes.
    """
    marks = {"\n": "↵", "\t": "→"}
    shown = []
    for at, sign in enumerate(text):
        if sign == " ":
            parts_words = at == 0 and len(text) > 1 and not text[1].isspace()
            shown.append(" " if parts_words else "·")
        elif sign in marks:
            shown.append(marks[sign])
        else:
            shown.append(sign if sign.isprintable() else sign.encode("unicode_escape").decode())
    return "".join(shown)
