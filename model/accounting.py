"""How large a model is and what a token costs: parameters, active parameters, FLOPs, and the paper's figures.

Conventions of the FLOPs: a multiply-add counts two; backward is twice forward; nothing is recomputed; causal
attention scores count at half; an embedding look-up costs nothing; every token reaches its top-k experts
(dropping and capacity padding are left out), so that MFU measures useful work.
"""

from dataclasses import dataclass, fields

import torch

from openmoe.model.config import ModelConfig
from openmoe.model.decoder import Decoder


@dataclass(frozen=True)
class ParameterCount:
    """Elements of all tensors, by part."""

    embedding: int
    attention: int
    ffn: int  # dense and residual FFNs, one a layer
    experts: int
    router: int
    norms: int
    head: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def count_parameters(config: ModelConfig) -> ParameterCount:
    """By formula; equals `built_parameters`."""
    d, layers, moe_layers = config.d_model, config.n_layers, len(config.moe_layers)
    separate_norms = moe_layers if config.residual == "sequential" else 0
    return ParameterCount(
        embedding=config.vocab_size * d,
        attention=layers * _attention(config),
        ffn=layers * _ffn(config),
        experts=moe_layers * config.num_experts * _ffn(config),
        router=moe_layers * d * config.num_experts,
        norms=(2 * layers + separate_norms + 1) * d,
        head=0 if config.tied_head else config.vocab_size * d,
    )


def built_parameters(config: ModelConfig) -> int:
    """Counted on the model itself, built without memory on the meta device."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Decoder(config).parameters())


def active_parameters(config: ModelConfig) -> int:
    """Matrix elements that a token meets between embedding and head: attention, FFN and its top-k experts."""
    return config.n_layers * (_attention(config) + _ffn(config)) + (
        len(config.moe_layers) * config.top_k * _ffn(config)
    )


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of one token, forward and backward, by part."""

    attention_projections: float
    attention_scores: float
    ffn: float
    experts: float
    router: float
    head: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    def of_step(self, tokens: int, loss_tokens: float) -> float:
        """Of a batch of `tokens` row positions, of which only `loss_tokens` reach the head."""
        return (self.total - self.head) * tokens + self.head * loss_tokens


def count_flops(config: ModelConfig, seq_len: int) -> FlopCount:
    """FLOPs of one token of a row of `seq_len`."""
    forward_backward = 2 * 3  # two per multiply-add; one pass forward, two backward
    d_heads = config.n_heads * config.head_dim
    moe_layers = len(config.moe_layers)
    return FlopCount(
        attention_projections=forward_backward * config.n_layers * _attention(config),
        # Scores and weighted values, each d_heads multiply-adds per visible column, seq_len / 2 on average.
        attention_scores=forward_backward * config.n_layers * d_heads * seq_len,
        ffn=forward_backward * config.n_layers * _ffn(config),
        experts=forward_backward * moe_layers * config.top_k * _ffn(config),
        router=forward_backward * moe_layers * config.d_model * config.num_experts,
        head=forward_backward * config.d_model * config.vocab_size,
    )


@dataclass(frozen=True)
class PaperFigure:
    """A column of Table 11 recomputed by the rule that was found to yield it (facts 3)."""

    column: str
    rule: str
    value: int
    printed: str | None  # what the paper prints; None where the model is not one of its sizes


# d_model, n_layers, d_ff, num_experts -> #Param, #ActParam, #ActParam with embedding, as printed.
TABLE_11 = {
    (768, 12, 3072, 16): ("650M", "142M", "339M"),
    (2048, 24, 8192, 32): ("8.7B", "2.1B", "2.6B"),
    (3072, 32, 12288, 32): ("34B", "6.0B", "6.8B"),
}


def paper_figures(config: ModelConfig) -> list[PaperFigure]:
    """Table 11 mixes two ways of counting an expert and leaves out head, router and norms; its first column
    cuts figures off instead of rounding them."""
    printed = TABLE_11.get((config.d_model, config.n_layers, config.d_ff, config.num_experts), (None,) * 3)
    matrix = config.d_model * config.d_ff
    trunk = config.n_layers * (_attention(config) + 3 * matrix)
    experts = len(config.moe_layers) * matrix
    embedding = config.vocab_size * config.d_model
    active = trunk + experts * config.top_k * 2
    return [
        PaperFigure(
            "#Param",
            "one embedding, attention and FFN in all layers, all experts; FFN and expert 3 d_model d_ff",
            embedding + trunk + experts * config.num_experts * 3,
            printed[0],
        ),
        PaperFigure(
            "#ActParam",
            "attention and FFN in all layers, top-k experts; FFN 3, expert 2 d_model d_ff",
            active,
            printed[1],
        ),
        PaperFigure(
            "#ActParam with embedding", "as #ActParam, and one embedding", active + embedding, printed[2]
        ),
    ]


def _attention(config: ModelConfig) -> int:
    return 4 * config.d_model * config.n_heads * config.head_dim


def _ffn(config: ModelConfig) -> int:
    matrices = 3 if config.ffn == "swiglu3" else 4
    return matrices * config.d_model * config.d_ff
