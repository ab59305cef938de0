"""The original trainer's twenty steps, under layouts."""

from pathlib import Path

import pytest
import torch

from openmoe.optim.build import build_optimizer
from openmoe.optim.config import AdafactorConfig
from openmoe.optim.schedules import learning_rate
from openmoe.parallel.build import build
from openmoe.parallel.config import ParallelConfig
from openmoe.parallel.ranks import ShardedRanks
from openmoe.parallel.topology import Topology
from openmoe.train.config import TrainConfig
from openmoe.train.record import read_metrics, send_metrics
from openmoe.train.step import micro_batches, train_step
from tests.distributed.device import device
from tests.distributed.layouts import name_of
from tests.distributed.pool import Pool
from tests.parity.golden import Case, converted, golden_files, released_config
from tests.parity.test_train import step_arrays

# train_t1: 8 rows in groups of two. train_t2: micro-batches of four rows, each normalised by itself, so that
# all ranks must read the same rows.
CASES = {
    "train_t1.npz": [Topology(4, 1, 4, 1, 4), Topology(8, 2, 2, 2, 4), Topology(4, 1, 2, 2, 1)],
    "train_t2_microbatch2.npz": [Topology(2, 1, 1, 2, 2), Topology(2, 1, 1, 2, 1)],
}


def worst_differences(path: Path, topology: Topology) -> dict[str, float]:
    """Largest differences of the losses, of the share of tokens without an expert, and of the parameters."""
    case = Case(path)
    golden, history = case.meta["config"], case.meta["history"]
    blocks = case.meta.get("microbatches") or 1
    arrays = step_arrays(case, 0)["input_tokens"]
    config = released_config(golden)
    # The original's groups, which follow from the number of tokens, as a number of rows.
    tokens = arrays.size // blocks
    groups = max(tokens // config.group_tokens, config.num_experts)
    config = config.model_copy(
        update={"group_rule": "rows", "group_rows": tokens // groups // arrays.shape[1]}
    )
    optim = AdafactorConfig(name="adafactor")
    model, ranks = build(config, ParallelConfig(), topology, "fp32", device(), seed=0)
    assert isinstance(ranks, ShardedRanks)
    parts = {name: layout.slices(topology, ranks.rank) for name, layout in ranks.layouts.items()}
    parameters = dict(ranks.named_parameters())
    with torch.no_grad():
        for name, value in converted(case.params("params_step0"), config).items():
            parameters[name].copy_(value[parts[name]])
    optimizer = build_optimizer(optim, parameters.items(), ranks.shards)
    train = TrainConfig(
        global_batch_rows=1,
        seq_len=2,
        loss_normalization="per_microbatch",
        z_loss_weight=golden["z_loss"],
        load_balancing_weight=golden["aux_loss_factor"],
        router_z_loss_weight=golden["router_z_loss_factor"],
    )
    worst = {"loss": 0.0, "left behind": 0.0, "parameters": 0.0}
    for entry in history:
        whole = step_arrays(case, entry["step"])
        rows = topology.rows_of(ranks.rank, len(whole["input_tokens"]))
        own = {name: array[rows] for name, array in whole.items()}
        micro = micro_batches(own, (rows.stop - rows.start) // blocks, device(), packed=False)
        rate = learning_rate(optim.schedule, entry["step"])
        result = train_step(model, optimizer, micro, 0, rate, train, ranks)
        layers = config.moe_layers
        [(line, _)] = read_metrics([send_metrics(result, layers, ranks, {})], layers, ranks)
        differences = {"loss": abs(line["loss"] - entry["total_loss"])}
        left = entry.get("metric:experts/fraction_tokens_left_behind")
        if left is not None:
            layers = [line[f"router/layer{layer:02d}/left_behind"] for layer in config.moe_layers]
            differences["left behind"] = abs(sum(layers) / len(layers) - left)
        after = case.under(f"params_step{entry['step'] + 1}")
        for name, value in converted(after, config).items():
            if parameters[name].numel():
                difference = (parameters[name].detach().cpu() - value[parts[name]]).abs().max().item()
                differences["parameters"] = max(differences.get("parameters", 0.0), difference)
        for name, difference in differences.items():
            worst[name] = max(worst[name], difference)
    return worst


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("file", "topology"),
    [(file, topology) for file, topologies in CASES.items() for topology in topologies],
    ids=lambda value: name_of(value) if isinstance(value, Topology) else value,
)
def test_golden_trajectory(pool: Pool, file: str, topology: Topology) -> None:
    """Catches a sharded training that agrees with ours in one process because both are wrong together."""
    paths = golden_files(file)
    if not paths:
        pytest.skip(f"no {file} in the golden folder")
    for worst in pool.run(worst_differences, topology.world_size, paths[0], topology):
        assert worst["loss"] < 5e-6
        assert worst["left behind"] < 1e-6
        assert worst["parameters"] < 1e-6
