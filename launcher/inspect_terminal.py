"""Rows for the terminal: inputs and targets of each segment, in colour where wanted."""

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from unicodedata import east_asian_width

from openmoe.launcher.inspect_rows import Part, Row, Segment, Token, TokenKind, TokenReader

# SGR codes: what a token is, in inputs and in targets. Targets carry loss and are underlined.
INPUTS, TARGETS = "36", "4;33"
MARKS: dict[TokenKind, str] = {"mode": "1;32", "sentinel": "1;35", "eos": "1;31"}
QUIET = "2"
LOSS = "4"

# Shown of a long part, tokens at its beginning and end, and of a row with many segments.
HEAD_TOKENS, TAIL_TOKENS = 160, 80
HEAD_SEGMENTS, TAIL_SEGMENTS = 3, 1

INDENT = " " * 20


class RowPrinter:
    """Makes text of rows; `width` is the terminal's, `whole` leaves nothing out."""

    def __init__(self, reader: TokenReader, colours: bool, width: int, whole: bool) -> None:
        self._reader = reader
        self._colours = colours
        self._width = max(40, width)
        self._whole = whole

    def legend(self) -> str:
        parts = (
            self._paint("inputs", INPUTS),
            self._paint("targets (with loss)", TARGETS),
            self._paint("mode string", MARKS["mode"]),
            self._paint("⟨0⟩ sentinel", MARKS["sentinel"]),
            self._paint("⟨eos⟩", MARKS["eos"]),
            "↵ newline, → tab, · space where it doesn't just part words",
        )
        return "Rows: " + "  ".join(parts) + "\nEach position predicts its token from those before it."

    def text(self, row: Row) -> str:
        """The whole row, or beginning and end of what is long."""
        loss = row.count(True)
        lines = [
            f"step {row.step:,} row {row.number:,}  {row.objective}: {row.positions - row.padding:,} of "
            f"{row.positions:,} positions in {len(row.segments)} segment{'s' * (len(row.segments) != 1)}, "
            f"{loss:,} with loss, {row.padding:,} padding"
        ]
        segments = row.segments
        if self._whole or len(segments) <= HEAD_SEGMENTS + TAIL_SEGMENTS + 1:
            lines += map(self._segment, segments)
        else:
            left_out = segments[HEAD_SEGMENTS:-TAIL_SEGMENTS]
            lines += map(self._segment, segments[:HEAD_SEGMENTS])
            lines += [self._paint(line, QUIET) for line in self._wrapped(_summary(left_out))]
            lines += map(self._segment, segments[-TAIL_SEGMENTS:])
        if row.padding:
            lines.append(self._paint(f"  {row.padding:,} padding", QUIET))
        return "\n".join(lines)

    def _segment(self, segment: Segment) -> str:
        text_end = segment.text_start + segment.text_tokens
        head = (
            f"  {segment.number}. {segment.source}, {segment.class_name}, from text tokens "
            f"{segment.text_start:,} to {text_end - 1:,}"
        )
        return "\n".join([head, *map(self._part, segment.parts)])

    def _part(self, part: Part) -> str:
        name = f"    {'targets' if part.has_loss else 'inputs'} {len(part.tokens):,}"
        lines = [f"{name:<{len(INDENT)}}"]
        room = self._width - len(INDENT)
        used = 0
        for token in self._shortened(self._reader.read(part)):
            text, style = self._styled(token, part.has_loss)
            for start in range(0, max(1, len(text)), room):  # a piece may be longer than a line
                piece = text[start : start + room]
                if used + columns(piece) > room:
                    lines.append(INDENT)
                    used = 0
                lines[-1] += self._paint(piece, style)
                used += columns(piece)
        return "\n".join(lines)

    def _styled(self, token: Token | int, has_loss: bool) -> tuple[str, str]:
        if isinstance(token, int):
            return f" [... {token:,} tokens ...] ", QUIET
        style = MARKS.get(token.kind)
        if style is None:
            return token.shown, TARGETS if has_loss else INPUTS
        return token.shown, f"{LOSS};{style}" if has_loss else style

    def _shortened(self, tokens: Sequence[Token]) -> Iterator[Token | int]:
        """The tokens to show; a number stands for so many left out."""
        left_out = len(tokens) - HEAD_TOKENS - TAIL_TOKENS
        if self._whole or left_out <= TAIL_TOKENS:
            yield from tokens
            return
        yield from tokens[:HEAD_TOKENS]
        yield left_out
        yield from tokens[-TAIL_TOKENS:]

    def _wrapped(self, text: str) -> list[str]:
        return textwrap.wrap(text, self._width - 2, initial_indent="  ", subsequent_indent="    ")

    def _paint(self, text: str, style: str) -> str:
        return f"\x1b[{style}m{text}\x1b[0m" if self._colours and text else text


def columns(text: str) -> int:
    """Cells of a terminal that `text` takes."""
    return sum(2 if east_asian_width(sign) in "WF" else 1 for sign in text)


def _summary(segments: Sequence[Segment]) -> str:
    """One line on segments that are left out."""
    kinds = Counter(f"{segment.source} {segment.class_name}" for segment in segments)
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return f"[... {len(segments)} segments: {listed} ...]"
