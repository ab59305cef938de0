"""Programs of XLA as text (HLO): what a traced one lacks for a compiler, and what a compiled one sends."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from openmoe.parallel.axis_rules import MESH_AXES

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "bf16": 16, "f16": 16} | {
    f"{kind}{bits}": bits for kind in "usf" for bits in (4, 8, 16, 32, 64)
}
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_PARAMETER = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .* parameter\((\d+)\)(?P<rest>.*)$")
_MARK = re.compile(
    r"custom-call\([^%()]*%?([\w.\-]+)\), custom_call_target=\"Sharding\", sharding=(\{[^}]*\})"
)
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_CALLED = re.compile(r"\b(?:calls|body|condition|to_apply|async_wrapped)=%?([\w.\-]+)")
_TRIPS = re.compile(r"\"known_trip_count\":\{\"n\":\"(\d+)\"\}")
_COLLECTIVE = re.compile(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\((.*?)\)(?:[,\s]|$)")
_GROUPS = re.compile(r"replica_groups=(\{\{[\d,{}]*\}\}|\{\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)")
_PAIRS = re.compile(r"source_target_pairs=\{\{([\d,{}]*)\}\}")


@dataclass(frozen=True)
class Collectives:
    """All collectives of one kind over one part of the mesh, in one run of a program on one device."""

    kind: str
    axes: str  # names of mesh axes; "part of" where the groups do not span them
    count: int
    operand_bytes: int  # what goes in on one device


def for_compiler(text: str, aliases: Iterable[tuple[int, int]]) -> str:
    """A traced program with the layouts of its parameters, and with outputs that take over the memory of
    parameters.

    Placeholders have no layout of their own; the mark behind each of them says how it is to lie. `aliases`
    are pairs (output, parameter): a tensor updated in place.
    """
    lines = text.splitlines()
    marks = {match[1]: match[2] for line in lines if (match := _MARK.search(line))}
    for i, line in enumerate(lines):
        match = _PARAMETER.match(line)
        if match and match[1] in marks and "sharding=" not in match["rest"]:
            number = f"parameter({match[2]})"
            lines[i] = line.replace(number, f"{number}, sharding={marks[match[1]]}")
    pairs = ", ".join(f"{{{output}}}: ({parameter}, {{}}, may-alias)" for output, parameter in aliases)
    lines[0] = re.sub(r"^HloModule [^,]+", rf"\g<0>, input_output_alias={{ {pairs} }}", lines[0])
    return "\n".join(lines)


def collectives(compiled: str, mesh: Sequence[int]) -> list[Collectives]:
    """The collectives of a compiled program, whose operands are printed with their shapes, on a mesh of
    `MESH_AXES` with these sizes. One inside a loop counts as often as the loop turns.

    Raises ValueError for a loop with an unknown number of turns around one.
    """
    computations = _computations(compiled)
    times = _times_run(computations)
    found: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for name, (_, lines) in computations.items():
        for line in lines:
            match = _COLLECTIVE.search(line)
            if match is None:
                continue
            if not times[name]:
                raise ValueError(f"{match[1]} in {name}, a loop with an unknown number of turns")
            size = sum(_bytes(dtype, dims) for dtype, dims in _SHAPE.findall(match[2]))
            sums = found[match[1], axes_of(_members(line, prod(mesh)), mesh)]
            sums[0] += times[name]
            sums[1] += times[name] * size
    return [Collectives(*key, *sums) for key, sums in sorted(found.items())]


def shapes_of(compiled: str, kind: str) -> Counter[tuple[int, ...]]:
    """Shapes of what collectives of this kind give, with the number of places in the program."""
    shapes: Counter[tuple[int, ...]] = Counter()
    for line in compiled.splitlines():
        match = _COLLECTIVE.search(line)
        if match and match[1] == kind:
            result = line[: match.start()].partition(" = ")[2]
            shapes.update(_dims(dims) for _, dims in _SHAPE.findall(result))
    return shapes


def axes_of(groups: Sequence[Sequence[int]], mesh: Sequence[int]) -> str:
    """The mesh axes along which the members of these groups of devices lie: "model", "data x expert"."""
    strides = [prod(mesh[i + 1 :]) for i in range(len(mesh))]
    varying = [
        axis
        for axis, (size, stride) in enumerate(zip(mesh, strides, strict=True))
        if any(len({device // stride % size for device in group}) > 1 for group in groups)
    ]
    if not varying:
        return "none"
    whole = all(len(group) == prod(mesh[axis] for axis in varying) for group in groups)
    return ("" if whole else "part of ") + " x ".join(MESH_AXES[axis] for axis in varying)


def _computations(text: str) -> Mapping[str, tuple[bool, list[str]]]:
    """Name -> whether it is the entry, and its instructions."""
    found: dict[str, tuple[bool, list[str]]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        match = _COMPUTATION.match(line)
        if match:
            lines = []
            found[match[2]] = bool(match[1]), lines
        else:
            lines.append(line)
    return found


def _times_run(computations: Mapping[str, tuple[bool, list[str]]]) -> Counter[str]:
    """How often a run of the program runs each computation; 0 where that is not known."""
    times: Counter[str] = Counter()

    def run(name: str, count: int) -> None:
        times[name] += count
        for line in computations[name][1]:
            turns = _TRIPS.search(line)
            loops = " while(" in line
            for called in _CALLED.findall(line):
                inner = int(turns[1]) if turns else 0 if loops else 1
                if called in computations and count * inner:
                    run(called, count * inner)

    for name, (is_entry, _) in computations.items():
        if is_entry:
            run(name, 1)
    return times


def _members(line: str, devices: int) -> list[list[int]]:
    """The groups of devices between which a collective works."""
    pairs = _PAIRS.search(line)
    if pairs:
        return [_numbers(pair) for pair in pairs[1].split("},{")]
    match = _GROUPS.search(line)
    if match is None or match[1] == "{}":
        return [list(range(devices))]
    if match[1].startswith("{"):
        return [_numbers(group) for group in match[1][2:-2].split("},{")]
    return list(_iota_groups(match[1]))


def _iota_groups(text: str) -> Iterator[list[int]]:
    """[groups,members]<=[dims]T(permutation): the devices in order as an array of `dims`, its dimensions
    permuted, then cut into rows."""
    shape, _, source = text.partition("<=")
    dims, _, permutation = source.partition("T")
    sizes = _numbers(dims)
    order = _numbers(permutation) if permutation else list(range(len(sizes)))
    strides = [prod(sizes[i + 1 :]) for i in range(len(sizes))]
    devices = [0]
    for axis in order:
        devices = [first + step * strides[axis] for first in devices for step in range(sizes[axis])]
    members = _numbers(shape)[-1]
    for start in range(0, len(devices), members):
        yield devices[start : start + members]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _dims(text: str) -> tuple[int, ...]:
    return tuple(_numbers(text))


def _bytes(dtype: str, dims: str) -> int:
    return prod(_dims(dims)) * _BITS.get(dtype, 32) // 8
