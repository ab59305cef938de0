"""The documentation says what the code does."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from openmoe.data.ul2 import DENOISERS
from openmoe.launcher.entry import load_config

DOCS = Path(__file__).resolve().parents[1] / "docs"
SIZES = {"Base": "openmoe_base", "8B": "openmoe_8b", "34B": "openmoe_34b"}


def tables(page: str) -> list[list[dict[str, str]]]:
    """The tables of a page, each a list of rows by column name."""
    result = []
    for block in re.findall(r"(?:^\|.*\|\n)+", (DOCS / page).read_text(), re.MULTILINE):
        header, _, *rows = [
            [c.strip().strip("`") for c in line[1:-1].split("|")] for line in block.splitlines()
        ]
        result.append([dict(zip(header, row, strict=True)) for row in rows])
    return result


@cache
def composed(experiment: str) -> dict[str, Any]:
    return load_config([f"experiment={experiment}"]).model_dump()


def value_of(experiment: str, key: str) -> Any:
    value: Any = composed(experiment)
    for part in key.split("."):
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value


def same(cell: str, value: Any) -> bool:
    if value is None or isinstance(value, bool | str):
        return cell == {None: "null", True: "true", False: "false"}.get(value, value)
    return float(cell.replace(",", "")) == value


SIZE_ROWS = [
    (row["key"], experiment, row[size])
    for table in tables("paper_to_config.md")
    for row in table
    if "Base" in row
    for size, experiment in SIZES.items()
    if row[size]
]
DIFFERENCES = [
    (row["key"], experiment, row["paper"], row["released"])
    for table in tables("paper_to_config.md")
    for row in table
    if "released" in row
    for experiment in ([row["experiment"]] if "experiment" in row else ["openmoe_base", "openmoe_8b"])
]


@pytest.mark.parametrize(("key", "experiment", "cell"), SIZE_ROWS)
def test_numbers_of_the_paper(key: str, experiment: str, cell: str) -> None:
    """Bug: a config drifts away from the paper, or the page from the config."""
    assert same(cell, value_of(experiment, key)), f"{experiment}: {key}={value_of(experiment, key)}"


@pytest.mark.parametrize(("key", "experiment", "paper", "released"), DIFFERENCES)
def test_differences_between_paper_and_released_code(
    key: str, experiment: str, paper: str, released: str
) -> None:
    """Bug: a released variant that differs in something else than the page says."""
    assert same(paper, value_of(experiment, key))
    assert same(released, value_of(f"{experiment}_released", key))


def test_mixes() -> None:
    """Bug: a share of Table 1 mistyped, or a mix that does not sum to 100."""
    (table,) = (table for table in tables("paper_to_config.md") if "version I" in table[0])
    phases = {
        "version I": ("openmoe_8b", 0),
        "version II": ("openmoe_8b", 1),
        "version III": ("openmoe_34b", 0),
    }
    for version, (experiment, phase) in phases.items():
        mix = composed(experiment)["curriculum"][phase]["mix"]
        assert {row["source"]: float(row[version]) for row in table if row[version]} == mix
        assert sum(mix.values()) == pytest.approx(100)


def test_denoisers() -> None:
    """Bug: a denoiser of Table 2 with another rate."""
    (table,) = (table for table in tables("paper_to_config.md") if "mean span" in table[0])
    for row, denoiser in zip(table, DENOISERS, strict=True):
        assert row["mode"] == denoiser.mode.strip()
        assert float(row["share of examples"]) == denoiser.rate
        if denoiser.mean_span is not None:
            assert float(row["mean span"]) == denoiser.mean_span
            assert float(row["corrupted"]) == denoiser.density


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_named_files_exist(page: str) -> None:
    """Bug: a page sends its reader to a file that was renamed."""
    text = (DOCS / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    missing = [link for link in links if not (DOCS / link).exists()]
    paths = re.findall(r"`((?:[a-z_]+/)+(?:[a-z_0-9]+\.[a-z]+)?)`", text)
    assert not missing + [path for path in paths if not (DOCS.parent / path).exists()]
