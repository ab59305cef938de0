"""Tokens that travel while the dense FFN runs: the same numbers, and it does run meanwhile."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openmoe.parallel.topology import Topology
from tests.distributed.comparison import GradientReader, Setup, Training, setup
from tests.distributed.layouts import Variant, name_of
from tests.distributed.pool import Pool

Noted = list[tuple[str, str, int]]
WAIT = "wait for all_to_all"

# Exchange, capacity, micro-batches and recomputation: any two choices meet somewhere.
CASES = [
    (Topology(2, 1, 2, 1, 2), Variant()),
    (Topology(2, 1, 2, 1, 2), Variant(exchange="uneven", micro_batches=4, recompute="selective")),
    (Topology(2, 1, 1, 2, 2), Variant(dropless=True, micro_batches=4, recompute="full")),
    (Topology(4, 1, 4, 1, 4), Variant(micro_batches=4, recompute="full")),
    (Topology(4, 1, 4, 1, 2), Variant(dropless=True, recompute="selective")),
    (Topology(4, 1, 2, 2, 4), Variant()),
    (Topology(4, 2, 1, 2, 2), Variant(exchange="uneven", recompute="full")),
    (Topology(4, 1, 4, 1, 4), Variant(recompute="selective", micro_batches=4)),
]


def train_once(case: Setup, topology: Topology, overlap: str, noted: Noted) -> tuple[Any, dict[str, Tensor]]:
    parallel = case.config.parallel.model_copy(update={"overlap": overlap})
    case = Setup(case.config.model_copy(update={"parallel": parallel}), case.variant)
    training = Training(case, topology, "fp64", lambda *what: noted.append(what))
    for block in training.model.layers:
        note_ffn(block.ffn, noted)  # type: ignore[union-attr, arg-type]
    noted.clear()
    reader = GradientReader(training.ranks)
    return training.step(0, reader), reader.gradients


def note_ffn(ffn: nn.Module, noted: Noted) -> None:
    """Its forward and backward pass, among the collectives."""

    def forward(_: nn.Module, __: Any, out: Tensor) -> None:
        noted.append(("ffn", "forward", 0))
        if out.requires_grad:
            out.register_hook(lambda _: noted.append(("ffn", "backward", 0)))

    ffn.register_forward_hook(forward)


def both_ways(case: Setup, topology: Topology) -> tuple[list[str], Noted]:
    """What differs on this rank, and what was noted with overlap."""
    noted: tuple[Noted, Noted] = ([], [])
    (plain, without), (overlapped, gradients) = (
        train_once(case, topology, overlap, own) for overlap, own in zip(("off", "on"), noted, strict=True)
    )
    timing = {"step_seconds", "tokens_per_second"}
    different = [key for key in plain if key not in timing and plain[key] != overlapped[key]]
    different += [name for name in without if not torch.equal(without[name], gradients[name])]
    sent, more = (Counter(what for what in own if not is_marker(what)) for own in noted)
    if sent - more or {what[:2] for what in more - sent} - allowed_again(case, topology):
        different.append("what is sent")
    assert without
    return different, noted[1]


def is_marker(what: tuple[str, str, int]) -> bool:
    return what[0] == "ffn" or what[1] == WAIT


def allowed_again(case: Setup, topology: Topology) -> set[tuple[str, str]]:
    """Recomputation stops once it has what the backward pass reads: the sum of an FFN that comes last in its
    block is not made again, that of one in its middle is."""
    again = case.config.parallel.recompute == "full" and topology.tensor > 1
    return {("tensor", "reduce_scatter")} if again else set()


def between(noted: Noted) -> list[Noted]:
    """What lies between each start of an all-to-all of tokens and its wait, which follows all of it."""
    found, start = [], 0
    for i, (group, kind, _) in enumerate(noted):
        if (group, kind) == ("expert", "all_to_all"):
            start = i
        elif (group, kind) == ("expert", WAIT):
            found.append(noted[start + 1 : i])
    return found


@pytest.mark.distributed
@pytest.mark.parametrize(("topology", "variant"), CASES, ids=[f"{name_of(t)}-{v}" for t, v in CASES])
def test_same_numbers(pool: Pool, topology: Topology, variant: Variant) -> None:
    """Bit for bit. Catches rows that are read before they are there, a gradient that is, a way back with the
    counts of the way there, an FFN that runs twice or not at all."""
    case = setup(topology, variant, n_layers=2)
    for different, _ in pool.run(both_ways, topology.world_size, case, topology, timeout_seconds=120):
        assert not different


@pytest.mark.distributed
@pytest.mark.parametrize("topology", [Topology(2, 1, 2, 1, 2), Topology(2, 1, 1, 2, 2)], ids=name_of)
def test_ffn_runs_meanwhile(pool: Pool, topology: Topology) -> None:
    """Catches a start that waits, a backward pass whose order leaves nothing to overlap, and a wait that a
    watchdog would name after the FFN's own collectives."""
    case = setup(topology, Variant(), n_layers=2)
    for _, noted in pool.run(both_ways, 2, case, topology, timeout_seconds=120):
        forward, backward = between(noted)
        assert noted.count(("ffn", "forward", 0)) == 2  # once in each block
        assert ("ffn", "forward", 0) in forward
        assert ("ffn", "backward", 0) in backward
        if topology.tensor > 1:
            for part in (forward, backward):
                kinds = {kind for group, kind, _ in part if group == "tensor"}
                assert kinds == {"all_gather", "reduce_scatter"}
