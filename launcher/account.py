"""`python -m openmoe.launcher.account experiment=NAME`: parameters, FLOPs and the paper's figures; with
`parallel.shard=N` also what a rank holds and what one update sends."""

from collections.abc import Sequence
from dataclasses import asdict

from openmoe.launcher.entry import run_command
from openmoe.launcher.schema import Config
from openmoe.model.accounting import (
    PaperFigure,
    active_parameters,
    built_parameters,
    count_flops,
    count_parameters,
    paper_figures,
)
from openmoe.model.config import ModelConfig
from openmoe.parallel.topology import check_fit, resolve
from openmoe.parallel.traffic import Step, step_traffic


def account(model: ModelConfig, seq_len: int) -> str:
    """The page that the command prints; `seq_len` decides the cost of attention scores."""
    parameters = count_parameters(model)
    active = active_parameters(model)
    flops = count_flops(model, seq_len)
    figures = paper_figures(model)
    in_table = "" if figures[0].printed else "; it has no model of this shape"
    active_rule = f"attention, FFN and top-{model.top_k} experts" if model.moe_layers else "attention and FFN"
    return "\n".join(
        [
            *_shape(model),
            "",
            "Parameters",
            *_parts(asdict(parameters), parameters.total, ",d"),
            _row("total, built on the meta device", f"{built_parameters(model):,}"),
            _row(f"active per token: {active_rule}", f"{active:,}"),
            _row("active with the input embedding", f"{active + parameters.embedding:,}"),
            "",
            f"MFLOPs per token, forward and backward, rows of {seq_len:,} tokens",
            *_parts({part: value / 1e6 for part, value in asdict(flops).items()}, flops.total / 1e6, ",.1f"),
            "",
            f"Columns of the paper's Table 11, by the rule that yields them{in_table}",
            *map(_figure, figures),
        ]
    )


def account_layout(config: Config) -> str:
    """The page's part about a layout whose number of processes follows from its degrees."""
    parallel, train = config.parallel, config.train
    topology = resolve(parallel, parallel.replicate * parallel.shard * parallel.tensor)
    check_fit(topology, config.model, train.seq_len, train.global_batch_rows, train.micro_batch_rows)
    rows = topology.rows_of(0, train.global_batch_rows).stop
    micro = rows if train.micro_batch_rows == -1 else train.micro_batch_rows
    step = Step(config.model, parallel, topology, train.precision, train.seq_len, rows // micro, micro)
    sums: dict[tuple[str, str, str, bool], tuple[int, int]] = {}
    for part in step_traffic(step, config.optim):
        key = (part.purpose, part.kind, part.group, part.at_most)
        times, size_bytes = sums.get(key, (0, 0))
        sums[key] = times + part.times, size_bytes + part.total_bytes
    return "\n".join(
        [
            f"One update of a rank: {topology.world_size} processes, replicate {topology.replicate} x shard "
            f"{topology.shard} x tensor {topology.tensor}, expert {topology.expert}; {rows // micro} "
            f"micro-batches of {micro} rows",
            f"  {'':<32}{'':<16}{'group':<14}{'times':>7}{'MiB':>14}",
            *(
                f"  {purpose:<32}{kind:<16}{group:<14}{times:>7,}{size / 2**20:>14,.3f}"
                f"{' at most' if at_most else ''}"
                for (purpose, kind, group, at_most), (times, size) in sums.items()
            ),
        ]
    )


def _shape(model: ModelConfig) -> Sequence[str]:
    moe = f"{model.num_experts} experts, top-{model.top_k}, in layers {', '.join(map(str, model.moe_layers))}"
    return (
        f"{model.n_layers} layers, d_model {model.d_model}, {model.n_heads} heads of {model.head_dim}, "
        f"d_ff {model.d_ff} ({model.ffn}), vocabulary {model.vocab_size:,}",
        f"{moe}; residual {model.residual}" if model.moe_layers else "dense",
    )


def _parts(parts: dict[str, float], total: float, form: str) -> list[str]:
    rows = [
        _row(part.replace("_", " "), format(value, form), value / total)
        for part, value in parts.items()
        if value
    ]
    return [*rows, _row("total", format(total, form), 1.0)]


def _figure(figure: PaperFigure) -> str:
    printed = f"  printed {figure.printed}" if figure.printed else ""
    return f"{_row(figure.column, f'{figure.value:,}')}{printed}\n      {figure.rule}"


def _row(name: str, value: str, share: float | None = None) -> str:
    return f"  {name:<52}{value:>18}" + ("" if share is None else f"{share:>8.1%}")


def show(config: Config) -> None:
    print(account(config.model, config.train.seq_len))
    if config.parallel.shard != -1 and config.parallel.engine == "torch":
        print(f"\n{account_layout(config)}")


def main() -> None:
    run_command(show, Config, "config")


if __name__ == "__main__":
    main()
