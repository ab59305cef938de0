"""A checkpoint as a folder in the released format: sharded safetensors, config.json, tokenizer.

The same checkpoint gives the same bytes. Memory holds one part of a tensor, at most one expert.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from openmoe.checkpoint.manifest import Manifest
from openmoe.checkpoint.names import TensorName, tensor_names
from openmoe.checkpoint.released_config import (
    CONFIG_NAME,
    LossWeights,
    Provenance,
    require_expressible,
    to_json,
)
from openmoe.checkpoint.stored_tensors import CheckpointTensors
from openmoe.checkpoint.tensor_files import TensorParts, cut_into_files, file_bytes, new_folder, write_file
from openmoe.data.tokenizer import EOS, PAD, SENTINELS, Tokenizer, parse_model
from openmoe.model.config import ModelConfig

INDEX_NAME = "model.safetensors.index.json"
TOKENIZER_NAME = "spiece.model"  # as T5Tokenizer calls it
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"


def export_released(
    folder: Path,
    manifest: Manifest,
    target: Path,
    *,
    dtype: torch.dtype | None,
    shard_bytes: int,
    loss: LossWeights,
    tokenizer: Tokenizer | None,
) -> list[Path]:
    """Writes the weights of the verified checkpoint `folder` to `target`, a new folder; returns its files.

    `dtype` None keeps the stored type. Raises CheckpointError where the format has no such model or `target`
    exists, CheckpointWriteError where the disk refuses; nothing half-written stays.
    """
    model = ModelConfig.model_validate(manifest.model)
    require_expressible(model)
    stored = CheckpointTensors(folder, manifest)
    tensors = [_released(stored, name, dtype) for name in tensor_names(model)]
    provenance = Provenance(model=model, loss=loss, step=manifest.step, tokens_seen=manifest.tokens_seen)
    with new_folder(target) as partial:
        _write_shards(partial, cut_into_files(tensors, shard_bytes))
        dtype_name = str(tensors[0].dtype).removeprefix("torch.")
        write_file(partial / CONFIG_NAME, [to_json(provenance, dtype_name).encode()])
        if tokenizer is not None:
            exported = without_sentinels(tokenizer)
            write_file(partial / TOKENIZER_NAME, [exported])
            write_file(partial / TOKENIZER_CONFIG_NAME, [_tokenizer_config(exported).encode()])
    return sorted(target.iterdir())


def without_sentinels(tokenizer: Tokenizer) -> bytes:
    """The sentencepiece model as T5Tokenizer wants it: that adds the sentinels, `extra_ids`, itself, at the
    same ids as ours."""
    proto = parse_model(tokenizer.model, "tokenizer")
    del proto.pieces[len(proto.pieces) - SENTINELS :]
    content: bytes = proto.SerializeToString(deterministic=True)
    return content


def _released(stored: CheckpointTensors, name: TensorName, dtype: torch.dtype | None) -> TensorParts:
    ours = stored.parts(f"model/{name.ours}", one_by_one=name.is_of_experts)
    ours = ours if dtype is None else ours.to(dtype)

    def convert() -> Iterator[Tensor]:
        # Only experts change places within a tensor; the others' bytes stay in their order.
        for part in ours.parts():
            yield name.to_format("released", part) if name.is_of_experts else part

    return TensorParts(name.released, ours.dtype, name.shape_in("released"), convert)


def _write_shards(folder: Path, files: Sequence[Sequence[TensorParts]]) -> None:
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_file(folder / file, file_bytes({"format": "pt"}, tensors))
        weight_map |= {tensor.name: file for tensor in tensors}
    total = sum(tensor.size_bytes for tensors in files for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_file(folder / INDEX_NAME, [(json.dumps(index, indent=2, sort_keys=True) + "\n").encode()])


def _tokenizer_config(model: bytes) -> str:
    """The special tokens by the names of their pieces: another name would become a new id."""
    pieces = parse_model(model, "tokenizer").pieces
    pad, eos = pieces[PAD].piece, pieces[EOS].piece
    values = {
        "bos_token": pad,
        "clean_up_tokenization_spaces": False,
        "eos_token": eos,
        "extra_ids": SENTINELS,
        "legacy": True,
        "pad_token": pad,
        "padding_side": "left",
        "tokenizer_class": "T5Tokenizer",
        "unk_token": next(piece.piece for piece in pieces if piece.type == piece.UNKNOWN),
    }
    return json.dumps(values, indent=2, sort_keys=True) + "\n"
