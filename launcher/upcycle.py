"""A MoE checkpoint from a dense one, with a receipt of what that does to the function:
`python -m openmoe.launcher.upcycle experiment=MOE upcycle.checkpoint=RUN upcycle.to=DIR`."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field

from openmoe.checkpoint.errors import CheckpointError
from openmoe.checkpoint.load_model import load_model
from openmoe.checkpoint.manager import checkpoint_at
from openmoe.checkpoint.manifest import Manifest
from openmoe.checkpoint.origin import model_config_of, require_tokenizer, tokenizer_of
from openmoe.checkpoint.storage import verify_checkpoint
from openmoe.checkpoint.stored_tensors import CheckpointTensors
from openmoe.checkpoint.tensor_files import TensorParts
from openmoe.checkpoint.upcycling import Recipe, require_fitting, upcycled
from openmoe.checkpoint.weights import write_weights
from openmoe.data.config import PathText
from openmoe.data.errors import DataError
from openmoe.data.prepare import PreparedData, prepare
from openmoe.data.shards import TOKENIZER
from openmoe.launcher.entry import run_command
from openmoe.launcher.errors import ConfigError
from openmoe.launcher.schema import Config
from openmoe.launcher.train import build_loader, longest_segment, model_identity, source_names
from openmoe.model.config import ModelConfig
from openmoe.model.decoder import Decoder
from openmoe.optim.build import build_optimizer
from openmoe.train.difference import Difference, difference
from openmoe.train.step import MicroBatch, micro_batches

RECEIPT = "receipt.json"


class UpcycleConfig(BaseModel, strict=True, extra="forbid", frozen=True, allow_inf_nan=False):
    checkpoint: PathText
    to: PathText
    method: Literal["copy", "noise", "partial"]
    noise: float = Field(ge=0, le=1e3)
    fraction: float = Field(gt=0, le=1)
    expert_share: float = Field(ge=0, le=1)
    data: Literal["fresh", "kept"]
    receipt_rows: int = Field(ge=0, le=100_000)


class UpcyclePage(Config):
    upcycle: UpcycleConfig


def main() -> None:
    run_command(upcycle, UpcyclePage, "upcycle")


def upcycle(page: UpcyclePage) -> None:
    """Write the checkpoint, then measure and print the receipt."""
    asked = page.upcycle
    source = checkpoint_at("upcycle.checkpoint", asked.checkpoint)
    manifest = verify_checkpoint(source)
    dense = model_config_of(source, manifest)
    require_fitting(dense, page.model)
    if asked.data == "kept" and "data" not in manifest.metadata:
        raise ConfigError(f"upcycle.data=kept: {source} holds weights alone; allowed fresh")
    target = Path(asked.to) / f"step_{manifest.step}"
    if (Path(asked.to) / RECEIPT).exists():
        raise ConfigError(f"upcycle.to={asked.to}: holds an upcycled model already; choose another")
    other_files: dict[str, bytes] = {}
    batches: dict[str, list[MicroBatch]] = {}
    if asked.receipt_rows:  # before anything is written: text that can't be read must leave nothing behind
        data = prepare(page.data, page.model.vocab_size, source_names(page))
        require_tokenizer(source, manifest, data.tokenizer.sha256)
        other_files[TOKENIZER] = data.tokenizer.model
        batches = held_back(page, data)
    else:
        other_files |= _tokenizer(source, manifest)
    recipe = Recipe(asked.method, asked.noise, asked.fraction, asked.expert_share, page.run.seed)
    stored = CheckpointTensors(source, manifest)
    parameters = _parameters(page.model)
    tensors = upcycled(
        stored, page.model, {name: tuple(value.shape) for name, value in parameters.items()}, recipe
    )
    config = page.model_dump(exclude={"upcycle"})
    metadata: dict[str, Any] = {"config": config, "upcycled": asdict(recipe) | {"from": str(source)}}
    if asked.data == "kept":
        dtype = tensors[0].dtype
        tensors += _fresh_optimizer(page, parameters, dtype)
        tensors.append(stored.parts("rng/torch_cpu"))
        metadata = manifest.metadata | metadata | {"wandb_run_id": None}
    write_weights(
        target,
        tensors,
        step=manifest.step,
        tokens_seen=manifest.tokens_seen,
        model=model_identity(page),
        metadata=metadata,
        other_files=other_files,
    )
    receipt: dict[str, Any] = {
        "from": str(source),
        "step": manifest.step,
        "recipe": asdict(recipe),
        "moe_layers": page.model.moe_layers,
        "data": asked.data,
        "parameters": {"dense": _count(_parameters(dense)), "moe": _count(parameters)},
        "sources": {name: asdict(found) for name, found in measure(batches, source, target).items()},
    }
    (Path(asked.to) / RECEIPT).write_text(json.dumps(receipt, indent=1, sort_keys=True) + "\n")
    print(receipt_text(receipt))
    key = "resume" if asked.data == "kept" else "initialise_from"
    print(f"{target}: go on with checkpoint.{key}={target}")


def _tokenizer(source: Path, manifest: Manifest) -> dict[str, bytes]:
    """The tokenizer's file of a checkpoint; of one that has none the tokenizer that its run's data give.
    Where they don't, that is said."""
    if TOKENIZER in manifest.files:
        return {TOKENIZER: (source / TOKENIZER).read_bytes()}
    try:
        return {TOKENIZER: tokenizer_of(source, manifest).model}
    except (CheckpointError, DataError) as error:
        print(f"the result holds no tokenizer: {error}")
        return {}


