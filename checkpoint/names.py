"""The one table of tensor names: ours, those of the released `OpenMoeForCausalLM` files, and those of t5x.

A logical name of ours stands for `[..., out, in]`, with the two halves of swiglu4's wi_0 as an axis of two.
The released files keep matrices so too, but experts' as `[experts, in, out]`; t5x keeps all kernels as `[...,
in, out]`. Neither has an axis for the halves: they follow each other among the outputs (facts 6.2, 6.3).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from openmoe.model.config import ModelConfig

# The layers that have it, or before or behind all layers.
Where = Literal["start", "every", "dense", "moe", "end"]
Format = Literal["released", "t5x"]


class Row(NamedTuple):
    where: Where
    ours: str
    released: str
    t5x: str


# In the order of the released files.
TABLE = (
    Row("start", "embedding.weight", "model.embed_tokens.weight", "token_embedder/embedding"),
    Row("every", "attention.q.weight", "self_attn.q_proj.weight", "self_attention/query/kernel"),
    Row("every", "attention.k.weight", "self_attn.k_proj.weight", "self_attention/key/kernel"),
    Row("every", "attention.v.weight", "self_attn.v_proj.weight", "self_attention/value/kernel"),
    Row("every", "attention.o.weight", "self_attn.o_proj.weight", "self_attention/out/kernel"),
    Row("every", "attention_norm.scale", "input_layernorm.weight", "pre_self_attention_layer_norm/scale"),
    Row("dense", "ffn_norm.scale", "post_attention_layernorm.weight", "pre_mlp_layer_norm/scale"),
    Row("dense", "ffn.wi_0", "mlp.gate_proj.weight", "mlp/wi_0/kernel"),
    Row("dense", "ffn.wi_1", "mlp.up_proj.weight", "mlp/wi_1/kernel"),
    Row("dense", "ffn.wo", "mlp.down_proj.weight", "mlp/wo/kernel"),
    Row("moe", "moe_norm.scale", "post_attention_layernorm.weight", "pre_mlp_layer_norm/scale"),
    Row("moe", "moe.router.weight", "mlp.gate_weight", "mlp/router/router_weights/w/kernel"),
    Row("moe", "moe.experts.wi_0", "mlp.experts.wi_gate", "mlp/expert/wi_0/kernel"),
    Row("moe", "moe.experts.wi_1", "mlp.experts.wi_up", "mlp/expert/wi_1/kernel"),
    Row("moe", "moe.experts.wo", "mlp.experts.wo", "mlp/expert/wo/kernel"),
    Row("moe", "ffn_norm.scale", "pre_extra_mlp_layernorm.weight", "pre_extra_mlp_layer_norm/scale"),
    Row("moe", "ffn.wi_0", "extra_mlp.gate_proj.weight", "extra_mlp/wi_0/kernel"),
    Row("moe", "ffn.wi_1", "extra_mlp.up_proj.weight", "extra_mlp/wi_1/kernel"),
    Row("moe", "ffn.wo", "extra_mlp.down_proj.weight", "extra_mlp/wo/kernel"),
    Row("end", "final_norm.scale", "model.norm.weight", "decoder/decoder_norm/scale"),
    Row("end", "head.weight", "lm_head.weight", "decoder/logits_dense/kernel"),
)  # fmt: skip

# openmoe-pt's names of what it calls otherwise; there one tensor holds one expert, `[out, in]`.
OPENMOE_PT = {
    "mlp.gate_weight": "mlp.gate.weight",
    "mlp.experts.wi_gate": "mlp.experts.{e}.gate_proj.weight",
    "mlp.experts.wi_up": "mlp.experts.{e}.up_proj.weight",
    "mlp.experts.wo": "mlp.experts.{e}.down_proj.weight",
}


@dataclass(frozen=True)
class TensorName:
    """One tensor of one model under its three names."""

    ours: str
    released: str
    t5x: str
    shape: tuple[int, ...]  # ours

    @property
    def has_halves(self) -> bool:
        return self.ours.endswith("wi_0") and len(self.shape) == (4 if self.is_of_experts else 3)

    @property
    def is_of_experts(self) -> bool:
        """Is its first axis that of the experts?"""
        return ".experts." in self.ours

    def is_transposed(self, form: Format) -> bool:
        return self.t5x.endswith("kernel") if form == "t5x" else self.is_of_experts

    def shape_in(self, form: Format) -> tuple[int, ...]:
        """The shape in a foreign file."""
        shape = self.shape
        if self.has_halves:
            shape = (*shape[:-3], 2 * shape[-2], shape[-1])
        return (*shape[:-2], shape[-1], shape[-2]) if self.is_transposed(form) else shape

    def to_format(self, form: Format, x: Tensor) -> Tensor:
        """Our tensor as a foreign file holds it, a view; also of one expert alone."""
        if self.has_halves:
            x = x.flatten(-3, -2)
        return x.transpose(-1, -2) if self.is_transposed(form) else x

    def from_format(self, form: Format, x: Tensor) -> Tensor:
        """The way back, a view; also of one expert alone."""
        if self.is_transposed(form):
            x = x.transpose(-1, -2)
        return x.unflatten(-2, (2, -1)) if self.has_halves else x


def tensor_names(config: ModelConfig) -> Iterator[TensorName]:
    """Every tensor of a model with norms of its own for MoE and residual FFN (`residual=sequential`) and an
    untied head, in the order of the released files."""
    for row in TABLE:
        if row.where == "start":
            yield _name(row, config, None)
    for layer in range(config.n_layers):
        kinds = ("every", "moe" if config.is_moe_layer(layer) else "dense")
        yield from (_name(row, config, layer) for row in TABLE if row.where in kinds)
    for row in TABLE:
        if row.where == "end":
            yield _name(row, config, None)


def openmoe_pt_name(released: str) -> str:
    """What openmoe-pt calls a released tensor; `{e}` stands for the expert where it keeps one at a time."""
    prefix, _, part = released.partition(".mlp.")
    return f"{prefix}.{OPENMOE_PT[f'mlp.{part}']}" if f"mlp.{part}" in OPENMOE_PT else released


def _name(row: Row, config: ModelConfig, layer: int | None) -> TensorName:
    if layer is None:
        return TensorName(row.ours, row.released, row.t5x, _shape(row.ours, config))
    return TensorName(
        f"layers.{layer}.{row.ours}",
        f"model.layers.{layer}.{row.released}",
        f"decoder/layers_{layer}/{row.t5x}",
        _shape(row.ours, config),
    )


def _shape(ours: str, config: ModelConfig) -> tuple[int, ...]:
    d_model, d_heads, d_ff = config.d_model, config.n_heads * config.head_dim, config.d_ff
    part = ours.rpartition(".experts.")[2].removeprefix("ffn.")
    by_name: dict[str, tuple[int, ...]] = {
        "embedding.weight": (config.vocab_size, d_model),
        "head.weight": (config.vocab_size, d_model),
        "moe.router.weight": (config.num_experts, d_model),
        "attention.o.weight": (d_model, d_heads),
        "wi_0": (2, d_ff, d_model) if config.ffn == "swiglu4" else (d_ff, d_model),
        "wi_1": (d_ff, d_model),
        "wo": (d_model, d_ff),
    }
    shape = by_name.get(part, (d_model,) if part.endswith(".scale") else (d_heads, d_model))
    return (config.num_experts, *shape) if ".experts." in ours else shape
