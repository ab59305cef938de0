"""The released PyTorch model's forward pass in plain torch, from its description alone (facts 1, 2, 6).

Reads an exported folder with the safetensors library and shares no code with the project.
"""

import json
import math
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor


def read_folder(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """config.json, and every tensor from the file that the index names."""
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    weights = {}
    for name, file in weight_map.items():
        with safe_open(folder / file, framework="pt") as opened:
            weights[name] = opened.get_tensor(name).float()
    return json.loads((folder / "config.json").read_text()), weights


def released_logits(folder: Path, tokens: Tensor, training: bool = False) -> Tensor:
    """tokens `[rows, columns]` -> `[rows, columns, vocabulary]`."""
    config, w = read_folder(folder)
    eps = config["rms_norm_eps"]
    x = w["model.embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        layer = {n.removeprefix(f"model.layers.{i}."): t for n, t in w.items() if f".layers.{i}." in n}
        x = x + attention(config, layer, norm(x, layer["input_layernorm.weight"], eps))
        h = norm(x, layer["post_attention_layernorm.weight"], eps)
        if (i + 1) % config["moe_layer_interval"]:
            x = x + feed_forward(layer, "mlp", h)
            continue
        x = x + experts(config, layer, h, training)
        x = x + feed_forward(layer, "extra_mlp", norm(x, layer["pre_extra_mlp_layernorm.weight"], eps))
    return norm(x, w["model.norm.weight"], eps) @ w["lm_head.weight"].T


def norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    return scale * (x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt())


def attention(config: dict, layer: dict[str, Tensor], x: Tensor) -> Tensor:
    rows, columns, _ = x.shape
    heads, width = config["num_attention_heads"], config["head_dim"]
    q, k, v = (
        (x @ layer[f"self_attn.{n}_proj.weight"].T).view(rows, columns, heads, width).transpose(1, 2)
        for n in "qkv"
    )
    # A pair of coordinates (j, j + width / 2) is a complex number that turns with the position.
    frequency = config["rope_theta"] ** (-torch.arange(width // 2) * 2 / width)
    turn = torch.polar(torch.ones(columns, width // 2), torch.arange(columns)[:, None] * frequency)

    def rotated(z: Tensor) -> Tensor:
        turned = torch.complex(z[..., : width // 2], z[..., width // 2 :]) * turn
        return torch.cat((turned.real, turned.imag), -1)

    scores = rotated(q) @ rotated(k).transpose(-1, -2)
    scores = scores.masked_fill(torch.ones(columns, columns).triu(1).bool(), -math.inf)
    y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(rows, columns, heads * width)
    return y @ layer["self_attn.o_proj.weight"].T


def feed_forward(layer: dict[str, Tensor], part: str, x: Tensor) -> Tensor:
    a, b = (x @ layer[f"{part}.gate_proj.weight"].T).chunk(2, -1)
    return (a * b * b.sigmoid() * (x @ layer[f"{part}.up_proj.weight"].T)) @ layer[
        f"{part}.down_proj.weight"
    ].T


def experts(config: dict, layer: dict[str, Tensor], x: Tensor, training: bool) -> Tensor:
    flat = x.flatten(0, 1)
    probabilities = (flat @ layer["mlp.gate_weight"].T).softmax(-1)
    number, k = config["num_experts"], config["router_topk"]
    factor = config[f"router_capacity_factor_{'train' if training else 'eval'}"]
    capacity = math.floor(k * factor * len(flat) / number)
    capacity = max(capacity + capacity % 2, config["router_min_capacity"])
    taken = [0] * number
    y = torch.zeros_like(flat)
    choices = torch.sort(probabilities, dim=-1, descending=True, stable=True).indices[:, :k]
    for choice in range(k):
        for token, expert in enumerate(choices[:, choice].tolist()):
            taken[expert] += 1
            if taken[expert] > capacity:
                continue
            a, b = (flat[token] @ layer["mlp.experts.wi_gate"][expert]).chunk(2, -1)
            hidden = a * b * b.sigmoid() * (flat[token] @ layer["mlp.experts.wi_up"][expert])
            y[token] += probabilities[token, expert] * (hidden @ layer["mlp.experts.wo"][expert])
    return y.view_as(x)
