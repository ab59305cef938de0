"""`config.json` of the released format, both ways (facts 6.4); what that format can't express is refused."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from openmoe.checkpoint.errors import CheckpointError
from openmoe.model.config import ModelConfig

CONFIG_NAME = "config.json"
OWN_KEY = "openmoe"  # what the format has no key for; other programs pass over it
MAX_POSITIONS = 2048  # of the port's rotary table


class LossWeights(BaseModel, strict=True, extra="forbid", frozen=True, allow_inf_nan=False):
    """What the model was trained with. The released files state artefacts, 0.01 and smoothing 0.001, for the
    first; these are what trained them (facts 2.5, 6.4)."""

    z_loss_weight: float = Field(1e-4, ge=0)
    load_balancing_weight: float = Field(1e-2, ge=0)
    router_z_loss_weight: float = Field(1e-4, ge=0)


class Provenance(BaseModel, strict=True, extra="forbid", frozen=True, allow_inf_nan=False):
    """The entry under OWN_KEY."""

    model: ModelConfig
    loss: LossWeights
    step: int = Field(ge=0)
    tokens_seen: int = Field(ge=0)


def require_expressible(model: ModelConfig) -> None:
    """Raises CheckpointError naming the first key of a model that the released code computes otherwise."""
    allowed: dict[str, object] = {
        "ffn": "swiglu4",
        "tied_head": False,
        "attention": "causal",
        "rope_base": 10000.0,
    }
    if model.moe_layers:
        allowed |= {"residual": "sequential", "top_k": 2}
    for key, value in allowed.items():
        found = getattr(model, key)
        if found != value:
            raise CheckpointError(
                f"model.{key}={_text(found)}: the released format has no such models; allowed {_text(value)}"
            )


def to_json(provenance: Provenance, dtype: str) -> str:
    """The file's content; `dtype` as torch names it."""
    model, loss = provenance.model, provenance.loss
    # Without a limit every expert takes as many as come: k * factor * tokens / experts = tokens.
    unlimited = model.num_experts / model.top_k if model.dropless else None
    values = {
        "architectures": ["OpenMoeForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 0,
        "dropout_rate": 0.0,
        "enable_comm_overlap": False,
        "enable_kernel": False,
        "enable_load_balance": False,
        "eos_token_id": 1,
        "head_dim": model.head_dim,
        "hidden_act": "swiglu",
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "label_smoothing": 0.0,
        "max_position_embeddings": MAX_POSITIONS,
        "mlp_gated": True,
        "model_type": "llama",
        # The port's layer i has experts where (i + 1) % interval == 0.
        "moe_layer_interval": model.moe_every or model.n_layers + 1,
        "num_attention_heads": model.n_heads,
        "num_experts": model.num_experts,
        "num_hidden_layers": model.n_layers,
        "num_key_value_heads": model.n_heads,
        "pad_token_id": 0,
        "rms_norm_eps": model.norm_eps,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "router_aux_loss_factor": loss.load_balancing_weight,
        "router_capacity_factor_eval": unlimited or model.capacity_factor_eval,
        "router_capacity_factor_train": unlimited or model.capacity_factor_train,
        "router_drop_tks": True,
        "router_min_capacity": model.min_capacity,
        "router_noisy_policy": None,
        "router_topk": 2,
        "router_z_loss_factor": loss.router_z_loss_weight,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "vocab_size": model.vocab_size,
        "z_loss_factor": loss.z_loss_weight,
        OWN_KEY: provenance.model_dump(exclude={"model": {"dispatch"}}),
    }
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


# What decides the weights' shapes and meaning, by the names in the file; the second is an older one.
_SHAPE = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "head_dim": "head_dim",
    "d_ff": "intermediate_size",
}
# What both the port and we take as given.
_ONLY = {
    "hidden_act": "swiglu",
    "mlp_gated": True,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "router_noisy_policy": None,
}
# How many tokens an expert takes; "router_drop_tks": false takes them all.
_CAPACITY = {
    "capacity_factor_train": "router_capacity_factor_train",
    "capacity_factor_eval": "router_capacity_factor_eval",
    "min_capacity": "router_min_capacity",
}


def read_json(path: Path) -> Provenance:
    """What `config.json` says of its model, as the released models were trained where it does not say.

    Raises CheckpointError naming the file, and the key that is missing or has another value than it may.
    """
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}") from None
    except ValueError:
        raise CheckpointError(f"{path}: damaged: no JSON") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: damaged: no JSON object")
    for key, only in _ONLY.items():
        if values.get(key, only) != only:
            raise CheckpointError(f"{path}: {key}={_text(values[key])}: allowed {_text(only)}")
    heads = _whole(path, values, "num_attention_heads")
    if values.get("num_key_value_heads", heads) != heads:
        raise CheckpointError(
            f"{path}: num_key_value_heads={values['num_key_value_heads']}: allowed "
            f"num_attention_heads={heads}"
        )
    stated = {ours: _whole(path, values, theirs) for ours, theirs in _SHAPE.items()}
    interval, layers = _whole(path, values, "moe_layer_interval"), stated["n_layers"]
    stated["moe_every"] = interval if interval <= layers else 0
    stated["num_experts"] = _whole(path, values, "num_experts") if stated["moe_every"] else 1
    if OWN_KEY not in values:
        return _as_released(path, values, stated)
    try:
        found = Provenance.model_validate(values[OWN_KEY])
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise CheckpointError(f"{path}: {OWN_KEY}.{place}: {error.errors()[0]['msg']}") from None
    for ours, value in stated.items():
        if getattr(found.model, ours) != value and (ours != "num_experts" or found.model.moe_every):
            raise CheckpointError(
                f"{path}: contradicts itself: {OWN_KEY}.model.{ours}={getattr(found.model, ours)}, "
                f"{_SHAPE.get(ours, ours)} says {value}"
            )
    require_expressible(found.model)
    return found


def _as_released(path: Path, values: dict[str, Any], stated: dict[str, Any]) -> Provenance:
    top_k = values.get("router_topk", values.get("topk", 2))
    if stated["moe_every"] and top_k != 2:
        raise CheckpointError(f"{path}: router_topk={_text(top_k)}: allowed 2")
    drops = values.get("router_drop_tks", True)
    if type(drops) is not bool:
        raise CheckpointError(f"{path}: router_drop_tks={_text(drops)}: allowed true or false")
    capacity = {ours: values[theirs] for ours, theirs in _CAPACITY.items() if theirs in values}
    try:
        model = ModelConfig(
            **stated,
            **capacity,
            dropless=not drops,
            ffn="swiglu4",
            residual="sequential",
            mask_padding=True,
            route_padding=True,
            top_k=2 if stated["moe_every"] else 1,
            group_rows=2 if stated["moe_every"] else 1,
            norm_eps=values.get("rms_norm_eps", values.get("layer_norm_epsilon", 1e-6)),
        )
    except ValidationError as error:
        fault = error.errors()[0]
        ours = str(fault["loc"][0]) if fault["loc"] else ""
        key = f"{_CAPACITY.get(ours, _SHAPE.get(ours, ours))}: " if ours else ""
        raise CheckpointError(f"{path}: {key}{fault['msg']}") from None
    return Provenance(model=model, loss=LossWeights(), step=0, tokens_seen=0)


def _whole(path: Path, values: dict[str, Any], key: str) -> int:
    if key not in values:
        raise CheckpointError(f"{path}: {key}: missing")
    if type(values[key]) is not int or values[key] < 1:
        raise CheckpointError(f"{path}: {key}={_text(values[key])}: allowed a whole number from 1")
    return int(values[key])


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
