"""Which layouts are tried, and with what: lists in which any two choices meet somewhere."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from typing import Literal

from openmoe.parallel.recompute import Recompute
from openmoe.parallel.topology import Topology

Pair = frozenset[tuple[str, object]]


@dataclass(frozen=True)
class Variant:
    """What a layout is tried with."""

    model: str = "tiny"  # an experiment
    dropless: bool = False
    micro_batches: int = 1  # of each data rank
    recompute: Recompute = "none"
    exchange: Literal["auto", "uneven"] = "auto"

    def __str__(self) -> str:
        capacity = "dropless" if self.dropless else "capacity"
        return f"{self.model}-{capacity}-micro{self.micro_batches}-{self.recompute}-{self.exchange}"


MODELS = ("tiny", "tiny_released")
VARIANTS = [
    Variant(*choice)
    for choice in product(MODELS, (False, True), (1, 4), ("none", "selective", "full"), ("auto", "uneven"))
]


def layouts_of(world_size: int) -> list[Topology]:
    """Every layout of this many ranks with tensor up to 4 and expert up to 8."""
    found = []
    for tensor, expert in product((1, 2, 4), (1, 2, 4, 8)):
        for replicate in range(1, world_size + 1):
            if world_size % (replicate * tensor) == 0:
                shard = world_size // (replicate * tensor)
                if shard * tensor % expert == 0:
                    found.append(Topology(world_size, replicate, shard, tensor, expert))
    return found


LAYOUTS = [topology for world_size in (2, 4, 8) for topology in layouts_of(world_size)]


def name_of(topology: Topology) -> str:
    return (
        f"replicate{topology.replicate}-shard{topology.shard}-tensor{topology.tensor}-expert{topology.expert}"
    )


def exchange_of(topology: Topology, variant: Variant) -> str:
    """How tokens travel in this case; the choice of the variant is not always there."""
    if topology.expert == 1:
        return "none"
    return (
        "fixed" if variant.exchange == "auto" and topology.tensor == 1 and not variant.dropless else "uneven"
    )


def pairs(topology: Topology, variant: Variant) -> set[Pair]:
    """Any two properties of a case."""
    properties = {
        "model": variant.model,
        "dropless": variant.dropless,
        "micro_batches": variant.micro_batches,
        "recompute": variant.recompute,
        "exchange": exchange_of(topology, variant),
        "tensor": topology.tensor,
        "expert": topology.expert,
        "replicate": topology.replicate > 1,
        "shard": topology.shard > 1,
    }
    return set(map(frozenset, combinations(properties.items(), 2)))


def cost(variant: Variant) -> float:
    """Time of a step, roughly: ranks that do little wait for each other in every micro-batch."""
    return variant.micro_batches * (1.3 if variant.recompute == "full" else 1)


@cache
def chances(topologies: tuple[Topology, ...]) -> Counter[Pair]:
    """In how many of the layouts each pair can meet."""
    return Counter(
        pair
        for topology in topologies
        for pair in set().union(*(pairs(topology, variant) for variant in VARIANTS))
    )


def most_new(topology: Topology, variants: Iterable[Variant], left: Counter[Pair], met: set[Pair]) -> Variant:
    """The variant that brings together most of what has not met, what has few chances `left` first, and of
    equal ones one that is soon done. From now on its properties have met."""

    def value(variant: Variant) -> tuple[float, float]:
        # Exactly, as the order of a set is another one in each process.
        return math.fsum(1 / left[pair] for pair in pairs(topology, variant) - met), -cost(variant)

    best = max(variants, key=value)
    met |= pairs(topology, best)
    return best


@cache
def one_variant_each() -> list[tuple[Topology, Variant]]:
    """Each layout once."""
    met: set[Pair] = set()
    cases = []
    for number, topology in enumerate(LAYOUTS):
        start = 7 * number % len(VARIANTS)  # where nothing is new, something else each time
        left = chances(tuple(LAYOUTS[number:]))
        cases.append((topology, most_new(topology, VARIANTS[start:] + VARIANTS[:start], left, met)))
    return cases


@cache
def several_variants_each() -> list[tuple[Topology, Variant]]:
    """Each layout with each model: at default options, and with variants in which any two options meet.

    Default options first, then variants in which any two meet in some layout, then the rest round by round: a
    part of the list says something about all layouts."""
    defaults = [(topology, Variant(model)) for topology, model in product(LAYOUTS, MODELS)]
    rounds: dict[int, list[tuple[Topology, Variant]]] = {}
    for topology, model in product(LAYOUTS, MODELS):
        possible = [variant for variant in VARIANTS if variant.model == model]
        wanted = set().union(*(pairs(topology, variant) for variant in possible))
        met = pairs(topology, Variant(model))
        number = 0
        while met < wanted:
            number += 1
            variant = most_new(topology, possible, chances((topology,)), met)
            rounds.setdefault(number, []).append((topology, variant))
    rest = [case for number in sorted(rounds) for case in rounds[number]]
    return list(dict.fromkeys([*defaults, *one_variant_each(), *rest]))
