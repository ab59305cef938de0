"""Every choice that defines a model, as named values.

The paper and the released code differ in 27 places; each one that concerns the model is one field here, so
that `openmoe_8b` (the paper) and `openmoe_8b_released` (the code) are two pages of values over one model.
"""

from typing import Literal, Self

from pydantic import BaseModel, Field, model_validator


class ModelConfig(BaseModel, strict=True, extra="forbid", frozen=True, allow_inf_nan=False):
    """Shape and routing of a decoder. Sizes: paper Table 11."""

    # The upper bounds of sizes catch slips of the keyboard before they become an allocation.
    vocab_size: int = Field(gt=0, le=2**24)  # rows of the embedding and of the head
    d_model: int = Field(gt=0, le=2**17)
    n_layers: int = Field(gt=0, le=1024)
    n_heads: int = Field(gt=0, le=1024)
    head_dim: int = Field(gt=0, le=4096)  # n_heads * head_dim need not equal d_model (8B: 3072 over 2048)
    d_ff: int = Field(gt=0, le=2**20)  # width of the dense FFN, of the residual FFN and of each expert

    # swiglu3: wo(silu(wi_0 x) * wi_1 x), the paper. swiglu4: wo(a * silu(b) * wi_1 x) with [a; b] = wi_0 x,
    # the released code, where a complete GLU was plugged in as the activation of a gated MLP.
    ffn: Literal["swiglu3", "swiglu4"] = "swiglu3"
    # parallel_shared_norm: x += MoE(h) + FFN(h), h = norm(x) (paper Eq. 4).
    # sequential: x += MoE(norm(x)); x += FFN(norm'(x)) (released code).
    residual: Literal["parallel_shared_norm", "sequential"] = "parallel_shared_norm"
    tied_head: bool = False  # the head is the embedding, its input scaled by 1/sqrt(d_model)
    attention: Literal["causal", "prefix"] = "causal"  # prefix: bidirectional inside each example's inputs
    rope_base: float = Field(10_000.0, gt=1)
    norm_eps: float = Field(1e-6, gt=0)
    init_scale: float = Field(0.1, gt=0, le=1e6)  # variance scale of the matrices (ST-MoE)
    router_init_std: float = Field(0.02, gt=0, le=1e6)
    # The released treatment of padding: its queries attend uniformly to the whole row, and the inputs of
    # attention, MoE, FFN and head are multiplied by the 0/1 logit mask. False: nothing done, since
    # under a causal mask padding at the end of a row touches no real token.
    mask_padding: bool = False

    moe_every: int = Field(0, ge=0)  # layers i with (i + 1) % moe_every == 0 are MoE layers; 0: dense model
    num_experts: int = Field(1, gt=0, le=2**16)
    top_k: int = Field(1, gt=0)
    # Routing groups: capacity, priority, dropping and router losses are computed per group.
    # rows: group_rows consecutive rows. flaxformer: at most group_tokens tokens and at least num_experts
    # groups, the original's rule, which depends on the batch size. hugging_face: the whole batch is one
    # group, and capacity is rounded down, then up to an even number (facts 6.5), with
    # capacity_includes_k only.
    group_rule: Literal["rows", "flaxformer", "hugging_face"] = "rows"
    group_rows: int = Field(1, gt=0)
    group_tokens: int = Field(4096, gt=0, lt=2**31)  # flaxformer only
    capacity_factor_train: float = Field(1.25, gt=0)
    capacity_factor_eval: float = Field(2.0, gt=0)
    capacity_includes_k: bool = False  # True: capacity = factor * top_k * tokens / experts
    min_capacity: int = Field(4, gt=0, lt=2**31)
    dropless: bool = False
    route_padding: bool = False  # True: padding takes expert slots and counts in the router losses
    # sort: contiguous GEMMs over the kept rows. einsum: one-hot masks with static shapes, for XLA.
    dispatch: Literal["sort", "einsum"] = "sort"

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: rotary embedding needs an even number")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k}: allowed 1 to num_experts={self.num_experts}")
        if self.group_rule == "hugging_face" and not self.capacity_includes_k:
            raise ValueError("capacity_includes_k=false: allowed true with group_rule=hugging_face")
        if self.moe_every > self.n_layers:
            raise ValueError(f"moe_every={self.moe_every}: allowed 0 (dense) to n_layers={self.n_layers}")
        return self

    def is_moe_layer(self, layer: int) -> bool:
        """Whether 0-based `layer` holds experts (facts 1.1: 3, 7, 11 for Base)."""
        return self.moe_every > 0 and (layer + 1) % self.moe_every == 0

    @property
    def moe_layers(self) -> list[int]:
        return [layer for layer in range(self.n_layers) if self.is_moe_layer(layer)]
