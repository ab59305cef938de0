"""The documentation says what the code does."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

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


MIXES = {
    "version I": ("openmoe_8b", 0),
    "version II": ("openmoe_8b", 1),
    "version III": ("openmoe_34b", 0),
    "no code": ("openmoe_base_no_code", 0),
    "30% code": ("openmoe_base_code_30", 0),
}


def mix_of(column: str) -> dict[str, float]:
    (table,) = (table for table in tables("paper_to_config.md") if "version I" in table[0])
    return {row["source"]: float(row[column]) for row in table if row[column]}


@pytest.mark.parametrize("column", MIXES)
def test_mixes(column: str) -> None:
    """Bug: a share of Table 1 mistyped, or a mix that does not sum to 100."""
    experiment, phase = MIXES[column]
    mix = composed(experiment)["curriculum"][phase]["mix"]
    assert mix_of(column) == mix
    assert sum(mix.values()) == pytest.approx(100)


def test_derived_mixes() -> None:
    """Bug: an ablation of the code that also shifts the other sources among themselves."""
    whole, none, third = mix_of("version I"), mix_of("no code"), mix_of("30% code")
    code = {"github", "the_stack_dedup"}
    assert none == {source: 2 * rate for source, rate in whole.items() if source != "the_stack_dedup"}
    assert sum(third[source] for source in code) == pytest.approx(30, abs=1e-3)
    for part in (code, whole.keys() - code):
        scale = sum(third[source] for source in part) / sum(whole[source] for source in part)
        assert {s: third[s] for s in part} == pytest.approx({s: scale * whole[s] for s in part}, abs=1e-4)


def test_denoisers() -> None:
    """Bug: a denoiser of Table 2 with another value, on the page or in one of the experiments."""
    (table,) = (table for table in tables("paper_to_config.md") if "mean_span" in table[0])
    for experiment in SIZES.values():
        assert len(table) == len(value_of(experiment, "data.denoisers"))
        for row in table:
            denoiser = value_of(experiment, row["key"])
            assert row["mode"] + " " == denoiser["mode"]
            assert all(same(row[key], denoiser[key]) for key in ("mean_span", "density", "rate"))


ABLATIONS = [row for table in tables("paper_to_config.md") for row in table if "ablation" in row]


@pytest.mark.parametrize("experiment", sorted({row["experiment"] for row in ABLATIONS}))
def test_ablations(experiment: str) -> None:
    """Bug: an ablation that changes another thing than the page says, or nothing at all."""
    rows = {row["key"]: row for row in ABLATIONS if row["experiment"] == experiment}
    assert changed_keys("openmoe_base", experiment) == {"run.dir", *rows}
    assert value_of(experiment, "run.dir") == f"runs/{experiment}"
    for key, row in rows.items():
        for name, cell in (("openmoe_base", row["openmoe_base"]), (experiment, row["here"])):
            value = value_of(name, key)
            assert mix_of(cell) == value if key.endswith(".mix") else same(cell, value)


def changed_keys(first: str, second: str) -> set[str]:
    """Dotted keys at which two experiments differ; a mix is one value, and naming one changes nothing."""
    flat = [flatten({k: v for k, v in composed(name).items() if k != "mixes"}) for name in (first, second)]
    return {key for key in flat[0].keys() | flat[1].keys() if flat[0].get(key) != flat[1].get(key)}


def flatten(value: Any, key: str = "") -> dict[str, Any]:
    if key.endswith(".mix") or not isinstance(value, dict | list) or not value:
        return {key: value}
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for name, part in parts for k, v in flatten(part, f"{key}.{name}".strip(".")).items()}


def test_llama_tokenizer_fits() -> None:
    """Bug: sentinels beyond the embedding, or more rows than its 32,000 pieces, pad and sentinels need."""
    ids = 32_000 + 1 + 300
    assert value_of("openmoe_base_llama_tokenizer", "model.vocab_size") == -(-ids // 128) * 128


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_named_files_exist(page: str) -> None:
    """Bug: a page sends its reader to a file that was renamed."""
    text = (DOCS / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    missing = [link for link in links if not (DOCS / link).exists()]
    paths = re.findall(r"`((?:[a-z_]+/)+(?:[a-z_0-9]+\.[a-z]+)?)`", text)
    assert not missing + [path for path in paths if not (DOCS.parent / path).exists()]
