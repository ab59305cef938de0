"""The page of a run's rows: one HTML file that needs nothing else, no network and no script."""

import base64
import os
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from openmoe.data.inspection import Share
from openmoe.launcher.inspect_figure import draw_lengths
from openmoe.launcher.inspect_rows import Part, Row, Segment, TokenKind, TokenReader
from openmoe.launcher.inspect_style import STYLE
from openmoe.launcher.inspect_tables import Statistics, Table, statistics_tables

# Rows are unfolded until this many tokens stand open; the others open with a click.
OPEN_TOKENS = 50_000

CLASSES: dict[TokenKind, str] = {"mode": "m", "sentinel": "s", "eos": "e"}


def write_page(
    path: Path,
    facts: Mapping[str, str],
    statistics: Statistics | None,
    rows: Sequence[Row],
    reader: TokenReader,
) -> None:
    """Write the page; a file of that name is replaced when the new one is whole."""
    fresh = path.with_name(path.name + ".new")
    with fresh.open("w", encoding="utf-8") as file:
        file.writelines(_page(facts, statistics, rows, reader))
    os.replace(fresh, path)


def _page(
    facts: Mapping[str, str], statistics: Statistics | None, rows: Sequence[Row], reader: TokenReader
) -> Iterator[str]:
    yield (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(facts['run'])}, step {escape(facts['step'])}</title>\n"
        f"<style>{STYLE}</style></head><body>\n<h1>What the model sees</h1>\n<dl class=facts>"
    )
    for name, fact in facts.items():
        yield f"<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>\n"
    yield "</dl>\n"
    if statistics is not None:
        yield from _statistics(statistics)
    if rows:
        yield f"<h2>Rows</h2>\n{LEGEND}\n"
    shown_tokens = 0
    for row in rows:
        yield from _row(row, reader, is_open=shown_tokens == 0 or shown_tokens + row.positions <= OPEN_TOKENS)
        shown_tokens += row.positions
    yield "</body></html>\n"


LEGEND = (
    "<div class=legend>"
    "<span class=in><i>inputs</i></span> <span class=loss><i>targets, with loss</i></span> "
    "<i class=m>mode string</i> <i class=s>⟨0⟩</i> sentinel <i class=e>⟨eos⟩</i> "
    "<span class=pad>padding</span> ↵ newline, → tab, · a space that doesn't just part words, "
    "a thin bar: byte of the next sign. Point at a token for its id and position. "
    "Each position predicts its token from those before it in its segment."
    "</div>"
)


def _statistics(statistics: Statistics) -> Iterator[str]:
    counts = statistics.counts
    yield (
        f"<h2>Statistics of {counts.rows:,} rows</h2>\n<p class=quiet>steps {counts.first_step:,} to "
        f"{counts.past_step - 1:,}, phase {statistics.phase}: {escape(statistics.objective)}</p>\n"
    )
    for table in statistics_tables(statistics):
        yield from _table(table)
    picture = draw_lengths(statistics)
    if picture is not None:
        data = base64.b64encode(picture).decode()
        yield (
            '<figure><img alt="Lengths of spans and prefixes by denoiser, as read and as asked for" '
            f'src="data:image/png;base64,{data}"><figcaption>Lengths of spans and prefixes in '
            f"{statistics.measures.rows:,} built rows</figcaption></figure>\n"
        )


def _table(table: Table) -> Iterator[str]:
    yield f"<h3>{escape(table.title)}</h3>\n<div class=wide><table><thead><tr>"
    yield from (f"<th>{escape(name)}</th>" for name in table.header)
    if table.shares:
        yield "<th></th>"
    yield "</tr></thead><tbody>\n"
    longest = max((max(share.realised, share.configured) for share in table.shares), default=0.0)
    for index, line in enumerate(table.lines):
        first, *others = (escape(cell) for cell in line)
        bar = _bar(table.shares[index], longest) if table.shares else ""
        yield f"<tr><th>{first}</th>{''.join(f'<td>{cell}</td>' for cell in others)}{bar}</tr>\n"
    yield f"</tbody></table></div>\n<p class=quiet>{escape(table.note)}</p>\n"


def _bar(share: Share, longest: float) -> str:
    """The realised share as a bar, the configured one as a mark on it."""
    realised, configured = (96 * value / longest for value in (share.realised, share.configured))
    mark = f'<b style="width:{realised:.2f}%"></b><u style="left:{configured:.2f}%"></u>'
    return f"<td class=bar><div>{mark}</div></td>"


def _row(row: Row, reader: TokenReader, is_open: bool) -> Iterator[str]:
    segments = len(row.segments)
    yield (
        f"<details class=row{' open' if is_open else ''}><summary>"
        f"<b>step {row.step:,}, row {row.number:,}</b> {escape(row.objective)}: "
        f"{row.positions - row.padding:,} of {row.positions:,} positions in {segments} "
        f"segment{'s' * (segments != 1)}, {row.count(True):,} with loss, {row.padding:,} padding"
        f"{_map(row)}</summary>\n"
    )
    for segment in row.segments:
        yield from _segment(segment, reader)
    if row.padding:
        yield f'<div class=pad title="0">{row.padding:,} padding</div>\n'
    yield "</details>\n"


def _map(row: Row) -> str:
    """A strip as long as the row: where inputs, targets and padding lie."""
    pieces = [
        (len(part.tokens), "loss" if part.has_loss else "in")
        for segment in row.segments
        for part in segment.parts
    ]
    pieces.append((row.padding, "pad"))
    drawn = "".join(
        f'<span class={name} style="width:{100 * tokens / row.positions:.3f}%"></span>'
        for tokens, name in pieces
        if tokens
    )
    return f"<span class=map>{drawn}</span>"


def _segment(segment: Segment, reader: TokenReader) -> Iterator[str]:
    past = segment.text_start + segment.text_tokens
    yield (
        f"<section><h4><b>{segment.number}</b> {escape(segment.source)} "
        f"<em>{escape(segment.class_name)}</em> "
        f"<small>text tokens {segment.text_start:,} to {past - 1:,} of its source; "
        f"{segment.count(False):,} inputs, {segment.count(True):,} targets</small></h4>\n"
    )
    yield "<div class=parts>"
    for part in segment.parts:
        yield f"<p class={'loss' if part.has_loss else 'in'}>"
        yield from _tokens(part, reader)
        yield "</p>\n"
    yield "</div></section>\n"


def _tokens(part: Part, reader: TokenReader) -> Iterator[str]:
    for position, token in enumerate(reader.read(part), part.first):
        kind = CLASSES.get(token.kind)
        # A newline is shown, and it breaks the line.
        text = escape(token.shown).replace("↵", "↵\n")
        yield f'<i{f" class={kind}" if kind else ""} title="{token.id} @{position}">{text}</i>'
