"""Parameters, FLOPs and the figures of Table 11."""

from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from openmoe.model.accounting import (
    ParameterCount,
    active_parameters,
    built_parameters,
    count_flops,
    count_parameters,
    paper_figures,
)
from openmoe.model.batch import Batch
from openmoe.model.config import ModelConfig
from openmoe.model.decoder import Decoder
from openmoe.model.init import initialise

SIZES = {
    "base": {"d_model": 768, "n_layers": 12, "n_heads": 12, "head_dim": 64, "d_ff": 3072, "moe_every": 4},
    "8b": {"d_model": 2048, "n_layers": 24, "n_heads": 24, "head_dim": 128, "d_ff": 8192, "moe_every": 6},
    "34b": {"d_model": 3072, "n_layers": 32, "n_heads": 24, "head_dim": 128, "d_ff": 12288, "moe_every": 4},
}
EXPERTS = {"base": 16, "8b": 32, "34b": 32}
RELEASED = {"ffn": "swiglu4", "residual": "sequential"}


def size(name: str, **more: Any) -> ModelConfig:
    values = {"vocab_size": 256_384, "num_experts": EXPERTS[name], "top_k": 2, **SIZES[name], **more}
    return ModelConfig.model_validate(values)


def small(**more: Any) -> ModelConfig:
    values = {
        "vocab_size": 50, "d_model": 12, "n_layers": 4, "n_heads": 3, "head_dim": 6, "d_ff": 20,
        "moe_every": 2, "num_experts": 5, "top_k": 2, **more,
    }  # fmt: skip
    return ModelConfig.model_validate(values)


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [
        (size("base"), 846_846_720, 155_713_536),
        (size("8b"), 9_304_901_632, 2_214_592_512),
        (size("34b"), 35_399_076_864, 6_643_777_536),
        (size("base", d_ff=2048, **RELEASED), 799_663_104, 141_557_760),
        (size("8b", **RELEASED), 11_855_046_656, 2_751_463_424),
        (size("34b", **RELEASED), 46_270_737_408, 8_455_716_864),
    ],
)
def test_named_sizes_have_exactly_these_parameters(config: ModelConfig, total: int, active: int) -> None:
    """Bug: a bias, a missing norm, a fourth matrix or a tied head that nobody meant."""
    assert count_parameters(config).total == total
    assert built_parameters(config) == total
    assert active_parameters(config) == active


@pytest.mark.parametrize(
    "more",
    [
        {},
        RELEASED,
        {"tied_head": True},
        {"moe_every": 0, "num_experts": 1, "top_k": 1},
        {"ffn": "swiglu4", "moe_every": 1},
        {"residual": "sequential", "n_layers": 5},
    ],
)
def test_formula_equals_the_built_model_part_by_part(more: dict[str, Any]) -> None:
    """Bug: two errors of the formula that cancel at the named sizes."""
    config = small(**more)
    parts = dict.fromkeys(asdict(count_parameters(config)), 0)
    with torch.device("meta"):
        model = Decoder(config)
    for name, parameter in model.named_parameters():
        kind = next(
            part
            for part, mark in {
                "norms": "norm.", "embedding": "embedding.", "head": "head.", "attention": ".attention.",
                "router": ".router.", "experts": ".experts.", "ffn": ".ffn.",
            }.items()
            if mark in name
        )  # fmt: skip
        parts[kind] += parameter.numel()
    assert count_parameters(config) == ParameterCount(**parts)


@pytest.mark.parametrize(("ffn", "matrices"), [("swiglu3", 3), ("swiglu4", 4)])
def test_one_more_unit_of_d_ff(ffn: str, matrices: int) -> None:
    """Bug: a width that is rounded, or a count that does not see it."""
    before, after = size("base", ffn=ffn), size("base", ffn=ffn, d_ff=3073)
    ffns = 12 + 3 * 16
    assert built_parameters(after) - built_parameters(before) == ffns * matrices * 768
    assert count_parameters(after).total - count_parameters(before).total == ffns * matrices * 768


@pytest.mark.parametrize("name", SIZES)
def test_table_11(name: str) -> None:
    """Bug: a rule that does not yield the paper's printed figure (facts 3, readings B and C)."""
    values = {
        "base": (649_887_744, 141_557_760, 338_460_672),
        "8b": (8_779_464_704, 2_080_374_784, 2_605_449_216),
        "34b": (34_610_479_104, 6_039_797_760, 6_827_409_408),
    }
    printed = {
        "base": ("650M", "142M", "339M"),
        "8b": ("8.7B", "2.1B", "2.6B"),
        "34b": ("34B", "6.0B", "6.8B"),
    }
    figures = paper_figures(size(name))
    assert tuple(figure.value for figure in figures) == values[name]
    assert tuple(figure.printed for figure in figures) == printed[name]
    # The released code widens each FFN, but not the paper's arithmetic.
    assert [f.value for f in paper_figures(size(name, **RELEASED))] == list(values[name])
    assert paper_figures(size(name, d_ff=100))[0].printed is None


@pytest.mark.parametrize(
    ("name", "gigaflops", "head_share"), [("base", 2.23, 0.530), ("8b", 17.35, 0.182), ("34b", 45.80, 0.103)]
)
def test_flops_of_the_named_sizes(name: str, gigaflops: float, head_share: float) -> None:
    """Bug: another convention than that of the published figures we compare with."""
    flops = count_flops(size(name), seq_len=2048)
    assert flops.total / 1e9 == pytest.approx(gigaflops, abs=0.005)
    assert flops.head / flops.total == pytest.approx(head_share, abs=0.0005)


@pytest.mark.parametrize("more", [{}, RELEASED, {"moe_every": 0, "num_experts": 1, "top_k": 1}])
def test_flops_equal_what_torch_counts(more: dict[str, Any]) -> None:
    """Bug: a factor 2 or 3 too much or too little, a forgotten matrix, experts counted for all tokens."""
    config = small(dropless=True, **more)
    rows, seq_len = 2, 8
    model = Decoder(config)
    initialise(model, config, seed=0)
    tokens = torch.randint(1, config.vocab_size, (rows, seq_len), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens, tokens, torch.ones(rows, seq_len))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.logits(model(batch).hidden).sum().backward()
    flops = count_flops(config, seq_len)
    # torch counts the masked half of the scores too.
    assert counter.get_total_flops() == (flops.total + flops.attention_scores) * rows * seq_len


def test_flops_of_a_step_count_the_head_where_it_runs() -> None:
    """Bug: the UL2 phase, where 30% of the positions have a loss, shows an MFU it does not have."""
    flops = count_flops(small(), seq_len=8)
    assert flops.of_step(tokens=100, loss_tokens=100) == pytest.approx(100 * flops.total)
    assert flops.of_step(tokens=100, loss_tokens=30) == pytest.approx(100 * flops.total - 70 * flops.head)
