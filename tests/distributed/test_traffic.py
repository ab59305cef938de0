"""What the account of a layout says is sent, against what training sends."""

from collections import Counter

import pytest

from openmoe.parallel.topology import Topology
from openmoe.parallel.traffic import Step, step_traffic
from tests.distributed.comparison import Setup, Training, setup
from tests.distributed.layouts import Variant, name_of
from tests.distributed.pool import Pool

CASES = [
    (Topology(4, 1, 4, 1, 4), Variant("tiny")),
    (Topology(4, 1, 4, 1, 2), Variant("tiny_released", micro_batches=2, recompute="full")),
    (Topology(4, 1, 2, 2, 2), Variant("tiny", recompute="full")),
    (Topology(8, 2, 2, 2, 4), Variant("tiny", micro_batches=2)),
    (Topology(8, 1, 2, 4, 2), Variant("tiny", dropless=True, recompute="selective")),
    (Topology(8, 8, 1, 1, 1), Variant("tiny_released", micro_batches=4)),
]

ANNOUNCED = ("replicate", "all_reduce", 0)  # before FSDP may make one; noted with its size after it
Sent = Counter[tuple[str, str, int]]  # (group, kind, bytes) -> how often


def sent_in_a_step(setup: Setup, topology: Topology) -> Sent:
    """By this rank; what the log of a step needs goes to all of them and is left out."""
    noted: list[tuple[str, str, int]] = []
    training = Training(setup, topology, "fp32", lambda *what: noted.append(what))
    noted.clear()
    training.step(0)
    return Counter(
        what
        for what in noted
        if what[0] != "world" and what != ANNOUNCED and not what[1].startswith("wait for ")
    )


@pytest.mark.distributed
@pytest.mark.parametrize(("topology", "variant"), CASES, ids=[f"{name_of(t)}-{v}" for t, v in CASES])
def test_account_of_a_step(pool: Pool, topology: Topology, variant: Variant) -> None:
    """Catches a collective that the account leaves out or counts in the wrong size, and one more in the step:
    a gather for each micro-batch, an optimizer that sums parameter by parameter."""
    case = setup(topology, variant)
    train = case.config.train
    micro_batch_rows = train.global_batch_rows // topology.size("data") // variant.micro_batches
    step = Step(
        case.config.model, case.config.parallel, topology, "fp32", train.seq_len, variant.micro_batches,
        micro_batch_rows,
    )  # fmt: skip
    exact, at_most = Counter(), Counter()
    for part in step_traffic(step, case.config.optim):
        counted = at_most if part.at_most else exact
        counted[part.group, part.kind, part.size_bytes] += part.times
    rest = Counter()
    for found in pool.run(sent_in_a_step, topology.world_size, case, topology):
        assert exact - found == Counter()
        rest += found - exact
    ranks = topology.world_size
    for kind in {what[:2] for what in [*rest, *at_most]}:  # what one rank has less, another may have more
        sizes = [what[2] for what in rest.elements() if what[:2] == kind]
        limits = [what[2] for what in at_most.elements() if what[:2] == kind]
        assert len(sizes) == ranks * len(limits), kind
        assert 0 < sum(sizes) <= ranks * sum(limits), kind
