"""Any bad value of any key of the schema: one line that names the key. The schema yields the values."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openmoe.launcher.entry import load_config
from openmoe.launcher.errors import ConfigError
from openmoe.launcher.schema import Config, validate

from .conftest import SMALL

SCHEMA = Config.model_json_schema()
Path_ = tuple[str | int, ...]

# What stands for each kind of section, so that every key of the schema occurs.
PAGES = {
    "adafactor, inverse_sqrt": [],
    "adafactor, linear_warmup": ["optim.schedule.name=linear_warmup"],
    "adafactor, constant": ["~optim.schedule", "+optim.schedule={name: constant, value: 1e-3}"],
    "adamw, cosine": ["optim=adamw"],
}


def resolve(schema: dict[str, Any], value: Any) -> dict[str, Any]:
    """`schema` without references; of alternatives the one that `value` belongs to."""
    if "$ref" in schema:
        return resolve(SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]], value)
    if "discriminator" in schema:
        tag = schema["discriminator"]["mapping"][value[schema["discriminator"]["propertyName"]]]
        return resolve({"$ref": tag}, value)
    return schema


def keys(schema: dict[str, Any], value: Any, path: Path_ = ()) -> Iterator[tuple[Path_, dict[str, Any]]]:
    """Every place of the page with its schema, sections and lists included."""
    schema = resolve(schema, value)
    if path:
        yield path, schema
    if schema.get("type") == "object":
        other = [schema.get("additionalProperties"), *schema.get("patternProperties", {}).values()]
        free: dict[str, Any] = next((inner for inner in other if inner), {})
        for name, inner in value.items():
            yield from keys(schema.get("properties", {}).get(name, free), inner, (*path, name))
    if schema.get("type") == "array":
        for index, inner in enumerate(value):
            yield from keys(schema["items"], inner, (*path, index))


TEXT = st.text(st.characters(codec="utf-8"), max_size=30)
ANY = {
    "null": st.none(),
    "boolean": st.booleans(),
    "integer": st.integers(-(2**70), 2**70),
    "number": st.floats(),
    "string": TEXT,
    "array": st.lists(st.integers() | TEXT, max_size=2),
    "object": st.dictionaries(TEXT, st.integers(), max_size=2),
}


def bad_values(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that the schema does not allow: of another type, out of range, not finite, no known choice."""
    allowed = schema.get("anyOf", [schema])
    types = {option["type"] for option in allowed}
    if "number" in types:
        types.add("integer")  # 1 is a number
    strategies = [strategy for name, strategy in ANY.items() if name not in types]
    for option in allowed:
        strategies += _out_of_range(option)
    return st.one_of(strategies)


def _out_of_range(option: dict[str, Any]) -> list[st.SearchStrategy[Any]]:
    strategies: list[st.SearchStrategy[Any]] = []
    if "const" in option or "enum" in option:
        known = option.get("enum", [option.get("const")])
        strategies.append(TEXT.filter(lambda text: text not in known))
    elif option["type"] == "integer":
        low = option.get("minimum", option.get("exclusiveMinimum", -1) + 1)
        strategies.append(st.integers(max_value=low - 1))
        if "maximum" in option or "exclusiveMaximum" in option:
            high = option.get("maximum", option.get("exclusiveMaximum", 0) - 1)
            strategies.append(st.integers(min_value=high + 1))
    elif option["type"] == "number":
        strategies.append(st.sampled_from([math.nan, math.inf, -math.inf]))
        if "minimum" in option:
            strategies.append(st.floats(max_value=option["minimum"], exclude_max=True))
        if "exclusiveMinimum" in option:
            strategies.append(st.floats(max_value=option["exclusiveMinimum"]))
        if "maximum" in option:
            strategies.append(st.floats(min_value=option["maximum"], exclude_min=True))
        if "exclusiveMaximum" in option:
            strategies.append(st.floats(min_value=option["exclusiveMaximum"]))
    elif option["type"] == "string" and "pattern" in option:
        strategies.append(st.sampled_from(["", "\0", "a\0b"]))
    elif option["type"] == "array" and option.get("minItems"):
        strategies.append(st.just([]))
    elif option["type"] == "object":
        names = TEXT.filter(lambda name: name not in option.get("properties", {}))
        if "propertyNames" in option:
            names = st.sampled_from(["", "two words", "a/b", "-", "a\nb", "x" * 200])
        if option.get("additionalProperties") is False or "propertyNames" in option:
            strategies.append(names.map(_Unknown))
    return strategies


class _Unknown(str):
    """A key to be added to a section, not a value to replace it."""


@pytest.fixture(scope="session", params=PAGES)
def page(request: pytest.FixtureRequest) -> dict[str, Any]:
    """All values of a valid page."""
    return load_config([*SMALL, "run.dir=x", *PAGES[request.param]]).model_dump()


def dotted(path: Path_) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)[1:]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_bad_value_is_named_in_one_line(page: dict[str, Any], data: st.DataObject) -> None:
    """Bug: a value that is silently converted or only fails hours later; an error without the key, or of many
    lines."""
    places = list(keys(SCHEMA, page))
    path, schema = data.draw(st.sampled_from(places), label="key")
    value = data.draw(bad_values(schema), label="value")
    values = copy.deepcopy(page)
    owner: Any = values
    for part in path[:-1]:
        owner = owner[part]
    if isinstance(value, _Unknown):
        owner[path[-1]][str(value)] = 1
    else:
        owner[path[-1]] = value
    with pytest.raises(ConfigError) as caught:
        validate(values, Config)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    assert len(message) < 1000
    assert message.startswith(dotted(path)) or len(path) == 1, message


def test_every_key_of_the_schema_is_tried() -> None:
    """Bug: a section that the walk misses, so that the test above says nothing of it."""
    found = set()
    for overrides in PAGES.values():
        page = load_config([*SMALL, "run.dir=x", *overrides]).model_dump()
        found |= {(schema.get("title") or dotted(path), path[-1]) for path, schema in keys(SCHEMA, page)}
    names = {name for _, name in found}
    for definition in SCHEMA["$defs"].values():
        assert set(definition["properties"]) <= names, definition["title"]