def held_back(page: UpcyclePage, data: PreparedData) -> dict[str, list[MicroBatch]]:
    """Held-back text of each source as causal LM."""
    loader = build_loader(page, data)
    rows = page.upcycle.receipt_rows
    size = page.train.micro_batch_rows
    size = size if rows % size == 0 else -1
    found = {
        name: micro_batches(
            loader.validation_rows("causal_lm", name, rows), size, torch.device("cpu"), longest_segment(page)
        )
        for name in source_names(page)
    }
    loader.close()
    return found


def measure(batches: dict[str, list[MicroBatch]], before: Path, after: Path) -> dict[str, Difference]:
    """The difference of the two checkpoints' models on each source's rows."""
    if not batches:
        return {}
    device = torch.device("cpu")
    models = [load_model(folder, torch.float32, device)[0] for folder in (before, after)]
    return {name: difference(models[0], models[1], rows) for name, rows in batches.items()}


def receipt_text(receipt: dict[str, Any]) -> str:
    """The receipt as tables."""
    recipe, counts = receipt["recipe"], receipt["parameters"]
    rows = [
        f"{receipt['from']} (step {receipt['step']}): {counts['dense']:,} parameters become "
        f"{counts['moe']:,}",
        f"method {recipe['method']}, expert_share {recipe['expert_share']}, seed {recipe['seed']}, "
        f"data {receipt['data']}",
    ]
    sources = receipt["sources"]
    if not sources:
        return "\n".join([*rows, "not measured (upcycle.receipt_rows=0)"])
    rows.append(
        f"{'':<14}{'tokens':>9}{'loss before':>13}{'after':>9}{'change':>9}{'|logit diff|':>14}{'KL':>11}"
    )
    for name, of in sources.items():
        change = of["loss_after"] - of["loss_before"]
        rows.append(
            f"{name:<14}{of['tokens']:>9,.0f}{of['loss_before']:>13.4f}{of['loss_after']:>9.4f}{change:>+9.4f}"
            f"{of['logit_difference']:>14.2e}{of['kl']:>11.2e}"
        )
    rows.append("change of each MoE layer's output over what the dense layer adds:")
    for name, of in sources.items():
        layers = ", ".join(f"{layer}: {of['layers'][layer]:.3f}" for layer in receipt["moe_layers"])
        rows.append(f"{name:<14}{layers}")
    return "\n".join(rows)


def _parameters(model: ModelConfig) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return dict(Decoder(model).named_parameters())


def _count(parameters: dict[str, torch.Tensor]) -> int:
    return sum(value.numel() for value in parameters.values())


def _fresh_optimizer(
    page: UpcyclePage, parameters: dict[str, torch.Tensor], dtype: torch.dtype
) -> Sequence[TensorParts]:
    """The optimizer's tensors before its first step: all zero."""
    named = [(name, torch.empty_like(value, dtype=dtype)) for name, value in parameters.items()]
    optimizer = build_optimizer(page.optim, named)
    return [
        TensorParts(f"optimizer/{name}/{key}", value.dtype, tuple(value.shape), _zeros(value))
        for group in optimizer.param_groups
        for name, param in zip(group["param_names"], group["params"], strict=True)
        for key, value in optimizer.state[param].items()
    ]


def _zeros(like: torch.Tensor) -> Callable[[], Iterator[torch.Tensor]]:
    def parts() -> Iterator[torch.Tensor]:
        if not like.dim():
            yield torch.zeros((), dtype=like.dtype)
            return
        for _ in range(like.shape[0]):
            yield torch.zeros(like.shape[1:], dtype=like.dtype)

    return parts


if __name__ == "__main__":
    main()
