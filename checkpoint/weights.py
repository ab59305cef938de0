"""Checkpoints that hold weights alone: written a part at a time, and taken as the start of another run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from openmoe.checkpoint.manifest import MANIFEST_NAME, FileEntry, Manifest, TensorEntry
from openmoe.checkpoint.storage import FILE_BYTES, read_checkpoint, verify_checkpoint
from openmoe.checkpoint.tensor_files import TensorParts, cut_into_files, file_bytes, new_folder, write_file
from openmoe.checkpoint.together import ALL, Peers

# What a model's weights mean; another capacity, another way of grouping or other initial values do not
# change it.
WEIGHT_KEYS = (
    "vocab_size", "d_model", "n_layers", "n_heads", "head_dim", "d_ff", "ffn", "residual", "tied_head",
    "rope_base", "norm_eps", "moe_every", "num_experts",
)  # fmt: skip


def write_weights(
    folder: Path,
    tensors: Sequence[TensorParts],
    *,
    step: int,
    tokens_seen: int,
    model: dict[str, Any],
    metadata: dict[str, Any],
    other_files: Mapping[str, bytes],
) -> None:
    """Writes a checkpoint of `tensors`, under their logical names, as `folder`, which is new.

    Raises CheckpointError where the folder exists, CheckpointWriteError where the disk refuses; what was
    written is removed then.
    """
    with new_folder(folder) as partial:
        files: dict[str, FileEntry] = {}
        cut = cut_into_files(tensors, FILE_BYTES)
        for number, group in enumerate(cut, start=1):
            name = f"shard-00001-model-{number:05d}-of-{len(cut):05d}.safetensors"
            files[name] = write_file(partial / name, file_bytes(_sharding(group), group))
        for name, content in other_files.items():
            files[name] = write_file(partial / name, [content])
        manifest = Manifest(
            format="openmoe-checkpoint",
            version=1,
            step=step,
            tokens_seen=tokens_seen,
            milestone=True,
            model=model,
            metadata=metadata,
            files=files,
            tensors={
                tensor.name: TensorEntry(
                    shape=list(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch.")
                )
                for tensor in tensors
            },
        )
        write_file(partial / MANIFEST_NAME, [manifest.text().encode()])


def load_weights(
    folder: Path, tensors: dict[str, Tensor], model: dict[str, Any], peers: Peers = ALL
) -> Manifest:
    """Verifies the checkpoint, then fills `tensors` (of kind "model") in place. Of several processes all call
    it together. Raises CheckpointError where it is damaged or its weights are another model's."""
    manifest = verify_checkpoint(folder, peers)
    here = {key: value for key, value in manifest.model.items() if key not in WEIGHT_KEYS}
    read_checkpoint(folder, manifest, tensors, here | {key: model[key] for key in WEIGHT_KEYS}, peers)
    return manifest


def _sharding(tensors: Sequence[TensorParts]) -> dict[str, str]:
    """The metadata that torch.distributed.checkpoint reads: every tensor is whole."""
    places = {tensor.name: {"saved_offsets": [0] * len(tensor.shape)} for tensor in tensors}
    return {"DCP_SHARDING_INFO": json.dumps(places), "DCP_VERSION": "1.0", "format": "pt"}
