"""See what a run's model sees: `python -m openmoe.launcher.inspect_data experiment=NAME [key=value ...]`."""

import os
import shutil
import signal
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from openmoe.data.config import LARGEST_COUNT, ObjectiveName, PathText
from openmoe.data.curriculum import Curriculum
from openmoe.data.inspection import class_denoisers, count_plans, expected_mix, measure_rows
from openmoe.data.loader import Loader
from openmoe.data.prepare import PreparedData, prepare
from openmoe.launcher.entry import run_command
from openmoe.launcher.errors import ConfigError
from openmoe.launcher.inspect_page import write_page
from openmoe.launcher.inspect_rows import Row, TokenReader, read_rows
from openmoe.launcher.inspect_tables import Statistics, statistics_tables, terminal_table
from openmoe.launcher.inspect_terminal import RowPrinter
from openmoe.launcher.schema import Config
from openmoe.launcher.train import source_names


class InspectConfig(BaseModel, strict=True, extra="forbid", frozen=True):
    # The first step to look at, counted from 0; the run need not reach it.
    step: int = Field(ge=0, le=LARGEST_COUNT)
    # Rows to show from there on.
    rows: int = Field(ge=0, le=10_000)
    # All of a long row in the terminal.
    whole: bool
    # Rows to count from there on, up to the end of the phase; 0: no statistics.
    statistics_rows: int = Field(ge=0, le=10_000_000)
    # Of these, how many to build.
    built_rows: int = Field(ge=1, le=1_000_000)
    # HTML file.
    page: PathText | None
    colour: Literal["auto", "always", "never"]


class InspectPage(Config):
    inspect: InspectConfig


def main() -> None:
    if hasattr(signal, "SIGPIPE"):  # `| head` ends the command quietly
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if isinstance(sys.stdout, TextIOWrapper):  # a terminal that lacks a letter gets its number
        sys.stdout.reconfigure(errors="backslashreplace")
    run_command(inspect, InspectPage, "inspect_data")


def inspect(page: InspectPage) -> None:
    """Write the page where one is asked for, then print statistics and rows."""
    asked = page.inspect
    target = _page_file(asked.page)
    data = prepare(page.data, page.model.vocab_size, source_names(page))
    statistics = gather_statistics(page, data) if asked.statistics_rows else None
    rows = shown_rows(page, data)
    reader = TokenReader(data.tokenizer)
    facts = run_facts(page, data)
    if target is not None:
        write_page(target, facts, statistics, rows, reader)
    print("\n".join(f"{name:<11}{fact}" for name, fact in facts.items()))
    for table in statistics_tables(statistics) if statistics else []:
        print(f"\n{terminal_table(table)}")
    width = shutil.get_terminal_size((110, 24)).columns
    printer = RowPrinter(reader, _colours(asked.colour), width, asked.whole)
    if rows:
        print(f"\n{printer.legend()}")
    for row in rows:
        print(f"\n{printer.text(row)}")
    if target is not None:
        print(f"\npage: {target}")


def shown_rows(page: InspectPage, data: PreparedData) -> list[Row]:
    """The rows from inspect.step on, each as the model will see it."""
    wanted, rows = page.inspect.rows, list[Row]()
    loader = _loader(page, data, wanted)
    while len(rows) < wanted:
        batch = next(loader)
        modes = _modes(page, data, batch.objective)
        classes = loader.class_names(batch.phase)
        rows += read_rows(batch, wanted - len(rows), loader.source_names, classes, modes)
    return rows


def gather_statistics(page: InspectPage, data: PreparedData) -> Statistics:
    """Count the rows from inspect.step on, up to the end of its phase."""
    first_step, rows = page.inspect.step, page.inspect.statistics_rows
    plans = _loader(page, data, 0)
    curriculum, sources = plans.curriculum, plans.source_names
    phase = curriculum.phase_at(first_step)
    end = curriculum.end_step(phase)
    if end is not None and end > first_step:
        rows = min(rows, (end - first_step) * page.train.global_batch_rows)
    classes, objective = plans.class_names(phase), curriculum.phases[phase].objective
    counts = count_plans(plans, rows, page.train.seq_len, len(sources), len(classes))
    built = min(rows, page.inspect.built_rows)
    mode_tokens = [len(mode) for mode in _modes(page, data, objective)]
    return Statistics(
        phase=phase,
        objective=objective,
        sources=sources,
        mix=expected_mix(curriculum, phase, sources, counts.first_step, counts.past_step),
        classes=classes,
        denoisers=class_denoisers(objective, page.data),
        counts=counts,
        measures=measure_rows(_loader(page, data, built), built, data.tokenizer.first_sentinel, mode_tokens),
    )


def run_facts(page: InspectPage, data: PreparedData) -> dict[str, str]:
    """What is shown, in a few lines by name."""
    train, step = page.train, page.inspect.step
    curriculum = Curriculum(page.curriculum, train.seq_len, train.global_batch_rows)
    index = curriculum.phase_at(step)
    end = curriculum.end_step(index)
    span = f"steps {curriculum.first_step(index):,} to {end - 1:,}" if end else "to the end"
    if end is not None and step >= end:
        span += "; the run ends before this step"
    phase = curriculum.phases[index]
    rates = sorted(phase.mix.items(), key=lambda item: -item[1])
    total = sum(phase.mix.values())
    packing = f"packing {page.data.packing}"
    if page.data.example_tokens:
        packing += f", examples of up to {page.data.example_tokens:,}"
    return {
        "run": f"{page.run.dir}, seed {page.run.seed}",
        "step": f"{step:,}, after {step * curriculum.tokens_per_step:,} positions",
        "phase": f"{index} of {len(curriculum.phases)} (from 0): {phase.objective}, {span}",
        "mix": ", ".join(f"{name} {100 * rate / total:.3g}%" for name, rate in rates),
        "rows": f"{train.seq_len:,} positions, {train.global_batch_rows:,} a step, {packing}",
        "text": page.data.root or "embedded in this Python",
        "tokenizer": f"{data.tokenizer.size:,} ids, sha256 {data.tokenizer.sha256[:16]}",
    }


def _loader(page: InspectPage, data: PreparedData, rows: int) -> Loader:
    """The run's own loader at inspect.step; builds the first `rows` rows of each step, and plans all."""
    loader = Loader(
        data,
        page.curriculum,
        page.data.model_copy(update={"workers": 0}),
        page.train.seq_len,
        page.train.global_batch_rows,
        page.run.seed,
        slice(0, rows),
    )
    loader.seek(page.inspect.step)
    return loader


def _modes(page: InspectPage, data: PreparedData, objective: ObjectiveName) -> list[list[int]]:
    """The mode string of each class."""
    return [
        data.tokenizer.encode(denoiser.mode) if denoiser and page.data.mode_strings else []
        for denoiser in class_denoisers(objective, page.data)
    ]


def _page_file(path: str | None) -> Path | None:
    """The file to write the page to; its folder is made now, so that an error comes before the work."""
    if path is None:
        return None
    file = Path(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"inspect.page={path}: its folder can't be made: {error.strerror}") from None
    if file.is_dir():
        raise ConfigError(f"inspect.page={path}: a folder; give the name of a file")
    return file


def _colours(asked: Literal["auto", "always", "never"]) -> bool:
    """Colours on a terminal that wants them (no-color.org), or when asked for."""
    if asked != "auto":
        return asked == "always"
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


if __name__ == "__main__":
    main()
