"""Golden files made by running the original code, found by pattern, and the way from its names to ours."""

import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from openmoe.checkpoint.names import tensor_names
from openmoe.model.config import ModelConfig
from openmoe.model.decoder import Decoder

REPOSITORY = Path(__file__).parents[2]


def golden_root() -> Path:
    """OPENMOE_GOLDEN, else ../shared/golden, else the compact set that every clone has."""
    if "OPENMOE_GOLDEN" in os.environ:  # a slip of the keyboard must not quietly test less
        return Path(os.environ["OPENMOE_GOLDEN"]).resolve(strict=True)
    outside = REPOSITORY.parent / "shared" / "golden"
    return outside if outside.is_dir() else REPOSITORY / "tests" / "golden"


def golden_files(pattern: str) -> list[Path]:
    return sorted(golden_root().glob(pattern))


class Case:
    """One .npz file; `params()` follows `meta["params_from"]` to the file that has them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.arrays = np.load(path)
        self.meta = json.loads(str(self.arrays["meta_json"]))

    def __contains__(self, key: str) -> bool:
        return key in self.arrays.files

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key]

    def under(self, prefix: str) -> dict[str, np.ndarray]:
        prefix += "/"
        return {k.removeprefix(prefix): self.arrays[k] for k in self.arrays.files if k.startswith(prefix)}

    def origin(self, prefix: str) -> "Case":
        """The file that holds `prefix/`, following params_from."""
        case = self
        while not case.under(prefix):
            source = case.meta["params_from"]
            case = Case(self.path.parent / (source if source.endswith(".npz") else f"{source}.npz"))
        return case

    def params(self, prefix: str = "params") -> dict[str, np.ndarray]:
        return self.origin(prefix).under(prefix)

    def config(self) -> dict:
        return self.origin("params").meta["config"] if "config" not in self.meta else self.meta["config"]


def released_config(golden: dict, vocab_size: int | None = None) -> ModelConfig:
    """The golden files' config as ours: the released model with flaxformer's group rule."""
    return ModelConfig(
        vocab_size=vocab_size or golden["vocab"],
        d_model=golden["embed"],
        n_layers=golden["layers"],
        n_heads=golden["heads"],
        head_dim=golden["head_dim"],
        d_ff=golden["mlp"],
        ffn="swiglu4",
        residual="sequential",
        mask_padding=True,
        moe_every=golden["layers"] // golden["sparse_layers"] if golden["sparse_layers"] else 0,
        num_experts=golden["experts"],
        top_k=golden["topk"],
        group_rule="flaxformer",
        group_tokens=golden["group_size"],
        capacity_factor_train=golden["cf_train"],
        capacity_factor_eval=golden["cf_eval"],
        route_padding=True,
        init_scale=golden["scale"],
        router_init_std=golden["router_std"],
    )


def our_name(flax_name: str, config: ModelConfig) -> str:
    """decoder/layers_3/mlp/expert/wi_0/kernel -> layers.3.moe.experts.wi_0 and so on."""
    return {name.t5x: name.ours for name in tensor_names(config)}[flax_name]


def converted(params: dict[str, np.ndarray], config: ModelConfig) -> dict[str, Tensor]:
    """The parameters under these flax names as our tensors, under our names."""
    names = {name.t5x: name for name in tensor_names(config)}
    return {
        names[flax].ours: names[flax].from_format("t5x", torch.from_numpy(np.array(value))).contiguous()
        for flax, value in params.items()
    }


def load_decoder(case: Case, prefix: str = "params", **changes: object) -> Decoder:
    """A Decoder with the case's parameters. `changes` replace config values (dispatch, for example)."""
    config = released_config(case.config()).model_copy(update=changes)
    bf16 = case.config()["dtype"] == "bfloat16"
    model = Decoder(config, compute_dtype=torch.bfloat16 if bf16 else torch.float32)
    model.load_state_dict(converted(case.params(prefix), config))
    return model
