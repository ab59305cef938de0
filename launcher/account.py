"""`python -m openmoe.launcher.account experiment=NAME`: parameters, FLOPs and the paper's figures."""

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


def main() -> None:
    run_command(lambda config: print(account(config.model, config.train.seq_len)), Config, "config")


if __name__ == "__main__":
    main()
